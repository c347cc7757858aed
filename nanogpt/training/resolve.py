"""Resolve a run before its model is built: settings, prepared text and machine, with reasons."""

import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import (
    Config,
    TrainDeviceConfig,
    TrainingConfig,
    flatten,
    format_differences,
    read_toml,
    resolve,
)
from nanogpt.data.prepare import PreparedData, absolute_paths
from nanogpt.device import autotune, device, measurements, memory
from nanogpt.device.device import Machine
from nanogpt.distributed.context import DistContext
from nanogpt.errors import Notice, UserError
from nanogpt.plan.communication import ASSUMED_MFU
from nanogpt.plan.model_size import flops_per_token
from nanogpt.presets import preset_settings
from nanogpt.training import finetune, recipe
from nanogpt.training.recipe import ChosenSetting
from nanogpt.training.run_data import load_run_data, prepare_run_data

DEFAULT_MINUTES = 5.0
# Settings that end a run.
STOP_SETTINGS = ("steps", "minutes")
# Settings that may change on resume.
RESUMABLE_SETTINGS = {
    *STOP_SETTINGS,
    "eval_every",
    "patience",
    "micro_batch_size",
    "activation_checkpointing",
} | TrainDeviceConfig.model_fields.keys()


def merge_settings(
    settings: dict[str, Any],
    config: str | os.PathLike[str] | None,
    preset: str | None,
    resuming: bool,
) -> dict[str, Any]:
    """Merge settings by name, over those of a TOML file, over those of a preset.

    A stop setting in `settings` replaces both stop settings of the file and the preset.
    Without any stop setting, preset or file, a new run takes DEFAULT_MINUTES.
    """
    file = read_toml(Path(config)) if config else {}
    merged = preset_settings(preset, (file | settings).get("arch")) | file
    if _has_stop_setting(settings):
        merged = _without_stop_settings(merged)
    merged |= settings
    if not (resuming or preset or config or _has_stop_setting(merged)):
        merged["minutes"] = DEFAULT_MINUTES
    return merged | absolute_paths(merged)


def _has_stop_setting(settings: dict[str, Any]) -> bool:
    return any(settings.get(name) is not None for name in STOP_SETTINGS)


def _without_stop_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in STOP_SETTINGS}


def resolve_run(
    run: Path,
    sources: Sequence[str],
    user_settings: dict[str, Any],
    resuming: bool,
    start_time: float | None,
    init_checkpoint: checkpoint.LoadedModel | None,
    context: DistContext,
) -> tuple[Config, PreparedData, Machine, list[ChosenSetting]]:
    """Decide everything that building a model needs.

    Args:
        run: The run folder.
        sources: Names of the training texts.
        user_settings: The merged settings of the user.
        resuming: True if the run continues from a saved state.
        start_time: `time.monotonic()` at which the time budget started; None turns the recipe off.
        init_checkpoint: The model that a new run starts from, if any.
        context: The processes of the run.

    Returns:
        The complete configuration, the prepared text, the machine, and the settings that were
        chosen automatically.

    Raises:
        UserError: If settings contradict each other, the text, the machine or the saved run.
    """
    if resuming:
        user_settings = _merge_saved_settings(run, user_settings)
    requested = user_settings
    if init_checkpoint is not None:
        user_settings = finetune.inherit_settings(user_settings, init_checkpoint.model.config)
        user_settings["tokenizer"] = init_checkpoint.tokenizer.kind
    has_time_budget = user_settings.get("minutes") is not None
    uses_recipe = start_time is not None and has_time_budget and not resuming
    config = resolve(user_settings, complete=not uses_recipe)
    if resuming:
        _check_steps_left(run, config.training.steps)
        prepared = load_run_data(run, config, sources)
    else:
        prepared = prepare_run_data(sources, config, init_checkpoint)
    if prepared.metadata["sources"] == [prepared.metadata["cache_dir"]]:
        # A folder of prepared tokens keeps the settings that it was prepared with.
        data_config = dict(prepared.metadata["data_config"])
        data_config.pop("cross_documents", None)
        user_settings = user_settings | data_config
        config = resolve(user_settings, complete=not uses_recipe)

    local_rank = context.local_rank if context.world_size > 1 else None
    machine = device.select_device(config.device, local_rank, context.local_world_size)
    choices: list[ChosenSetting] = []
    if start_time is not None and uses_recipe:
        seconds_left = 60 * user_settings["minutes"] - (time.monotonic() - start_time)
        choices = _recipe_choices(seconds_left, prepared, machine, user_settings, context)
        config = resolve(user_settings | {choice.name: choice.value for choice in choices})
    if init_checkpoint is not None:
        rates = finetune.finetune_lrs(config, user_settings)
        changes = {choice.name: choice.value for choice in rates}
        config = resolve(flatten(config) | changes)
        choices = [choice for choice in choices if choice.name not in changes] + rates
    config = clamp_context(config, requested, len(prepared.train))
    machine, measured = _autotune(config, prepared, machine, context.world_size)
    if not config.data.cross_documents:
        prepared = prepared.with_document_windows(config.model.context_length)
    config = config.model_copy(update={"device": machine.to_config()})
    return config, prepared, machine, choices + measured


