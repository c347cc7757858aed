"""Training: one step, and the loop around it.

In: a model, an optimiser, tokens and the settings of a run. Out: events, one after another; files in the run folder at every
evaluation, and when it is asked to stop. The loop waits for whoever consumes the events, so each is logged before the next save.
Refuses: to go on after a loss that is not a number, or without memory.
"""

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint, data, generate, machine
from nanogpt.config import SamplingConfig, TrainingConfig, read_toml, resolve, to_toml
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import Loss, Point, evaluate, verdict
from nanogpt.files import write_text
from nanogpt.machine import Machine, Ranks, memory_for
from nanogpt.model import GPT
from nanogpt.optim import Optimizer, schedule
from nanogpt.prepare import Prepared
from nanogpt.report import Began, Evaluated, Event, Finished, Interrupted, Paced, Sampled, Saved, Saving, Stepped
from nanogpt.trainer.building import build, fitted
from nanogpt.trainer.position import Position

__all__ = ["Position", "Trainer", "build", "fitted"]

SAVE_SECONDS = 300.0  # at most so long between two saves, also where evaluations are further apart
LONGEST_WARMUP = 0.1  # of the run: a shorter run than the settings had in mind is not to end before its rate has risen
ROOM = 1.4  # what a run by the clock keeps for its end, as a multiple of what that seems to take,
LEAVING, COMPILER_LEAVING = 0.9, 1.1  # and seconds for a process to begin and to end; more where the compiler's helpers have to end too
SAMPLE = SamplingConfig(max_tokens=200)
EVALUATION_SHARE, EVALUATIONS_SHARE = 0.02, 0.04  # of the run's arithmetic may go into one evaluation, and into all,
FEWEST_TOKENS = 8192  # except that fewer tokens tell nothing
STRAGGLING = 1.5  # times the usual time of a process for its part of a step: it holds up all others


