"""How fast this machine trains and writes: the real step and the real sampler, timed on a built-in text.

In: settings by name, as for training. Out: tokens per second, FLOP/s and the share of the measured peak; medians.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nanogpt import generate, machine
from nanogpt.config import SamplingConfig, resolve
from nanogpt.plan import flops_per_token
from nanogpt.prepare import prepare
from nanogpt.report import Speed
from nanogpt.trainer import Position, Trainer, build

TEXT = "python-docs"


def bench(settings: dict[str, Any], seconds: float = 10.0, tokens: int = 200) -> Speed:
    """Time training steps with these settings for some seconds, and `tokens` tokens of generation, as a long run would have them. The model is not kept.

    Errors: `UserError` for settings that are wrong, or too large for the memory.
    """
    settled = resolve(settings | {"steps": 1_000_000, "minutes": None})
    text = prepare([TEXT], settled.text)
    if not settled.text.cross_documents:
        text = text.within_documents(settled.model.context_length)
    place = machine.choose(settled.machine)
    place, _ = machine.for_training(place, settled.machine, settled.model, settled.training.batch_size, 1e9)
    with machine.memory_for(f"a model of this shape: {settled.model}"):
        model, optimizer = build(settled, text.tokenizer.vocab_size, place)
    with tempfile.TemporaryDirectory(prefix="nanogpt-") as run, machine.memory_for(f"a step of {settled.training.batch_size} windows"):
        trainer = Trainer(model, optimizer, text, settled.training, place, Path(run), Position(), lambda: False, time.monotonic())
        begin = time.perf_counter()
        trainer.get_ready()
        ready = time.perf_counter() - begin
        times = _step_times(trainer, seconds)
    prompt = text.val[: max(1, settled.model.context_length // 2)].tolist()
    with machine.eager():
        engine = generate.Engine(
            generate.open_decoder(model.eval(), place, settled.machine.dtype), text.tokenizer, [(text.tokenizer.end, text.tokenizer.end + 1)]
        )
        engine.add(generate.Request(prompt, SamplingConfig(max_tokens=tokens + 1), 1))
        steps = [(len(pieces), time.perf_counter()) for pieces in iter(engine.step, [])]
    pace = statistics.median((after - before) / made for (_, before), (made, after) in itertools.pairwise(steps))
    per_step, step = settled.training.batch_size * settled.model.context_length, statistics.median(times)
    speed = per_step / step * flops_per_token(settled.model, text.tokenizer.vocab_size)
    peak = machine.peak(place.device, place.dtype)
    return Speed(
        machine=str(place),
        attention=place.attention,
        compiled=place.compile,
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_per_step=per_step,
        step_seconds=step,
        train_tokens_per_second=per_step / step,
        train_flops_per_second=speed,
        peak_flops_per_second=peak,
        share_of_peak=speed / peak,
        write_tokens_per_second=1 / pace,
        ready_seconds=ready,
        steps=len(times),
        tokens=tokens,
    )


def _step_times(trainer: Trainer, seconds: float) -> list[float]:
    """Seconds of each step, after two that do not count."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        event = trainer.step()
        times.append(event.tokens / event.tokens_per_second)
    return times[2:]
