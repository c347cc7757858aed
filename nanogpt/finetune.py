"""To begin from an earlier model: what of it stays, what may change, and how gently it is trained on.

In: a model file, and the settings that somebody gave. Out: the model's parts, and the settings of the run.
Refuses: another shape or tokenizer, and a longer context than positions were learned for.
"""

import os
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import Config, ModelConfig, differing, flatten, resolve
from nanogpt.errors import UserError
from nanogpt.model import stretched_base
from nanogpt.recipe import Choice

FINE_TUNING = 0.25  # of the usual learning rates: GPT was trained at 2.5e-4, and fine-tuned at 6.25e-5 (Radford et al. 2018, section 4.1)
SHAPE = ("arch", "n_layer", "n_head", "n_kv_head", "n_embd")  # what a run that begins from an earlier model cannot change


def earlier_model(path: str | os.PathLike[str], given: dict[str, Any]) -> checkpoint.Parts:
    """The model that a run begins from. Errors: `UserError` where there is none, or where the settings ask for another tokenizer."""
    earlier = checkpoint.load(os.fspath(path))
    own = {"tokenizer": earlier.tokenizer.kind, "vocab_size": earlier.tokenizer.vocab_size}
    if other := [f"{name} = {given[name]}" for name in own if given.get(name) not in (None, own[name])]:
        what = f"A model keeps its tokenizer, with which it has learned: {own['tokenizer']} with {own['vocab_size']:,} tokens, not {' and '.join(other)}."
        raise UserError(what, "Leave out --tokenizer and --vocab-size, also in the --config, or leave out --init-from.")
    return earlier


def continuing(given: dict[str, Any], earlier: ModelConfig) -> dict[str, Any]:
    """The settings for a run that begins from an earlier model: its shape, and its context and positions, stretched where a longer context is asked for.

    Errors: `UserError` with a table of what contradicts the shape; for a longer context than positions were learned for.
    """
    before, after = (flatten(resolve(earlier.model_dump() | more, complete=False)) for more in ({}, given))
    if changed := [name for name in SHAPE if after[name] != before[name]]:
        table = differing(("setting", "model", "asked"), changed, before, after)
        raise UserError(f"A model that is trained further keeps its shape:\n{table}", "Leave them out, or leave out --init-from.")
    settings = earlier.model_dump() | given
    factor = after["context_length"] / before["context_length"]
    if factor > 1 and earlier.arch == "classic":
        raise UserError(
            f"The model has learned {before['context_length']:,} positions, and cannot look back on {after['context_length']:,} tokens.",
            f"Use --context-length {before['context_length']} or less; a model of --arch modern can be stretched.",
        )
    if factor > 1 and "rope_base" not in given:
        settings["rope_base"] = stretched_base(before["rope_base"], factor, earlier.n_embd // earlier.n_head)
    if given.get("minutes") is not None and "dropout" not in given:
        del settings["dropout"]  # the recipe knows the text
    return settings


def gentler(settled: Config, given: dict[str, Any]) -> list[Choice]:
    """Lower learning rates for a model that has learned already, where none were given."""
    names = ("learning_rate", "matrix_learning_rate") if settled.training.optimizer == "muon" else ("learning_rate",)
    rates = {name: float(f"{FINE_TUNING * getattr(settled.training, name):.2g}") for name in names if name not in given}
    return [Choice(name, rate, "a quarter of the usual: the model has learned already") for name, rate in rates.items()]
