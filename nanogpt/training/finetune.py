"""Start a run from an initial checkpoint: which settings it fixes, and which learning rates fit."""

import os
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import Config, ModelConfig, flatten, format_differences, resolve
from nanogpt.errors import UserError
from nanogpt.model import ntk_scaled_rope_theta
from nanogpt.training.recipe import ChosenSetting

# GPT was pre-trained at 2.5e-4 and fine-tuned at 6.25e-5 (Radford et al. 2018, section 4.1).
FINETUNE_LR_RATIO = 0.25
# Settings that a run from an initial checkpoint cannot change.
FROZEN_SETTINGS = (
    "arch",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "head_dim",
    "tie_word_embeddings",
)


def load_init_checkpoint(
    path: str | os.PathLike[str], user_settings: dict[str, Any]
) -> checkpoint.LoadedModel:
    """Load the model that a run starts from.

    Raises:
        UserError: If there is no model at `path`, or the settings name another tokenizer.
    """
    init_checkpoint = checkpoint.load(os.fspath(path))
    tokenizer = init_checkpoint.tokenizer
    fixed = {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    changed = [
        f"{name} = {user_settings[name]}"
        for name, value in fixed.items()
        if user_settings.get(name) not in (None, value)
    ]
    if changed:
        raise UserError(
            f"Cannot change the tokenizer of an initial checkpoint ({tokenizer.kind}, "
            f"{tokenizer.vocab_size:,} tokens; requested {' and '.join(changed)}).",
            "Leave out tokenizer and vocab_size, or leave out init_from.",
        )
    return init_checkpoint


def inherit_settings(user_settings: dict[str, Any], init_config: ModelConfig) -> dict[str, Any]:
    """Return the user's settings, completed by the model settings of the initial checkpoint.

    A longer context raises `rope_theta` by NTK-aware scaling unless the user gave one.

    Raises:
        UserError: If settings contradict the shape, or a context is longer than the learned
            positions.
    """
    inherited = init_config.model_dump()
    before = flatten(resolve(inherited, complete=False))
    after = flatten(resolve(inherited | user_settings, complete=False))
    if changed := [name for name in FROZEN_SETTINGS if after[name] != before[name]]:
        table = format_differences("model", changed, before, after)
        raise UserError(
            f"Cannot change the shape of an initial checkpoint:\n{table}",
            f"Leave out {', '.join(changed)}, or leave out init_from.",
        )
    settings = inherited | user_settings
    context_length = before["context_length"]
    factor = after["context_length"] / context_length
    if factor > 1 and init_config.arch == "gpt2":
        raise UserError(
            f"The context is longer than the {context_length:,} positions that the model has "
            f"learned: {after['context_length']:,} tokens (arch = 'qwen3' has no such limit).",
            {"context_length": context_length},
        )
    if factor > 1 and "rope_theta" not in user_settings:
        settings["rope_theta"] = ntk_scaled_rope_theta(
            before["rope_theta"], factor, init_config.head_size
        )
    # With a time budget, the recipe chooses the dropout.
    if user_settings.get("minutes") is not None and "dropout" not in user_settings:
        del settings["dropout"]
    return settings


def finetune_lrs(config: Config, user_settings: dict[str, Any]) -> list[ChosenSetting]:
    """Return lower learning rates than usual, where the user gave none."""
    names = ["learning_rate"]
    if config.training.optimizer == "muon":
        names.append("muon_learning_rate")
    reason = "1/4 of the usual rate for an initial checkpoint"
    return [
        ChosenSetting(
            name, float(f"{FINETUNE_LR_RATIO * getattr(config.training, name):.2g}"), reason
        )
        for name in names
        if name not in user_settings
    ]
