"""The command `nanogpt`, and `python -m nanogpt`, also where scripts are not on the path.

In: words. Out: an exit code. Ctrl-C is 130 from the first moment on: what the command line needs is imported here, where it is waited for.
"""

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line, and leave as it does."""
    try:
        from nanogpt.cli import main as command

        command()
    except KeyboardInterrupt:
        _leave(130)
    except SystemExit as end:
        _leave(end.code)


def _leave(code: int | str | None) -> NoReturn:
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is impatient presses it again
    if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(code, int | None):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code or 0)  # of many processes: threads of gloo that are left abort a process that ends in the ordinary way
    sys.exit(code)


if __name__ == "__main__":
    main()
