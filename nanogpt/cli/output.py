"""Errors and warnings as the command line prints them: settings become flags."""

import sys
import warnings
from collections.abc import Mapping
from typing import NoReturn

from nanogpt.errors import Notice, UserError
from nanogpt.formatting import format_flags


def format_error(error: UserError) -> str:
    """Return the message of an error, with the settings of its fix as flags."""
    if not isinstance(error.fix, Mapping):
        return str(error)
    return f"{error.what}\nUse {format_flags(error.fix)}."


def exit_with_error(message: str) -> NoReturn:
    """Print a message to standard error and exit with code 2."""
    print(f"nanogpt: {message}", file=sys.stderr)
    sys.exit(2)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """Print a `Notice` as one sentence, and other warnings as Python does."""
    if issubclass(category, Notice):
        text = f"nanogpt: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)
