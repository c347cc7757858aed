"""Training: one step, and the loop around it.

In: a model, an optimiser, tokens and the settings of a run. Out: events, one after another; files in the run folder at every
evaluation, and when it is asked to stop. The loop waits for whoever consumes the events, so each is logged before the next save.
Refuses: to go on after a loss that is not a number, or without memory.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanogpt import checkpoint, data, generate
from nanogpt.config import SamplingConfig, TrainingConfig
from nanogpt.errors import UserError
from nanogpt.evaluate import Loss, Point, evaluate, verdict
from nanogpt.machine import Machine, memory_for
from nanogpt.model import GPT
from nanogpt.optim import schedule
from nanogpt.prepare import Prepared
from nanogpt.report import Evaluated, Event, Finished, Interrupted, Sampled, Saved, Saving, Stepped

SAVE_SECONDS = 300.0  # at most so long between two saves, also where evaluations are further apart
LONGEST_WARMUP = 0.1  # of the run: a shorter run than the settings had in mind is not to end before its rate has risen
SAMPLE = SamplingConfig(max_tokens=200)
EVALUATION_SHARE, EVALUATIONS_SHARE = 0.02, 0.1  # of the run's arithmetic may go into one evaluation, and into all,
FEWEST_TOKENS = 8192  # except that fewer tokens tell nothing


@dataclass
class Position:
    """How far a run has come: with the weights and the optimiser's state, all that it takes to go on."""

    step: int = 0
    seconds: float = 0.0
    nats: float = 0.0  # training loss since the last evaluation, as a sum
    tokens: int = 0  # and a count
    val_tokens: int | None = None  # that an evaluation during the run takes, None for all: always the same, or "best" would mean nothing
    history: list[Point] = field(default_factory=list)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Position":
        """The position that was saved as JSON."""
        return cls(**{**saved, "history": [Point(**point) for point in saved["history"]]})

    @property
    def best(self) -> Point | None:
        """The evaluation with the lowest validation loss; None before the first."""
        return min(self.history, key=lambda point: point.val_loss, default=None)