def memory_decisions(
    requested: TrainingConfig, adjusted: TrainingConfig, free_bytes: float | None, batch_size: int
) -> list[ChosenSetting]:
    """Return the settings that were chosen because a full batch does not fit into memory.

    Args:
        requested: The training settings before they were adjusted to memory.
        adjusted: The training settings after it.
        free_bytes: Free memory, if known.
        batch_size: Sequences per step on this rank.
    """
    free_gb = (free_bytes or 0) / 1e9
    reason = f"{batch_size} sequences at once need more than the {free_gb:.2g} GB that are free"
    choices = []
    if requested.micro_batch_size is None and adjusted.micro_batch_size != batch_size:
        choices.append(ChosenSetting("micro_batch_size", adjusted.micro_batch_size, reason))
    if requested.activation_checkpointing is None and adjusted.activation_checkpointing:
        choices.append(ChosenSetting("activation_checkpointing", True, reason))
    return choices


def check_resumable(saved: dict[str, Any], user_settings: dict[str, Any]) -> None:
    """Check that the user's settings change only what may change on resume.

    Raises:
        UserError: With a table of the settings that differ and must not.
    """
    before = flatten(resolve(saved, complete=False))
    requested = flatten(resolve(saved | user_settings, complete=False))
    changed = [
        name
        for name in user_settings
        if requested[name] != before[name] and name not in RESUMABLE_SETTINGS
    ]
    if changed:
        table = format_differences("saved", changed, before, requested)
        raise UserError(
            f"These settings cannot change when resuming:\n{table}",
            "Leave them out, or train in another folder. These may change: "
            f"{', '.join(sorted(RESUMABLE_SETTINGS))}.",
        )


def clamp_context(config: Config, user_settings: dict[str, Any], train_tokens: int) -> Config:
    """Shorten the context for a short text, unless the user chose the context.

    Raises:
        UserError: If the chosen context is not shorter than the training split.
    """
    context_length = config.model.context_length
    max_length = max(1, train_tokens // 4)
    is_chosen = "context_length" in user_settings
    if is_chosen and context_length >= train_tokens:
        raise UserError(
            f"The context is too long for the text: {context_length} tokens "
            f"(limit {train_tokens - 1}, from {train_tokens:,} training tokens).",
            {"context_length": max_length},
        )
    if is_chosen or context_length <= train_tokens // 4:
        return config
    warnings.warn(
        f"The text is short ({train_tokens:,} training tokens): context_length is {max_length} "
        f"instead of {context_length}.",
        Notice,
        stacklevel=2,
    )
    model = config.model.model_copy(update={"context_length": max_length})
    return config.model_copy(update={"model": model})


def _merge_saved_settings(run: Path, user_settings: dict[str, Any]) -> dict[str, Any]:
    saved = read_toml(run / "config.toml")
    if _has_stop_setting(user_settings):
        saved = _without_stop_settings(saved)
    check_resumable(saved, user_settings)
    return saved | user_settings


def _check_steps_left(run: Path, steps: int | None) -> None:
    step = checkpoint.latest_step(run) or 0
    if steps is not None and step > steps:
        raise UserError(
            f"The run in {run} is past its last step: {step:,} (limit steps = {steps:,}).",
            {"steps": 2 * step},
        )


def _recipe_choices(
    seconds_left: float,
    prepared: PreparedData,
    machine: Machine,
    user_settings: dict[str, Any],
    context: DistContext,
) -> list[ChosenSetting]:
    with memory.explain_oom("a model of these settings"):
        return recipe.choose_settings(
            seconds_left,
            len(prepared.train),
            prepared.tokenizer.vocab_size,
            machine,
            user_settings,
            context.world_size,
        )


def _autotune(
    config: Config, prepared: PreparedData, machine: Machine, world_size: int
) -> tuple[Machine, list[ChosenSetting]]:
    """Choose how a training step runs, and return the measurements as reasons."""
    seconds = _estimate_seconds(config, prepared.tokenizer.vocab_size, machine, world_size)
    machine, reasons = autotune.autotune_for_training(
        machine, config.device, config.model, config.training.batch_size, seconds
    )
    values = machine.to_config()
    return machine, [
        ChosenSetting(name, getattr(values, name), reason) for name, reason in reasons.items()
    ]


def _estimate_seconds(config: Config, vocab_size: int, machine: Machine, world_size: int) -> float:
    """Estimate how long the run takes: its time budget, or less where its steps end sooner."""
    training = config.training
    budget = math.inf if training.minutes is None else 60 * training.minutes
    if training.steps is None:
        return budget
    tokens = training.steps * training.batch_size * config.model.context_length / world_size
    flops = tokens * flops_per_token(config.model, vocab_size)
    peak = measurements.peak_flops(machine.device, machine.dtype)
    return min(budget, flops / (ASSUMED_MFU * peak))
