"""Nano-GPT: train a GPT on your own text, on the machine you have.

import nanogpt
model = nanogpt.train("book.txt")  # or nanogpt.load("runs/book")
print("".join(model.stream("Once upon", seed=1)))
"""

from typing import Any

from nanogpt._version import __version__
from nanogpt.errors import UserError

__all__ = ["UserError", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import `train` and `load` on first use: torch takes longer to import than `--help` may."""
    if name in ("load", "train"):
        from nanogpt import api

        return getattr(api, name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
