"""Budgets of a run: steps, seconds of training, and tokens per evaluation."""

import math
import time
import warnings
from collections.abc import Callable

from nanogpt.config import TrainingConfig
from nanogpt.device.device import Machine
from nanogpt.errors import Notice
from nanogpt.evaluate import EvalLoss
from nanogpt.training.state import TrainState

# Reserve 1.4x the measured teardown time.
SAFETY_FACTOR = 1.4
# Seconds for interpreter start and exit, and for the exit of torch.compile workers.
EXIT_SECONDS = 0.9
COMPILER_EXIT_SECONDS = 1.1
# Assumed disk throughput when the final model is saved, in bytes per second.
SAVE_BYTES_PER_SECOND = 50e6

# Fractions of the run's FLOPs that one evaluation, and all evaluations together, may take.
MAX_EVAL_FRACTION = 0.02
MAX_TOTAL_EVAL_FRACTION = 0.04
# Fewer tokens make the validation loss too noisy.
MIN_EVAL_TOKENS = 8192


class TimeBudget:
    """Progress of a run, by steps or by time, whichever ends the run first.

    Args:
        settings: `steps` and `minutes` limit the run; either may be None.
        state: Progress of the run; `setup_seconds` is updated when training starts.
        start_time: Value of `clock` at which the time limit started.
        clock: A monotonic clock, in seconds.
        enforce: False ignores the time limit, for ranks that follow the clock of rank 0.

    Attributes:
        train_seconds_budget: Seconds for training, without setup and teardown.
        ema_step_seconds: Exponential moving average of the seconds per step.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        state: TrainState,
        start_time: float,
        clock: Callable[[], float],
        enforce: bool = True,
    ):
        self.max_steps = settings.steps or math.inf
        self.minutes = settings.minutes
        self.state = state
        self.start_time = start_time
        self.clock = clock
        self.enforce = enforce
        self.train_seconds_budget = math.inf
        self.ema_step_seconds = 0.0
        self.train_start = clock() - state.seconds

    def estimate_num_steps(self) -> float:
        """Estimate the length of the run in steps; infinite without any limit."""
        if self.minutes is None:
            return max(1.0, self.max_steps)
        setup_seconds = self.state.setup_seconds + self.clock() - self.start_time
        steps_in_time = (60 * self.minutes - setup_seconds) / self.ema_step_seconds
        return max(1.0, min(self.max_steps, steps_in_time))

    def start_training(self, teardown_seconds: float) -> None:
        """End the setup, and reserve `teardown_seconds` of the time limit for the teardown."""
        if self.minutes is not None:
            self.state.setup_seconds += self.clock() - self.start_time
            if self.enforce:
                reserved = self.state.setup_seconds + teardown_seconds
                self.train_seconds_budget = 60 * self.minutes - reserved
                self.warn_if_too_short(teardown_seconds)
        self.train_start = self.clock() - self.state.seconds

    def warn_if_too_short(self, teardown_seconds: float) -> None:
        """Warn if the time limit leaves no second step."""
        state = self.state
        if state.seconds + self.ema_step_seconds < self.train_seconds_budget:
            return
        left = "time for a single training step" if state.step == 0 else "no time for training"
        used_seconds = state.setup_seconds + teardown_seconds + state.seconds
        warnings.warn(
            f"A limit of {self.minutes:g} minutes leaves {left}: setup took "
            f"{state.setup_seconds:.0f} s and teardown needs {teardown_seconds:.0f} s. "
            f"Set minutes to at least {used_seconds / 30:.2g}.",
            Notice,
            stacklevel=2,
        )

    def elapsed_seconds(self) -> float:
        """Return the seconds of training so far, over all parts of the run."""
        return self.clock() - self.train_start

    def add_step(self, seconds: float) -> None:
        """Update the moving average of the seconds per step."""
        if self.ema_step_seconds:
            seconds = 0.8 * self.ema_step_seconds + 0.2 * seconds
        self.ema_step_seconds = seconds

    def progress(self, steps: float) -> float:
        """Return the fraction of the run that is complete after `steps` more steps."""
        step = self.state.step + steps
        step_fraction = step / self.max_steps
        if self.train_seconds_budget > 0:
            seconds = self.elapsed_seconds() + steps * self.ema_step_seconds
            time_fraction = seconds / self.train_seconds_budget
        else:
            time_fraction = step
        return min(1.0, max(step_fraction, time_fraction))

    def has_all_steps(self) -> bool:
        """Return whether the step limit is reached."""
        return self.state.step >= self.max_steps

    def is_done(self) -> bool:
        """Return whether the step limit is reached or the time left is too short for a step."""
        if self.has_all_steps():
            return True
        return self.elapsed_seconds() + self.ema_step_seconds >= self.train_seconds_budget


def estimate_teardown_seconds(
    machine: Machine,
    evaluate: Callable[[int], EvalLoss],
    sample: Callable[[int], object],
    num_eval_tokens: int,
    num_sample_tokens: int,
    model_bytes: int,
) -> float:
    """Estimate the seconds of the last evaluations, sample and save, by timing a part of each.

    Args:
        machine: The device of the run.
        evaluate: Evaluates the model on the given number of tokens.
        sample: Generates the given number of tokens.
        num_eval_tokens: Tokens of the last evaluations.
        num_sample_tokens: Tokens of the last sample.
        model_bytes: Size of the weights.
    """
    eval_trial, sample_trial = MIN_EVAL_TOKENS, 10
    if machine.device.type != "cpu":
        # The first calls load GPU kernels. Larger trials then amortize the launch overhead.
        evaluate(MIN_EVAL_TOKENS)
        sample(1)
        eval_trial, sample_trial = 16 * MIN_EVAL_TOKENS, 100
    start = time.perf_counter()
    evaluated_tokens = evaluate(eval_trial).tokens
    eval_end = time.perf_counter()
    sample(sample_trial)
    sample_end = time.perf_counter()
    eval_seconds = (eval_end - start) * num_eval_tokens / evaluated_tokens
    sample_seconds = (sample_end - eval_end) * num_sample_tokens / sample_trial
    save_seconds = model_bytes / SAVE_BYTES_PER_SECOND
    exit_seconds = EXIT_SECONDS + COMPILER_EXIT_SECONDS * machine.compile
    return SAFETY_FACTOR * (eval_seconds + sample_seconds + save_seconds) + exit_seconds


def val_token_budget(
    settings: TrainingConfig, context_length: int, expected_steps: float, num_val_tokens: int
) -> int | None:
    """Return the tokens that an evaluation during the run may take; None for all of them."""
    num_evals = math.ceil(expected_steps / settings.eval_every)
    fraction = min(MAX_EVAL_FRACTION, MAX_TOTAL_EVAL_FRACTION / num_evals)
    train_tokens = expected_steps * settings.batch_size * context_length
    # A training step costs three forward passes.
    tokens = 3 * fraction * train_tokens
    return max(int(tokens), MIN_EVAL_TOKENS) if tokens < num_val_tokens else None
