"""The command line: how it begins, and how errors look.

In: words. Out: an exit code: 0; 2 for a `UserError`; 130 or 143 after a signal.

`commands` is the table of commands, `words` what some of their words mean, `foresee` what `nanogpt plan` puts together.
"""

import sys
import warnings

from cyclopts import CycloptsError
from pydantic import ValidationError

from nanogpt.cli.commands import app
from nanogpt.cli.words import dash_last
from nanogpt.config import explain
from nanogpt.errors import Notice, UserError

__all__ = ["app", "main"]


def main(words: list[str] | None = None) -> None:
    """Run a command and leave with its exit code."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", Notice)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # they may be closed
        if stream.isatty():  # a console may know fewer characters than the text
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        elif hasattr(stream, "reconfigure"):  # a file gets the text as it is
            stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    try:
        app(dash_last(sys.argv[1:] if words is None else words))
    except CycloptsError as error:
        cause = error.__cause__ or error.__context__
        _fail("\n".join(explain(cause)) if isinstance(cause, ValidationError) else str(error))
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"nanogpt: {message}", file=sys.stderr)
    sys.exit(2)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:  # type: ignore[no-untyped-def]
    """A Notice as a sentence; other warnings as Python shows them."""
    text = f"nanogpt: {message}\n" if issubclass(category, Notice) else warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)
