"""Nano-GPT: train a GPT on your own text, on the machine you have.

import nanogpt
model = nanogpt.train("book.txt")  # or nanogpt.load("runs/book")
print("".join(model.stream("Once upon", seed=1)))
"""

from typing import Any

from nanogpt.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "load", "train"]


def __getattr__(name: str) -> Any:
    """`train` and `load` come from `library` when first asked for: importing torch takes longer than `nanogpt --help` may."""
    if name in ("load", "train"):
        from nanogpt import library

        return getattr(library, name)
    raise AttributeError(f"module 'nanogpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