class Trainer:
    """A run in progress. `events()` carries it to its end from wherever `position` stands."""

    def __init__(
        self, model: GPT, optimizer: torch.optim.Optimizer, text: Prepared, settings: TrainingConfig,
        machine: Machine, run: Path, position: Position, asked_to_stop: Callable[[], bool],
    ):  # fmt: skip
        self.model, self.optimizer, self.text, self.settings = model, optimizer, text, settings
        self.machine, self.run, self.position, self.asked_to_stop = machine, run, position, asked_to_stop
        self.saved_at = time.monotonic()
        if position.step == 0:
            position.val_tokens = self.limit()

    def events(self) -> Iterator[Event]:
        """Train to the last step; evaluate, sample and save on the way; finish with the whole validation split.

        Errors: `UserError` when the loss is not a number, or memory or the disk is full; the last save stays.
        """
        settings, position = self.settings, self.position
        while position.step < settings.steps and not self.out_of_patience():
            with memory_for(f"a step of {settings.batch_size} windows of {self.model.config.context_length} tokens"):
                stepped = self.step()
            yield stepped
            due = position.step % settings.eval_every == 0 or position.step == settings.steps
            if due:
                yield self.evaluate()
                yield self.sample()
            stop = self.asked_to_stop()
            if due or stop or time.monotonic() - self.saved_at > SAVE_SECONDS:
                yield Saving(position.step)
                yield self.save()
            if stop and position.step < settings.steps:
                yield Interrupted(position.step)
                return
        yield self.finish()

    def step(self) -> Stepped:
        """One update of the weights, on the batch that belongs to this step."""
        begin = time.perf_counter()
        settings, position, device = self.settings, self.position, self.machine.device
        rows = range(settings.batch_size)
        batch = data.batch(self.text.train, settings.seed, position.step, rows, self.model.config.context_length)
        x, y, keys = (part.to(device) for part in batch)  # (B, T), (B, T), (B,)
        with self.machine.autocast():
            nats = self.model.nats(x, y, keys)
        loss = nats / y.numel()
        loss.backward()
        limit = settings.grad_clip or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        warmup = min(settings.warmup_steps / settings.steps, LONGEST_WARMUP)
        rate = settings.learning_rate * schedule((position.step + 1) / settings.steps, warmup)
        if not (math.isfinite(loss.item()) and math.isfinite(grad_norm)):
            raise self._not_a_number(loss.item(), rate, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        position.step += 1
        position.nats += nats.item()
        position.tokens += y.numel()
        seconds = time.perf_counter() - begin
        position.seconds += seconds
        return Stepped(position.step, loss.item(), rate, grad_norm, y.numel(), y.numel() / seconds, position.seconds)

    def evaluate(self) -> Evaluated:
        """Measure the validation loss; keep the model if it is the best so far."""
        begin = time.perf_counter()
        position = self.position
        loss = self.validation_loss(self.model, position.val_tokens)
        if not math.isfinite(loss.nats):
            raise self._not_a_number(loss.val_loss, self.settings.learning_rate, math.nan)
        point = Point(position.step, position.nats / position.tokens, loss.val_loss)
        best = position.best is None or point.val_loss < position.best.val_loss
        position.history.append(point)
        position.nats, position.tokens = 0.0, 0
        if best:
            checkpoint.save_model(self.run / "model.safetensors", self.model, self.text.tokenizer, self.summary(loss))
        position.seconds += time.perf_counter() - begin
        return Evaluated(point.step, point.train_loss, loss.val_loss, loss.bits_per_byte, loss.tokens, best, position.seconds)

    def sample(self) -> Sampled:
        """A few words of the model as it is now, always from the same random numbers."""
        unused = self.text.about["unused"]
        prompt = generate.encode_prompt(self.text.tokenizer, None, unused, self.model.config.context_length)
        ids = generate.tokens(self.model, prompt, SAMPLE, self.settings.seed, self.machine, unused)
        return Sampled(self.position.step, "".join(generate.text(self.text.tokenizer, ids)))

    def save(self) -> Saved:
        """Write all that it takes to go on from here; before the first evaluation, also the model, so that one can look at it."""
        if self.position.best is None:
            checkpoint.save_model(self.run / "model.safetensors", self.model, self.text.tokenizer, self.summary(None))
        checkpoint.save_state(self.run, self.position.step, self.model, self.optimizer, asdict(self.position))
        self.saved_at = time.monotonic()
        return Saved(self.position.step)

    def finish(self) -> Finished:
        """Measure the best model, which is the one that stays, on the whole split, and write the result into its file."""
        kept = checkpoint.load(self.run, self.machine.device)
        loss = self.validation_loss(kept.model, None)
        judged = verdict(self.position.history, self.text.about["baselines"], loss.val_loss)
        summary = kept.summary | self.summary(loss) | {"step": kept.summary["step"], "verdict": judged.asdict()}
        checkpoint.save_model(self.run / "model.safetensors", kept.model, self.text.tokenizer, summary)
        return Finished(self.position.step, kept.summary["step"], loss, self.text.about["baselines"], judged, self.position.seconds)

    def summary(self, loss: Loss | None) -> dict[str, Any]:
        """What a model file tells of its training, besides weights, settings and tokenizer; without a loss, before the first evaluation, less."""
        about = self.text.about
        summary = {"step": self.position.step, "text": about["fingerprint"], "baselines": about["baselines"], "unused": about["unused"]}
        if loss is not None:
            summary |= {"val_loss": loss.val_loss, "bits_per_byte": loss.bits_per_byte, "val_tokens": loss.tokens}
            summary["verdict"] = verdict(self.position.history, about["baselines"]).asdict()
        return summary

    def validation_loss(self, model: GPT, limit: int | None) -> Loss:
        """The loss of a model on the validation split, or on `limit` tokens of it."""
        return evaluate(model, self.text.val, self.text.about["val_bytes"], self.machine, limit=limit)

    def limit(self) -> int | None:
        """How many validation tokens an evaluation during the run may take, None for all; an update costs three forward passes."""
        settings = self.settings
        share = min(EVALUATION_SHARE, EVALUATIONS_SHARE / math.ceil(settings.steps / settings.eval_every))
        tokens = 3 * share * settings.steps * settings.batch_size * self.model.config.context_length
        return max(int(tokens), FEWEST_TOKENS) if tokens < len(self.text.val) else None

    def out_of_patience(self) -> bool:
        """Whether as many evaluations as `patience` allows have passed since the best one."""
        best = self.position.best
        return best is not None and self.settings.patience > 0 and sum(p.step > best.step for p in self.position.history) >= self.settings.patience

    def _not_a_number(self, loss: float, rate: float, grad_norm: float) -> UserError:
        saved = checkpoint.latest_step(self.run)
        kept = f"The last good state, step {saved:,}, is in {self.run}" if saved else "Nothing had been saved yet"
        return UserError(
            f"The loss is no longer a number: {loss} in step {self.position.step + 1:,}, at learning rate {rate:.2g}, gradient norm {grad_norm:.3g}. {kept}.",
            f"Train anew with a lower learning rate: --learning-rate {self.settings.learning_rate / 10:.2g} --out ANOTHER_FOLDER",
        )
