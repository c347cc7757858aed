"""The training loop: steps, evaluations, samples and saves, as a generator of events.

`Trainer.train_step` is one optimizer step: forward, backward, clip, update, zero_grad. Everything
else has its own module: batches (`batch_loader`), `loss`, time limit (`budget`), memory limit
(`memory_recovery`), slow ranks (`stragglers`), saves (`checkpointer`).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import checkpoint
from nanogpt.config import SamplingConfig, TrainingConfig
from nanogpt.data.prepare import PreparedData
from nanogpt.device import compile
from nanogpt.device.device import Machine
from nanogpt.device.memory import explain_oom
from nanogpt.diagnosis import EvalPoint, diagnose
from nanogpt.distributed.context import DistContext
from nanogpt.errors import UserError
from nanogpt.evaluate import EvalLoss, TextSize, evaluate
from nanogpt.generate.engine import Engine
from nanogpt.generate.prompts import encode_prompt
from nanogpt.generate.sequence import Request
from nanogpt.generate.torch_decoder import TorchDecoder
from nanogpt.model import GPT
from nanogpt.optim import Optimizer, lr_multiplier
from nanogpt.training import events
from nanogpt.training.batch_loader import BatchLoader
from nanogpt.training.budget import TimeBudget, estimate_teardown_seconds, val_token_budget
from nanogpt.training.checkpointer import Checkpointer
from nanogpt.training.loss import TrainLoss
from nanogpt.training.memory_recovery import MemoryRecovery
from nanogpt.training.state import TrainState
from nanogpt.training.stragglers import StragglerDetector

# Cap warm-up at 10 % of the run, so that short runs still reach the peak learning rate.
MAX_WARMUP_FRACTION = 0.1
SAMPLE_SETTINGS = SamplingConfig(max_tokens=200)


@dataclass(frozen=True)
class RunContext:
    """Surroundings of a run: where it computes and saves, and what stops it.

    Attributes:
        run_dir: Folder of the run's files.
        machine: Device and precision.
        start_time: `time.monotonic()` at which the time limit started.
        stop_requested: Returns True once the run should save and stop.
        dist: The ranks that train together. All yield the same sequence of events, with times of
            their own.
    """

    run_dir: Path
    machine: Machine
    start_time: float
    stop_requested: Callable[[], bool] = lambda: False
    dist: DistContext = DistContext()


class Trainer:
    """Trains a model from `state` to the end of the run.

    Each rank computes its own sequences of every batch. `train` is a generator and pauses while the
    caller handles an event, so each event is logged before the next save.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        data: PreparedData,
        settings: TrainingConfig,
        state: TrainState,
        context: RunContext,
    ):
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.settings = settings
        self.state = state
        self.run_dir = context.run_dir
        self.machine = context.machine
        self.stop_requested = context.stop_requested
        self.dist = dist = context.dist
        self.context_length = model.config.context_length
        self.loader = BatchLoader(data, settings, self.context_length, self.machine, dist)
        self.train_loss = TrainLoss(model, self.machine, dist)
        # Rank 0 alone watches the clock; `dist.any_rank` tells the others.
        self.budget = TimeBudget(
            settings, state, context.start_time, time.monotonic, enforce=dist.is_main_process
        )
        local_batch_size = len(self.loader.rows)
        config_path = self.run_dir / "config.toml"
        self.memory_recovery = MemoryRecovery(
            model, settings, local_batch_size, config_path, is_enabled=dist.world_size == 1
        )
        self.stragglers = StragglerDetector(self.machine, dist, self.run_dir / "ranks.jsonl")
        self.checkpointer = Checkpointer(self.run_dir, model, optimizer, data.tokenizer, dist)

    def train(self) -> Iterator[events.Event]:
        """Train to the end of the run; evaluate, sample and save on the way.

        Raises:
            UserError: The loss or the gradient norm is not finite, or memory or the disk is full.
                The last save stays.
        """
        state = self.state
        # Memory recovery reduces the micro-batch to one sequence first, but not on several ranks.
        recovery = self.memory_recovery
        batch_size = 1 if recovery.is_enabled else recovery.micro_batch_size
        oom_subject = f"a micro-batch of shape ({batch_size}, {self.context_length})"
        # A resumed run may be complete already; a new run takes at least one step.
        is_resumed = state.step > 0
        done = is_resumed and (self.budget.has_all_steps() or self.should_early_stop())
        if not done:
            with explain_oom(oom_subject):
                self.prepare()
            # Preparing takes time, which may have been the last of the limit.
            (done,) = self.dist.any_rank(is_resumed and self.budget.is_done())
        if "init_from" in self.data.metadata and state.initial_val_loss is None:
            yield self.evaluate_initial()
        while not done:
            with explain_oom(oom_subject):
                step_end = self.step()
            yield step_end
            (budget_done,) = self.dist.any_rank(self.budget.is_done())
            eval_due = budget_done or state.step % self.settings.eval_every == 0
            if eval_due:
                yield self.evaluate()
                if self.dist.world_size > 1:
                    yield self.time_ranks()
                yield self.sample()
            stop_requested, save_interval_over = self.dist.any_rank(
                self.stop_requested(), self.checkpointer.is_due()
            )
            done = budget_done or self.should_early_stop()
            checkpoint_due = eval_due or stop_requested or save_interval_over
            if checkpoint_due:
                yield from self.save()
            if stop_requested and not done:
                yield from self.checkpointer.wait_for_pending_save()
                yield events.Interrupted(state.step)
                return
        yield from self.checkpointer.wait_for_pending_save()
        yield self.finish()

    def train_step(self, lr_scale: float | None, communicate: bool = True) -> tuple[Tensor, Tensor]:
        """Run one optimizer step: forward, backward, clip, update, zero_grad.

        Args:
            lr_scale: Factor on the peak learning rates; None skips clipping and the update.
            communicate: False skips the exchange of gradients between ranks, for timing.

        Returns:
            The loss summed over this rank's targets, and the norm of all gradients, both scalars.
        """
        batch = self.loader.get(self.state.step)
        # `num_targets` counts the targets of all ranks, and DDP and FSDP average the gradients over
        # the ranks. Dividing by the mean number per rank gives the gradient of the mean loss.
        loss_divisor = batch.num_targets / self.dist.world_size

        # A function, because `memory_recovery` repeats it in smaller parts if memory runs out.
        def forward_backward() -> Tensor:
            loss_sum = torch.zeros((), device=self.machine.device)
            micro_batches = batch.split(self.memory_recovery.micro_batch_size)
            self.stragglers.record_start()
            for i, (x, y, dropout_seeds) in enumerate(micro_batches, start=1):
                is_last = i == len(micro_batches)
                with self.train_loss.sync_context(is_last, communicate):
                    with self.machine.autocast():
                        micro_loss_sum = self.train_loss(x, y, dropout_seeds)
                    if is_last:
                        # The last backward pass waits for the gradients of the other ranks.
                        self.stragglers.record_end()
                    (micro_loss_sum / loss_divisor).backward()
                loss_sum = loss_sum + micro_loss_sum.detach()
            return loss_sum

        loss_sum = self.memory_recovery.run(forward_backward)
        grad_norm = torch.zeros_like(loss_sum)
        if lr_scale is not None:
            max_norm = self.settings.grad_clip or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
            grad_norm = self.dist.full_tensor(grad_norm)
            self.optimizer.step(lr_scale)
        self.optimizer.zero_grad()
        return loss_sum, grad_norm

    def step(self) -> events.StepEnd:
        """Run the next `train_step` at its learning rate, and account for its loss and time."""
        start = time.perf_counter()
        settings, state = self.settings, self.state
        budget = self.budget
        # Report the progress at the end of the step; take the learning rate at its middle.
        progress, midpoint = self.dist.broadcast_numbers(budget.progress(1.0), budget.progress(0.5))
        warmup_fraction = min(settings.warmup_steps / state.expected_steps, MAX_WARMUP_FRACTION)
        lr_scale = lr_multiplier(midpoint, warmup_fraction, settings.cooldown_fraction)
        num_targets = self.loader.get(state.step).num_targets
        loss_sum, grad_norm = self.train_step(lr_scale)
        self.loader.prefetch(state.step + 1)
        # This waits for the device, so it comes after all work of the step is queued.
        local_loss_sum, norm = torch.stack([loss_sum, grad_norm]).tolist()
        (global_loss_sum,) = self.dist.all_reduce_sum(local_loss_sum)
        loss = global_loss_sum / num_targets
        learning_rate = lr_scale * settings.learning_rate
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._divergence_error(
                f"The loss or the gradient norm is not finite in step {state.step + 1:,}: loss "
                f"{loss:.3g}, gradient norm {norm:.3g}, at learning rate {learning_rate:.2g}."
            )
        state.step += 1
        state.train_loss_sum += global_loss_sum
        state.train_tokens += num_targets
        self.stragglers.add_step()
        seconds = time.perf_counter() - start
        budget.add_step(seconds)
        state.seconds = budget.elapsed_seconds()
        return events.StepEnd(
            step=state.step,
            progress=progress,
            train_loss=loss,
            learning_rate=learning_rate,
            grad_norm=norm,
            tokens=num_targets,
            tokens_per_second=num_targets / seconds,
            seconds=state.seconds,
        )

    def prepare(self) -> None:
        """Load the first batch, compile, plan the run, and start the clock of its training.

        The plan is the number of steps, the size of evaluations, and the time of the last
        evaluation and save. The weights stay as they are.
        """
        state = self.state
        self.loader.prefetch(state.step)
        if self.machine.compile:
            # Without communication: a rank that cannot compile would leave the others waiting.
            dry_run = partial(self.timed_dry_run, communicate=False)
            self.train_loss.try_compile(dry_run, self.settings.batch_size)
        is_timed = self.settings.minutes is not None
        if is_timed:
            step_seconds = min(self.timed_dry_run() for _ in range(2))
            (self.budget.ema_step_seconds,) = self.dist.broadcast_numbers(step_seconds)
        num_val_tokens = len(self.data.val)
        if not state.expected_steps:  # A resumed run keeps the plan of its start.
            num_steps = self.budget.estimate_num_steps()
            (state.expected_steps,) = self.dist.broadcast_numbers(num_steps)
            state.val_tokens = val_token_budget(
                self.settings, self.context_length, state.expected_steps, num_val_tokens
            )
        teardown_seconds = 0.0
        if is_timed:
            teardown_seconds = estimate_teardown_seconds(
                self.machine,
                self.validation_loss,
                self.sample,
                # The last evaluation, and the full one of `finish`; if `val_tokens` is None, both
                # are the same.
                num_eval_tokens=num_val_tokens + (state.val_tokens or 0),
                num_sample_tokens=SAMPLE_SETTINGS.max_tokens,
                model_bytes=sum(p.nbytes for p in self.model.parameters()),
            )
        self.budget.start_training(teardown_seconds)

    def timed_dry_run(self, communicate: bool = True) -> float:
        """Time forward and backward on the next batch, in seconds, without an update."""
        start = time.perf_counter()
        loss_sum, _ = self.train_step(lr_scale=None, communicate=communicate)
        loss_sum.item()  # waits for the device
        return time.perf_counter() - start

    def evaluate(self) -> events.EvalEnd:
        """Measure the validation loss, and save the model if it is the best so far."""
        state = self.state
        loss = self.validation_loss(state.val_tokens)
        if not math.isfinite(loss.loss_sum):
            raise self._divergence_error(
                f"The validation loss is not finite: {loss.loss} after step {state.step:,}."
            )
        point = EvalPoint(state.step, state.train_loss_sum / state.train_tokens, loss.loss)
        is_best = state.best is None or point.val_loss < state.best.val_loss
        state.history.append(point)
        state.train_loss_sum = 0.0
        state.train_tokens = 0
        if is_best:
            self.checkpointer.save_model(self.summary(loss))
        state.seconds = self.budget.elapsed_seconds()
        return events.EvalEnd(
            step=point.step,
            train_loss=point.train_loss,
            val_loss=loss.loss,
            bits_per_byte=loss.bits_per_byte,
            val_tokens=loss.tokens,
            best=is_best,
            seconds=state.seconds,
        )

    def evaluate_initial(self) -> events.InitialEval:
        """Measure the validation loss of the initial checkpoint, before the first step."""
        state = self.state
        loss = self.validation_loss(state.val_tokens)
        state.initial_val_loss = loss.loss
        state.initial_val_tokens = loss.tokens
        state.seconds = self.budget.elapsed_seconds()
        return events.InitialEval(
            step=0,
            val_loss=loss.loss,
            bits_per_byte=loss.bits_per_byte,
            val_tokens=loss.tokens,
            seconds=state.seconds,
        )

    def validation_loss(self, max_tokens: int | None) -> EvalLoss:
        """Evaluate on the validation split, or on `max_tokens` tokens of it."""
        size = TextSize(self.data.metadata["val_bytes"], self.data.metadata.get("val_words", 0))
        with compile.force_eager():
            return evaluate(
                self.model, self.data.val, size, self.machine, limit=max_tokens, ranks=self.dist
            )

    def should_early_stop(self) -> bool:
        """Return whether the last `patience` evaluations did not improve on the best one."""
        best, patience = self.state.best, self.settings.patience
        if best is None or patience == 0:
            return False
        return sum(point.step > best.step for point in self.state.history) >= patience

    def time_ranks(self) -> events.RankTimings:
        """Compare the speed of all ranks; once per run, also measure communication."""
        seconds = self.stragglers.check_stragglers()
        comm_fraction = None
        if len(self.state.history) == 1:
            step_seconds = self.timed_dry_run()
            compute_seconds = self.timed_dry_run(communicate=False)
            comm_fraction = max(0.0, 1 - compute_seconds / step_seconds)
        return events.RankTimings(self.state.step, seconds, comm_fraction)

    def sample(self, max_tokens: int | None = None) -> events.SampleEnd:
        """Generate a sample without a prompt, with the same seed every time."""
        unseen = self.data.metadata["unseen_token_ranges"]
        settings = SAMPLE_SETTINGS
        if max_tokens is not None:
            settings = settings.model_copy(update={"max_tokens": max_tokens})
        prompt = encode_prompt(self.data.tokenizer, None, unseen, self.context_length)
        with compile.force_eager():
            decoder = TorchDecoder(self.model, self.machine.for_decoding())
            engine = Engine(decoder, self.data.tokenizer, unseen)
            engine.add(Request(prompt, settings, self.settings.seed))
            texts = []
            while engine.has_work:
                texts += [output.text for output in engine.step()]
        return events.SampleEnd(self.state.step, "".join(texts))

    def save(self) -> Iterator[events.Event]:
        """Save the training state; before the first evaluation, also the model.

        Evaluations save the best model. Before the first one, save the current model, so that the
        run can be sampled.
        """
        yield events.SaveStart(self.state.step)
        yield from self.checkpointer.wait_for_pending_save()
        if self.state.best is None:
            self.checkpointer.save_model(self.summary(None))
        yield from self.checkpointer.save_state(self.state)

    def finish(self) -> events.TrainEnd:
        """Evaluate the best model on the full validation split, and add the result to its file."""
        state, baselines = self.state, self.data.metadata["baselines"]
        best_summary = checkpoint.load_best_weights(self.run_dir, self.model, self.dist)
        if state.val_tokens is None and "val_loss_sum" in best_summary:
            # Evaluations during the run covered the full split.
            names = ("loss_sum", "tokens", "bytes", "words")
            loss = EvalLoss(**{name: best_summary[f"val_{name}"] for name in names})
        else:
            loss = self.validation_loss(None)
        diagnosis = diagnose(
            state.history, baselines, loss.loss, self.settings.minutes, state.initial_val_loss
        )
        # "step" is that of the weights, "finished" the last one of the run.
        best_step = best_summary["step"]
        final = {"step": best_step, "diagnosis": diagnosis.asdict(), "finished": state.step}
        # `final` replaces the step and the diagnosis of `summary`.
        self.checkpointer.save_model(best_summary | self.summary(loss) | final)
        return events.TrainEnd(
            step=state.step,
            best_step=best_step,
            loss=loss,
            baselines=baselines,
            diagnosis=diagnosis,
            seconds=state.seconds,
            initial_val_loss=state.initial_val_loss,
            initial_val_tokens=state.initial_val_tokens,
        )

    def summary(self, loss: EvalLoss | None) -> dict[str, Any]:
        """Summarize the training for the model file; `loss` is None before any evaluation."""
        state, metadata = self.state, self.data.metadata
        baselines = metadata["baselines"]
        summary = {
            "step": state.step,
            "data_fingerprint": metadata["fingerprint"],
            "baselines": baselines,
            "unseen_token_ranges": metadata["unseen_token_ranges"],
            "machine": str(self.machine),
        }
        if loss is None:
            return summary
        minutes = self.settings.minutes
        if minutes is not None:
            minutes *= self.budget.progress(0.0)  # of the part of the run that is done
        diagnosis = diagnose(
            state.history, baselines, minutes=minutes, initial_loss=state.initial_val_loss
        )
        return summary | {
            "val_loss": loss.loss,
            "bits_per_byte": loss.bits_per_byte,
            "val_loss_sum": loss.loss_sum,
            "val_tokens": loss.tokens,
            "val_bytes": loss.bytes,
            "val_words": loss.words,
            "diagnosis": diagnosis.asdict(),
        }

    def _divergence_error(self, problem: str) -> UserError:
        self.checkpointer.wait_for_pending_save()  # without its event: the run ends in an error
        settings = self.settings
        step = checkpoint.latest_step(self.run_dir)
        saved = f"Step {step:,} is saved in {self.run_dir}" if step else "Nothing is saved"
        lower = {"learning_rate": float(f"{settings.learning_rate / 10:.2g}")}
        if settings.optimizer == "muon":
            lower["muon_learning_rate"] = float(f"{settings.muon_learning_rate / 10:.2g}")
        return UserError(f"{problem} {saved}.", fix=lower | {"out": "ANOTHER_FOLDER"})
