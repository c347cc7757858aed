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
# Model settings that a run from an initial checkpoint can change.
FREE_SETTINGS = {"context_length", "dropout", "sliding_window", "rope_theta"}


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


def inherit_settings(
    user_settings: dict[str, Any], init_checkpoint: checkpoint.LoadedModel
) -> dict[str, Any]:
    """Return the user's settings, completed by those of the initial checkpoint.

    A longer context raises `rope_theta` by NTK-aware scaling unless the user gave one.

    Raises:
        UserError: If settings contradict the shape, or a context is longer than the learned
            positions.
    """
    init_config = init_checkpoint.model.config
    inherited = init_config.model_dump()
    before = flatten(resolve(inherited, complete=False))
    after = flatten(resolve(inherited | user_settings, complete=False))
    frozen = [name for name in ModelConfig.model_fields if name not in FREE_SETTINGS]
    if changed := [name for name in frozen if after[name] != before[name]]:
        table = format_differences("model", changed, before, after)
        raise UserError(
            f"Cannot change the shape of an initial checkpoint:\n{table}",
            f"Leave out {', '.join(changed)}, or leave out init_from.",
        )
    settings = inherited | user_settings | {"tokenizer": init_checkpoint.tokenizer.kind}
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


def lower_learning_rates(
    config: Config, user_settings: dict[str, Any], choices: list[ChosenSetting]
) -> list[ChosenSetting]:
    """Return the chosen settings with lower learning rates, where the user gave none."""
    training = config.training
    usual_rates = {"learning_rate": training.learning_rate}
    if training.optimizer == "muon":
        usual_rates["muon_learning_rate"] = training.muon_learning_rate
    reason = "1/4 of the usual rate for an initial checkpoint"
    lower_rates = [
        ChosenSetting(name, float(f"{FINETUNE_LR_RATIO * rate:.2g}"), reason)
        for name, rate in usual_rates.items()
        if name not in user_settings
    ]
    return [choice for choice in choices if choice.name not in usual_rates] + lower_rates
