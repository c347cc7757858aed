"""How fast this machine trains and writes: the real step and the real sampler, timed on a built-in text.

In: settings by name, as for training. Out: tokens per second, FLOP/s and the share of the measured peak; medians.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt import generate, machine
from nanogpt.config import Config, SamplingConfig
from nanogpt.plan import flops_per_token
from nanogpt.prepare import prepare
from nanogpt.trainer import Position, Trainer, build

TEXT = "python-docs"


@dataclass(frozen=True)
class Speed:
    """What was measured; times are medians of `steps` training steps (optimiser included) and of `tokens` written one by one."""

    machine: str
    parameters: int
    tokens_per_step: int
    step_seconds: float
    train_tokens_per_second: float
    train_flops_per_second: float
    peak_flops_per_second: float
    share_of_peak: float
    write_tokens_per_second: float
    compile_seconds: float
    steps: int
    tokens: int


def bench(settled: Config, place: machine.Machine, steps: int = 20, tokens: int = 200) -> Speed:
    """Time `steps` training steps of these settings, and `tokens` tokens of generation. Nothing of it is kept."""
    text = prepare([TEXT], settled.text)
    model, optimizer = build(settled, text.tokenizer.vocab_size, place)
    with tempfile.TemporaryDirectory(prefix="nanogpt-") as run:
        trainer = Trainer(model, optimizer, text, settled.training, place, Path(run), Position(), lambda: False)
        begin = time.perf_counter()
        trainer.get_ready()
        ready = time.perf_counter() - begin
        times = [event.tokens / event.tokens_per_second for event in (trainer.step() for _ in range(steps + 2))][2:]
    row = place.for_single_rows()
    prompt = text.val[: settled.model.context_length // 2].tolist()
    with machine.eager():
        written = generate.tokens(model.eval(), prompt, SamplingConfig(max_tokens=tokens + 1), 1, row)
        moments = [time.perf_counter() for _ in written]
    pace = statistics.median(after - before for before, after in itertools.pairwise(moments))
    per_step = settled.training.batch_size * settled.model.context_length
    seconds = statistics.median(times)
    speed = per_step / seconds * flops_per_token(settled.model, text.tokenizer.vocab_size)
    peak = machine.peak(place.device, place.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    return Speed(str(place), parameters, per_step, seconds, per_step / seconds, speed, peak, speed / peak, 1 / pace, ready, steps, tokens)
