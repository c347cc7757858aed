"""Shell commands that error messages propose for a launch of several processes."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from nanogpt.formatting import format_flags


def torchrun_command(world_size: int, port: int | None = None, **settings: Any) -> str:
    """Return a torchrun command that runs this program with changed settings.

    Args:
        world_size: Number of processes on all nodes.
        port: The port of rank 0, if it has to change.
        **settings: Settings that replace those of the current command.
    """
    command = current_command()
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command = command.replace(f" {flag}", "")
        else:
            # Remove the flag with its value, in the forms `--flag value` and `--flag=value`.
            command = re.sub(rf" {flag}(?!-)(=|\s+)?(?(1)\S+)", "", command)
        command += " " + format_flags({name: value})
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    options, num_processes = "", world_size
    if nodes > 1 and world_size % nodes == 0:
        options, num_processes = f"--nnodes {nodes} ", world_size // nodes
    options += f"--nproc-per-node {num_processes} "
    if port:
        options += f"--master-port {port} "
    return f"torchrun {options}{command}"


def current_command() -> str:
    """Return the arguments that make torchrun run this program with its current arguments."""
    is_nanogpt = os.path.basename(sys.argv[0]) in ("__main__.py", "nanogpt")
    program = "-m nanogpt" if is_nanogpt else shlex.quote(sys.argv[0])
    return f"{program} {shlex.join(sys.argv[1:])}"


def format_ranks(ranks: Sequence[int]) -> str:
    """Return a list of ranks as text, such as "rank 0" or "ranks 1, 3"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
