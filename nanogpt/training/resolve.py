"""Resolve a run before its model is built: settings, prepared text and machine, with reasons."""

import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanogpt import __version__, checkpoint
from nanogpt.config import (
    Config,
    TrainDeviceConfig,
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
from nanogpt.training.run_data import fixed_settings, load_run_data, prepare_run_data

DEFAULT_MINUTES = 5.0
# Settings that end a run.
STOP_SETTINGS = ("steps", "minutes")
# Settings that may change on resume.
RESUMABLE_SETTINGS = {*STOP_SETTINGS, "eval_every", "patience", *TrainDeviceConfig.model_fields}
RESUMABLE_SETTINGS |= {"micro_batch_size", "activation_checkpointing"}


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of `nanogpt.train`, as plain values.

    `start_time` is the `time.monotonic()` at which the time budget starts. Without a run folder
    `out`, only the trained model is kept.
    """

    sources: list[str]
    out: Path | None
    settings: dict[str, Any]
    config: str | os.PathLike[str] | None
    preset: str | None
    init_from: str | None
    resume: bool
    overwrite: bool
    start_time: float

    def validate(self) -> None:
        """Check that the arguments do not contradict each other.

        Raises:
            UserError: If they do.
        """
        if self.resume and self.out is None:
            raise UserError("There is no run to resume.", "Name its folder in out.")
        if self.resume and self.overwrite:
            raise UserError(
                "A run cannot be resumed and overwritten at the same time.",
                "Leave out resume or overwrite.",
            )

    def merged_settings(self, resuming: bool) -> dict[str, Any]:
        """Return `settings` by name, over those of the TOML file, over those of the preset.

        A stop setting in `settings` replaces both stop settings of the file and the preset.
        Without any stop setting, preset or file, a new run takes DEFAULT_MINUTES.
        """
        file = read_toml(Path(self.config)) if self.config else {}
        preset = preset_settings(self.preset, (file | self.settings).get("arch"))
        merged = _override(preset | file, self.settings)
        if not (resuming or self.preset or self.config or _has_stop_setting(merged)):
            merged["minutes"] = DEFAULT_MINUTES
        return merged | absolute_paths(merged)

    def cross_rank_fingerprint(self) -> dict[str, Any]:
        """Return versions and arguments, which must be equal on all ranks."""
        arguments = {
            "text": self.sources,
            "init_from": self.init_from,
            "resume": self.resume,
            "overwrite": self.overwrite,
        }
        values = self.merged_settings(resuming=True) | arguments
        versions = {"nanogpt": __version__, "torch": torch.__version__}
        return versions | {name: str(value) for name, value in values.items()}


def _has_stop_setting(settings: dict[str, Any]) -> bool:
    return any(settings.get(name) is not None for name in STOP_SETTINGS)


def _override(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with changes; a stop setting in `changes` replaces both stop settings."""
    if _has_stop_setting(changes):
        settings = {name: value for name, value in settings.items() if name not in STOP_SETTINGS}
    return settings | changes


def resolve_run(
    run: Path,
    request: TrainRequest,
    user_settings: dict[str, Any],
    resuming: bool,
    init_checkpoint: checkpoint.LoadedModel | None,
    context: DistContext,
) -> tuple[Config, PreparedData, Machine, list[ChosenSetting]]:
    """Decide everything that building a model needs.

    Args:
        run: The run folder.
        request: What to train on; a preset turns the recipe off.
        user_settings: The merged settings of the request.
        resuming: True if the run continues from a saved state.
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
        user_settings = finetune.inherit_settings(user_settings, init_checkpoint)
    has_time_limit = user_settings.get("minutes") is not None
    uses_recipe = has_time_limit and request.preset is None and not resuming
    config = resolve(user_settings, complete=not uses_recipe)
    if resuming:
        prepared = load_run_data(run, config, request.sources)
    else:
        prepared = prepare_run_data(request.sources, config, init_checkpoint)
    user_settings = user_settings | fixed_settings(prepared)
    config = resolve(user_settings, complete=not uses_recipe)

    local_rank = context.local_rank if context.world_size > 1 else None
    machine = device.select_device(config.device, local_rank, context.local_world_size)
    choices: list[ChosenSetting] = []
    if uses_recipe:
        seconds_left = 60 * user_settings["minutes"] - (time.monotonic() - request.start_time)
        num_tokens, vocab_size = len(prepared.train), prepared.tokenizer.vocab_size
        with memory.explain_oom("a model of these settings"):
            choices = recipe.choose_settings(
                seconds_left, num_tokens, vocab_size, machine, user_settings, context.world_size
            )
        config = resolve(user_settings | {choice.name: choice.value for choice in choices})
    if init_checkpoint is not None:
        choices = finetune.lower_learning_rates(config, user_settings, choices)
        config = resolve(user_settings | {choice.name: choice.value for choice in choices})
    config = clamp_context(config, requested, len(prepared.train))
    machine, measured = _autotune(config, prepared, machine, context.world_size)
    if not config.data.cross_documents:
        prepared = prepared.with_document_windows(config.model.context_length)
    config = config.model_copy(update={"device": machine.to_config()})
    return config, prepared, machine, choices + measured


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
    """Return the saved settings of a run, with those that the user changes on resume.

    Raises:
        UserError: With a table of the settings that must not change, or if no step is left.
    """
    saved = read_toml(run / "config.toml")
    merged = _override(saved, user_settings)
    before, after = (flatten(resolve(settings, complete=False)) for settings in (saved, merged))
    fixed = [name for name in user_settings if name not in RESUMABLE_SETTINGS]
    if changed := [name for name in fixed if after[name] != before[name]]:
        table = format_differences("saved", changed, before, after)
        raise UserError(
            f"These settings cannot change when resuming:\n{table}",
            "Leave them out, or train in another folder. These may change: "
            f"{', '.join(sorted(RESUMABLE_SETTINGS))}.",
        )
    step, steps = checkpoint.latest_step(run) or 0, after["steps"]
    if steps is not None and step > steps:
        raise UserError(
            f"The run in {run} is past its last step: {step:,} (limit steps = {steps:,}).",
            {"steps": 2 * step},
        )
    return merged


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
