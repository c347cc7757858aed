"""What is settled before a model is built: the settings, the text and the machine of a run, and why.

In: the settings that somebody gave, and where the text lies. Out: a whole `Config`, a `Prepared`, a `Machine` and reasons.
Refuses: in a run that goes on, settings that would make another run of it; a context as long as the text.
"""

import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanogpt import checkpoint, finetune, machine, recipe
from nanogpt.config import Config, MachineConfig, TrainingConfig, differing, flatten, preset_settings, read_toml, resolve
from nanogpt.errors import Notice, UserError
from nanogpt.library.text import new_text, text_of
from nanogpt.plan import SHARE, flops_per_token
from nanogpt.prepare import Prepared, findable_paths
from nanogpt.recipe import Choice

DEFAULT_MINUTES = 5.0
ENDS = ("steps", "minutes")  # the settings of which one ends a run
MAY_CHANGE = {
    *ENDS,
    "eval_every",
    "patience",
    "micro_batch_size",
    "checkpoint_activations",
} | MachineConfig.model_fields.keys()  # when a run goes on; all else would make it another run


def chosen_settings(settings: dict[str, Any], config: str | os.PathLike[str] | None, preset: str | None, resuming: bool) -> dict[str, Any]:
    """The settings that somebody chose, by name: of the preset, over it those of the TOML file, over it the others. What ends the run is one of them."""
    given = preset_settings(preset) | (read_toml(Path(config)) if config else {})
    if _ends(settings):  # what ends the run here replaces what ends it in the file
        given = {name: value for name, value in given.items() if name not in ENDS}
    given |= settings
    if not (resuming or preset or config or _ends(given)):
        given["minutes"] = DEFAULT_MINUTES
    return given | findable_paths(given)


def _ends(settings: dict[str, Any]) -> bool:
    return any(settings.get(name) is not None for name in ENDS)


def settle(
    run: Path, sources: Sequence[str], given: dict[str, Any], resuming: bool, begun: float | None, earlier: checkpoint.Parts | None, ranks: machine.Ranks
) -> tuple[Config, Prepared, machine.Machine, list[Choice]]:
    """Everything that is decided before a model is built: settings, text and machine, and why. With `begun` the recipe has a say in a new run by the clock."""
    if resuming:
        saved = read_toml(run / "config.toml")
        if _ends(given):
            saved = {name: value for name, value in saved.items() if name not in ENDS}
        _require_unchanged(saved, given)
        given = saved | given
    asked = given
    if earlier is not None:
        given = finetune.continuing(given, earlier.model.config) | {"tokenizer": earlier.tokenizer.kind}
    recipe_follows = begun is not None and given.get("minutes") is not None and not resuming
    settled = resolve(given, complete=not recipe_follows)
    steps = settled.training.steps
    if resuming and steps is not None and (checkpoint.latest_step(run) or 0) > steps:
        raise UserError(f"The run in {run} is at step {checkpoint.latest_step(run):,} already, past --steps {steps}.", "Give it more steps.")
    prepared = text_of(run, settled, sources) if resuming else new_text(sources, settled, earlier)
    if prepared.about["sources"] == [prepared.about["folder"]]:  # the settings of a text that was prepared before are those it was prepared with
        given = given | {name: value for name, value in prepared.about["text"].items() if name != "cross_documents"}
        settled = resolve(given, complete=not recipe_follows)
    place = machine.choose(settled.machine, ranks)
    choices: list[Choice] = []
    if begun is not None and recipe_follows:
        left = 60 * given["minutes"] - (time.monotonic() - begun)
        with machine.memory_for("a model of these settings"):
            choices = recipe.choose(left, len(prepared.train), prepared.tokenizer.vocab_size, place, given, ranks.size)
        settled = resolve(given | {choice.name: choice.value for choice in choices})
    if earlier is not None:
        gentler = finetune.gentler(settled, given)
        settled = resolve(flatten(settled) | {choice.name: choice.value for choice in gentler})
        choices = [choice for choice in choices if choice.name not in {other.name for other in gentler}] + gentler
    settled = _fit_context(settled, asked, len(prepared.train))
    seconds = _expected_seconds(settled, prepared, place, ranks.size)
    place, reasons = machine.for_training(place, settled.machine, settled.model, settled.training.batch_size, seconds)
    choices += [Choice(name, getattr(place.settings(), name), reason) for name, reason in reasons.items()]
    if not settled.text.cross_documents:
        prepared = prepared.within_documents(settled.model.context_length)
    return settled.model_copy(update={"machine": place.settings()}), prepared, place, choices


def smaller(asked: TrainingConfig, chosen: TrainingConfig, free: float | None, rows: int) -> list[Choice]:
    """What was chosen because memory does not suffice for a whole batch at once, or for the `rows` of it that a process has."""
    reason = f"all {rows} windows at once would take more than the {(free or 0) / 1e9:.2g} GB that are free"
    found = []
    if asked.micro_batch_size is None and chosen.micro_batch_size != rows:
        found.append(Choice("micro_batch_size", chosen.micro_batch_size, reason))
    if asked.checkpoint_activations is None and chosen.checkpoint_activations:
        found.append(Choice("checkpoint_activations", True, reason))
    return found


def _expected_seconds(settled: Config, prepared: Prepared, place: machine.Machine, processes: int) -> float:
    """How long the run will take, as far as one can say before it: its minutes, or less where its steps, shared among the processes, end sooner."""
    minutes, steps = settled.training.minutes, settled.training.steps
    in_time = math.inf if minutes is None else 60 * minutes
    if steps is None:
        return in_time
    tokens = steps * settled.training.batch_size * settled.model.context_length / processes
    return min(in_time, tokens * flops_per_token(settled.model, prepared.tokenizer.vocab_size) / (SHARE * machine.peak(place.device, place.dtype)))


def _require_unchanged(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Errors: `UserError` with a table of what was asked to change and cannot in a run that goes on."""
    before, asked = flatten(resolve(saved, complete=False)), flatten(resolve(saved | given, complete=False))
    changed = [name for name in given if asked[name] != before[name] and name not in MAY_CHANGE]
    if changed:
        table = differing(("setting", "saved", "asked"), changed, before, asked)
        raise UserError(
            f"A run that goes on keeps its settings, or it would be another run:\n{table}",
            f"Leave them out, or train anew with --out FOLDER. What may change: {', '.join(sorted(MAY_CHANGE))}.",
        )


def _fit_context(settled: Config, given: dict[str, Any], tokens: int) -> Config:
    """A short text gets a shorter context, so that there are different windows to learn from; one that was asked for stays if it can."""
    asked = settled.model.context_length
    if "context_length" in given and asked >= tokens:
        raise UserError(
            f"A context of {asked} tokens needs a longer text: there are {tokens:,} to train on, so it can be {tokens - 1} at most.",
            f"Use --context-length {max(1, tokens // 4)}, or leave it out.",
        )
    if "context_length" in given or asked <= tokens // 4:
        return settled
    fitting = max(1, tokens // 4)
    warnings.warn(f"The text is short ({tokens:,} tokens to train on): the context is {fitting} tokens instead of {asked}.", Notice, stacklevel=2)
    return settled.model_copy(update={"model": settled.model.model_copy(update={"context_length": fitting})})
