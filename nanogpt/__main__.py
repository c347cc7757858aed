"""The command `nanogpt`, also as `python -m nanogpt`."""

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        # Imports happen here so that Ctrl-C during import also exits with 130.
        from nanogpt.cli.main import main as run_cli

        run_cli()
    except KeyboardInterrupt:
        _exit(130)
    except SystemExit as error:
        _exit(error.code)


def _exit(code: int | str | None) -> NoReturn:
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ignore a second Ctrl-C.
    is_distributed = os.environ.get("WORLD_SIZE", "1") != "1"
    if is_distributed and isinstance(code, int | None):
        # Leftover gloo threads would abort a normal exit.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code or 0)
    sys.exit(code)


if __name__ == "__main__":
    main()