class Trainer:
    """A run in progress. `events()` carries it to its end from wherever `position` stands."""

    def __init__(
        self, model: GPT, optimizer: Optimizer, text: Prepared, settings: TrainingConfig,
        place: Machine, run: Path, position: Position, asked_to_stop: Callable[[], bool], begun: float, ranks: Ranks = Ranks(),
    ):  # fmt: skip
        """Each of the `ranks` computes its rows of every batch; all give the same events. `begun`, by `time.monotonic`, is when the minutes of a run by the
        clock, or of this part of it, began to count."""
        self.model, self.optimizer, self.text, self.settings = model, optimizer, text, settings
        self.machine, self.run, self.position, self.asked_to_stop, self.begun = place, run, position, asked_to_stop, begun
        self.ranks, self.rows = ranks, ranks.rows(settings.batch_size)
        self.nats = machine.compiled(place, model, model.nats) if place.compile else model.nats
        self.loss, self.waiting, self.alone = machine.spread(model, lambda *inputs: self.nats(*inputs), ranks)
        self.step_seconds = 0.0
        self.budget = math.inf  # seconds for training, of a run by the clock, once all else is taken off
        self.saved_at = time.monotonic()
        self.saving: tuple[int, Future[None] | None] | None = None  # the step of the last save, until it is known to be written
        self.began = self.saved_at - position.seconds
        self.busy, self.busy_steps = 0.0, 0  # seconds of this process's own, without waiting for others, in so many steps

    def events(self) -> Iterator[Event]:
        """Train to the end; evaluate, sample and save on the way; finish with the whole validation split.

        Errors: `UserError` when the loss is not a number, or memory or the disk is full; the last save stays.
        """
        settings, position = self.settings, self.position
        smallest = f"one window of {self.model.config.context_length:,} tokens at a time"
        done = position.step > 0 and (position.step >= (settings.steps or math.inf) or self.out_of_patience())
        if not done:
            with memory_for(smallest):
                self.get_ready()
            (done,) = self.ranks.any(position.step > 0 and self.over())
        if "init_from" in self.text.about and position.before is None:
            yield self.measure_first()
        while not done:
            with memory_for(smallest):
                stepped = self.step()
            yield stepped
            (over,) = self.ranks.any(self.over())
            due = over or position.step % settings.eval_every == 0
            if due:
                yield self.evaluate()
                if self.ranks.size > 1:
                    yield self.pace()
                yield self.sample()
            stop, late = self.ranks.any(self.asked_to_stop(), time.monotonic() - self.saved_at > SAVE_SECONDS)
            done = over or self.out_of_patience()
            if due or stop or late:
                yield Saving(position.step)
                yield from self.save()
            if stop and not done:
                yield from self.saved()
                yield Interrupted(position.step)
                return
        yield from self.saved()
        yield self.finish()

    def get_ready(self) -> None:
        """Compile, and see how long a step and an evaluation take, as far as the run needs to know; nothing of it changes the weights."""
        position, minutes = self.position, self.settings.minutes
        self.upcoming = self.batch(position.step)
        if self.machine.compile:
            self.compile()
        if minutes is not None:
            (self.step_seconds,) = self.ranks.numbers_of_first(min(self.try_step() for _ in range(2)))
            self.budget = 60 * minutes - position.overhead - (time.monotonic() - self.begun)
        if not position.expected_steps:
            in_time = self.budget / self.step_seconds if minutes is not None else math.inf
            (position.expected_steps,) = self.ranks.numbers_of_first(max(1.0, min(self.settings.steps or math.inf, in_time)))
            position.val_tokens = self.limit()
        if minutes is not None:
            finishing = self.finishing_seconds()
            position.overhead += time.monotonic() - self.begun
            self.budget = 60 * minutes - position.overhead - finishing
            if self.ranks.is_first and position.seconds + self.step_seconds >= self.budget:
                training = "is left for training but one step" if position.step == 0 else "is left for training"
                enough = (position.overhead + finishing + position.seconds) / 30
                warnings.warn(
                    f"Of {minutes:g} minutes, {position.overhead:.0f} s went into reading, measuring and compiling, and the end takes {finishing:.0f} s: "
                    f"nothing {training}. Use --minutes {enough:.2g} or more.", Notice, stacklevel=2
                )  # fmt: skip
        if not self.ranks.is_first:  # the clock of the first counts
            self.budget = math.inf
        self.began = time.monotonic() - position.seconds

    def compile(self) -> None:
        """Run a first step, which compiles, and once on each machine see what that gains; without success go on without the compiler, and say so."""
        model, rows = self.model.config, self.settings.batch_size
        begin, failure = time.perf_counter(), ""
        try:
            self.try_step(alone=True)
        except Exception as error:  # whatever a compiler can come upon
            if machine.out_of_memory(error):
                raise
            failure = str(error)
        if self.ranks.any(failure != "")[0]:
            why = " ".join(failure.split("\n")[:2]).strip()[:200] or "in another process"
            warnings.warn(f"torch.compile failed, so this run goes on without it, more slowly ({why}).", Notice, stacklevel=2)
            self.model.zero_grad(set_to_none=True)
            self.nats = machine.uncompiled(self.model.nats)
            machine.note_failure(self.machine, model)
            return
        machine.note_compiling(self.machine, model, rows, time.perf_counter() - begin, self.gain)

    def gain(self) -> float:
        """How many times as fast a step has become by compiling."""
        compiled = min(self.try_step(alone=True) for _ in range(2))
        with machine.eager():
            return min(self.try_step(alone=True) for _ in range(2)) / compiled

    def try_step(self, alone: bool = False) -> float:
        """Forward and backward, without moving the weights, or adding up the gradients of all processes; the seconds that takes."""
        begin = time.perf_counter()
        self.gradients(alone).item()  # a GPU has done it only then
        self.model.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    def gradients(self, alone: bool = False) -> Tensor:
        """Add up the gradients of the upcoming batch's mean loss, in parts of `micro_batch_size` windows, smaller where memory runs out; its summed nats ()."""
        while True:
            try:
                return self.accumulate(alone)
            except RuntimeError as error:
                if not machine.out_of_memory(error) or self.ranks.size > 1 or not self.shrink():  # others wait for this process's gradients
                    raise

    def accumulate(self, alone: bool) -> Tensor:
        """The same, without a second try. Each row has its own dropout key, so that the parts make no difference but by rounding. Of many processes each
        adds up those of its rows, and gets with the last part those of all, unless it is `alone`; the nats are its own."""
        (*tensors, count), rows = self.upcoming, self.settings.micro_batch_size or len(self.rows)
        parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
        summed, begin = torch.zeros((), device=self.machine.device), self.machine.moment()
        for number, (x, y, keys) in enumerate(parts, start=1):  # (b, T), (b, T), (b,)
            with self.alone() if alone else self.waiting() if number < len(parts) else nullcontext():
                with self.machine.autocast():
                    nats = self.loss(x, y, keys)
                if number == len(parts):
                    self.marks = begin, self.machine.moment()  # what is this process's own: in the last backward pass it waits for the others
                (nats / (count / self.ranks.size)).backward()  # the mean over the processes is then that over all targets
            summed = summed + nats.detach()
        return summed

    def shrink(self) -> bool:
        """Take half the windows at once, or at one window keep fewer activations, and write that to config.toml, so that resuming repeats it; False where
        there is nothing left to do."""
        rows = min(self.settings.micro_batch_size or self.settings.batch_size, self.settings.batch_size)
        if rows == 1 and self.settings.checkpoint_activations:
            return False
        smaller = {"micro_batch_size": -(-rows // 2)} if rows > 1 else {"checkpoint_activations": True}
        self.settings = self.settings.model_copy(update=smaller)
        self.model.checkpoint_activations(bool(self.settings.checkpoint_activations))
        self.model.zero_grad(set_to_none=True)
        if (path := self.run / "config.toml").exists():
            write_text(path, to_toml(resolve(read_toml(path) | smaller)))
        said = f"{rows} windows at a time took more memory than there is: {-(-rows // 2)} now" if rows > 1 else "Memory ran out: fewer activations are kept now"
        warnings.warn(f"{said}; a step has as many tokens as before.", Notice, stacklevel=2)
        return True

    def finishing_seconds(self) -> float:
        """How long the last evaluation, sample and save will take, with some room, by trying a part of each."""
        tokens, letters = FEWEST_TOKENS, 10
        if self.machine.device.type != "cpu":  # a GPU's first evaluation and sample load its kernels, and what a call costs is not to be multiplied
            tokens, letters = 16 * FEWEST_TOKENS, 100
            self.validation_loss(FEWEST_TOKENS)
            self.sample(1)
        begin = time.perf_counter()
        tried = self.validation_loss(tokens).tokens
        evaluated = time.perf_counter()
        self.sample(letters)
        sampled = time.perf_counter()
        evaluating = (evaluated - begin) * (len(self.text.val) + (self.position.val_tokens or 0)) / tried
        writing = (sampled - evaluated) * SAMPLE.max_tokens / letters
        saving = sum(p.nbytes for p in self.model.parameters()) / 50e6
        leaving = LEAVING + COMPILER_LEAVING * self.machine.compile
        return ROOM * (evaluating + writing + saving) + leaving

    def elapsed(self) -> float:
        """Seconds of this run, all its parts together, since its first step."""
        return time.monotonic() - self.began

    def progress(self, steps: float) -> float:
        """What share of the run will be over after so many more steps: of its steps or of its time, whichever is further."""
        of_steps = (self.position.step + steps) / (self.settings.steps or math.inf)
        of_time = (self.elapsed() + steps * self.step_seconds) / self.budget if self.budget > 0 else self.position.step + steps
        return min(1.0, max(of_steps, of_time))

    def over(self) -> bool:
        """Whether all steps are done, or there is no time for another."""
        return self.position.step >= (self.settings.steps or math.inf) or self.elapsed() + self.step_seconds >= self.budget

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """This process's rows of the batch of a step on their way to the device: x (B, T), y (B, T) and keys (B,); and how many targets there are in all
        rows: all, but for those behind the end of a document. They are counted here: a GPU would have to be waited for."""
        B, T = self.settings.batch_size, self.model.config.context_length
        x, y, keys = data.batch(self.text.train, self.settings.seed, step, self.rows, B, T, self.text.windows)
        count = B * T if self.text.windows is None else int(*self.ranks.sum(int((y != data.IGNORED).sum())))
        return self.machine.send(x), self.machine.send(y), self.machine.send(keys), count

    def step(self) -> Stepped:
        """One update of the weights, on the batch that belongs to this step. A GPU is asked for its numbers only when it has all its work."""
        begin = time.perf_counter()
        settings, position = self.settings, self.position
        count = self.upcoming[3]
        progress, middle = self.ranks.numbers_of_first(self.progress(1.0), self.progress(0.5))
        nats = self.gradients()
        grad_norm = self.ranks.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip or math.inf))
        share = schedule(middle, self.warmup(), settings.cooldown)
        self.optimizer.step(share)
        self.upcoming = self.batch(position.step + 1)
        own, norm = torch.stack([nats, grad_norm]).tolist()
        (summed,) = self.ranks.sum(own)
        loss, rate = summed / count, share * settings.learning_rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_a_number(loss, rate, norm)
        position.step += 1
        position.nats += summed
        position.tokens += count
        self.busy, self.busy_steps = self.busy + self.machine.between(*self.marks), self.busy_steps + 1
        seconds = time.perf_counter() - begin
        self.step_seconds = 0.8 * self.step_seconds + 0.2 * seconds if self.step_seconds else seconds
        position.seconds = self.elapsed()
        return Stepped(position.step, progress, loss, rate, norm, count, count / seconds, position.seconds)

    def warmup(self) -> float:
        """The share of the run in which the learning rate rises."""
        return min(self.settings.warmup_steps / self.position.expected_steps, LONGEST_WARMUP)

    def evaluate(self) -> Evaluated:
        """Measure the validation loss; keep the model if it is the best so far."""
        position = self.position
        loss = self.validation_loss(position.val_tokens)
        if not math.isfinite(loss.nats):
            raise self._not_a_number(loss.val_loss, self.settings.learning_rate, math.nan)
        point = Point(position.step, position.nats / position.tokens, loss.val_loss)
        best = position.best is None or point.val_loss < position.best.val_loss
        position.history.append(point)
        position.nats, position.tokens = 0.0, 0
        if best:
            self.save_model(self.summary(loss))
        position.seconds = self.elapsed()
        return Evaluated(point.step, point.train_loss, loss.val_loss, loss.bits_per_byte, loss.tokens, best, position.seconds)

    def pace(self) -> Paced:
        """See how fast each process is on its own, and warn of one that all others wait for; and once, how much of a step they talk."""
        seconds = self.ranks.of_all(self.busy / self.busy_steps)
        self.busy, self.busy_steps = 0.0, 0
        usual = statistics.median(seconds)
        slow = [f"rank {rank} ({own / usual:.1f} times the usual)" for rank, own in enumerate(seconds) if own > STRAGGLING * usual]
        if slow and self.ranks.is_first:
            what = f"Slower than the others, which wait for it at every step: {', '.join(slow)}. Their times are in {self.run / 'ranks.jsonl'}."
            warnings.warn(what, Notice, stacklevel=2)
        exchange = None
        if len(self.position.history) == 1:
            with_others, alone = self.try_step(), self.try_step(alone=True)
            exchange = max(0.0, 1 - alone / with_others)
        return Paced(self.position.step, seconds, exchange)

    def measure_first(self) -> Began:
        """The validation loss before the first step, on the tokens of the evaluations to come."""
        loss = self.validation_loss(self.position.val_tokens)
        self.position.before, self.position.before_tokens, self.position.seconds = loss.val_loss, loss.tokens, self.elapsed()
        return Began(0, loss.val_loss, loss.bits_per_byte, loss.tokens, self.position.seconds)

    def sample(self, count: int | None = None) -> Sampled:
        """A few words of the model as it is now, always from the same random numbers."""
        unused, settings = self.text.about["unused"], SAMPLE.model_copy(update={} if count is None else {"max_tokens": count})
        prompt = generate.encode_prompt(self.text.tokenizer, None, unused, self.model.config.context_length)
        with machine.eager():
            engine = generate.Engine(generate.TorchDecoder(self.model, self.machine.for_single_rows()), self.text.tokenizer, unused)
            engine.add(generate.Request(prompt, settings, self.settings.seed))
            pieces = iter(engine.step, [])
            return Sampled(self.position.step, "".join(piece.text for step in pieces for piece in step))

    def save(self) -> Iterator[Saved]:
        """Write all that it takes to go on from here; before the first evaluation, also the model, so that one can look at it. Parts of sharded weights are
        written while training goes on, and `saved` before the next save."""
        yield from self.saved()
        if self.position.best is None:
            self.save_model(self.summary(None))
        step = self.position.step
        under_way = checkpoint.save_state(self.run, step, self.model, self.optimizer, asdict(self.position), self.ranks)
        self.saved_at, self.saving = time.monotonic(), (step, under_way)
        if under_way is None:
            yield from self.saved()

    def saved(self) -> Iterator[Saved]:
        """Wait for the save that is under way, if one is. Errors: its own."""
        if self.saving is not None:
            (step, under_way), self.saving = self.saving, None
            if under_way is not None:
                under_way.result()
            yield Saved(step)

    def save_model(self, summary: dict[str, Any]) -> None:
        """Write the model file, of the weights as they are."""
        checkpoint.save_model(self.run / "model.safetensors", self.model, self.text.tokenizer, summary, self.ranks)

    def finish(self) -> Finished:
        """Go back to the best model, which is the one that stays, measure it on the whole split, and write the result into its file."""
        kept = checkpoint.take_best(self.run, self.model, self.ranks)
        if self.position.val_tokens is None and "val_nats" in kept:  # then it was measured on all of it when it was kept
            loss = Loss(kept["val_nats"], kept["val_tokens"], kept["val_bytes"], kept.get("val_words", 0))
        else:
            loss = self.validation_loss(None)
        judged = verdict(self.position.history, self.text.about["baselines"], loss.val_loss, self.settings.minutes, self.position.before)
        self.save_model(kept | self.summary(loss) | {"step": kept["step"], "verdict": judged.asdict(), "finished": self.position.step})
        before = self.position.before, self.position.before_tokens
        return Finished(self.position.step, kept["step"], loss, self.text.about["baselines"], judged, self.position.seconds, *before)

    def summary(self, loss: Loss | None) -> dict[str, Any]:
        """What a model file tells of its training, besides weights, settings and tokenizer; without a loss, before the first evaluation, less."""
        about = self.text.about
        summary = {"step": self.position.step, "text": about["fingerprint"], "baselines": about["baselines"], "unused": about["unused"]}
        summary["machine"] = str(self.machine)
        if loss is not None:
            summary |= {"val_loss": loss.val_loss, "bits_per_byte": loss.bits_per_byte}
            summary |= {"val_nats": loss.nats, "val_tokens": loss.tokens, "val_bytes": loss.bytes, "val_words": loss.words}
            minutes = self.settings.minutes and self.settings.minutes * self.progress(0.0)
            summary["verdict"] = verdict(self.position.history, about["baselines"], minutes=minutes, before=self.position.before).asdict()
        return summary

    def validation_loss(self, limit: int | None) -> Loss:
        """The loss of the model on the validation split, or on `limit` tokens of it."""
        with machine.eager():
            about = self.text.about
            return evaluate(self.model, self.text.val, about["val_bytes"], self.machine, limit=limit, n_words=about.get("val_words", 0), ranks=self.ranks)

    def limit(self) -> int | None:
        """How many validation tokens an evaluation during the run may take, None for all; an update costs three forward passes."""
        settings, steps = self.settings, self.position.expected_steps
        share = min(EVALUATION_SHARE, EVALUATIONS_SHARE / math.ceil(steps / settings.eval_every))
        tokens = 3 * share * steps * settings.batch_size * self.model.config.context_length
        return max(int(tokens), FEWEST_TOKENS) if tokens < len(self.text.val) else None

    def out_of_patience(self) -> bool:
        """Whether as many evaluations as `patience` allows have passed since the best one."""
        best = self.position.best
        return best is not None and self.settings.patience > 0 and sum(p.step > best.step for p in self.position.history) >= self.settings.patience

    def _not_a_number(self, loss: float, rate: float, grad_norm: float) -> UserError:
        deque(self.saved(), maxlen=0)
        saved = checkpoint.latest_step(self.run)
        matrices = f" --matrix-learning-rate {self.settings.matrix_learning_rate / 10:.2g}" if self.settings.optimizer == "muon" else ""
        kept = f"The last good state, step {saved:,}, is in {self.run}" if saved else "Nothing had been saved yet"
        return UserError(
            f"The loss is no longer a number: {loss} in step {self.position.step + 1:,}, at learning rate {rate:.2g}, gradient norm {grad_norm:.3g}. {kept}.",
            f"Train anew with a lower learning rate: --learning-rate {self.settings.learning_rate / 10:.2g}{matrices} --out ANOTHER_FOLDER",
        )
