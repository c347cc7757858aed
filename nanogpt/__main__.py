"""`python -m nanogpt`: the command `nanogpt`, also where scripts are not on the path."""

import os
import sys

from nanogpt.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(end.code, int | None):
            raise
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(end.code or 0)  # of many processes: threads of gloo that are left abort a process that ends in the ordinary way
