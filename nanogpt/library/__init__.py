"""What a program does with Nano-GPT: `train` a text into a `Model`, or `load` one.

In: paths and settings by name. Out: a `Model`, which streams text, evaluates and gives logits. Silent: progress goes to `on_event`.
"""

from nanogpt.library.model import Evaluation, Model, load, new_seed
from nanogpt.library.training import train

__all__ = ["Evaluation", "Model", "load", "new_seed", "train"]
