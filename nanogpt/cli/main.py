"""The entry point of the command line: exit codes, warnings and standard streams.

Exit codes are 0, 2 after a user's error, and 130 or 143 after a signal.
"""

import io
import sys
import warnings

from cyclopts import CycloptsError
from pydantic import ValidationError

from nanogpt.cli.app import app
from nanogpt.cli.args import move_stdin_dash_last
from nanogpt.cli.output import exit_with_error, format_error, show_warning
from nanogpt.config import describe_validation_error
from nanogpt.errors import Notice, UserError


def main(argv: list[str] | None = None) -> None:
    """Run one command. Raises `SystemExit` with its exit code where that is not 0."""
    warnings.showwarning = show_warning
    warnings.simplefilter("always", Notice)
    for stream in (sys.stdout, sys.stderr):
        _configure_stream(stream)
    try:
        app(move_stdin_dash_last(sys.argv[1:] if argv is None else argv))
    except CycloptsError as error:
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ValidationError):
            exit_with_error("\n".join(describe_validation_error(cause)))
        exit_with_error(str(error))
    except UserError as error:
        exit_with_error(format_error(error))
    except OSError as error:
        reason = error.strerror or str(error)
        exit_with_error(f"{reason}: {error.filename}" if error.filename else reason)
    except KeyboardInterrupt:
        sys.exit(130)


def _configure_stream(stream: object) -> None:
    """Replace unprintable characters on a terminal; write text unchanged to a file or pipe."""
    if not isinstance(stream, io.TextIOWrapper):  # closed, or replaced by a caller
        return
    if stream.isatty():
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
