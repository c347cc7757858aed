"""The entry point of the command line: errors, exit codes, warnings and standard streams.

Exit codes are 0, 2 after a user's error, and 130 or 143 after a signal.
"""

import io
import sys
import warnings
from collections.abc import Mapping

from cyclopts import CycloptsError
from pydantic import ValidationError

from nanogpt.cli.app import app
from nanogpt.cli.args import move_stdin_dash_last
from nanogpt.config import describe_validation_error
from nanogpt.errors import Notice, UserError
from nanogpt.formatting import format_flags


def main(argv: list[str] | None = None) -> None:
    """Run one command. Raises `SystemExit` with its exit code where that is not 0."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", Notice)
    for stream in (sys.stdout, sys.stderr):
        _configure_stream(stream)
    try:
        app(move_stdin_dash_last(sys.argv[1:] if argv is None else argv))
    except (CycloptsError, UserError, OSError) as error:
        print(f"nanogpt: {_describe_error(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _describe_error(error: CycloptsError | UserError | OSError) -> str:
    """Return the message of an error, with the settings of its fix as flags."""
    cause = error.__cause__ or error.__context__
    if isinstance(error, CycloptsError) and isinstance(cause, ValidationError):
        return "\n".join(describe_validation_error(cause))
    if isinstance(error, UserError) and isinstance(error.fix, Mapping):
        return f"{error.what}\nUse {format_flags(error.fix)}."
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{reason}: {error.filename}" if error.filename else reason
    return str(error)


def _show_warning(
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


def _configure_stream(stream: object) -> None:
    """Replace unprintable characters on a terminal; write text unchanged to a file or pipe."""
    if not isinstance(stream, io.TextIOWrapper):  # closed, or replaced by a caller
        return
    if stream.isatty():
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
