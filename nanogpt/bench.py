"""Measure training and decoding throughput on a built-in text."""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt.config import Config, SamplingConfig, resolve
from nanogpt.data.prepare import PreparedData, prepare
from nanogpt.device import autotune, compile, device, measurements, memory
from nanogpt.device.device import Machine
from nanogpt.generate.decoder import create_decoder
from nanogpt.generate.engine import Engine
from nanogpt.generate.sequence import Request
from nanogpt.model import GPT
from nanogpt.plan.model_size import flops_per_token
from nanogpt.training.setup import build_model_and_optimizer
from nanogpt.training.state import TrainState
from nanogpt.training.trainer import RunContext, Trainer

TEXT = "python-docs"


@dataclass(frozen=True)
class Speed:
    """Measured throughput of training and decoding; times are medians.

    Attributes:
        machine: Description of the device.
        attention: Attention implementation.
        compiled: True if the training step was compiled.
        parameters: Number of parameters.
        tokens_per_step: Tokens of a training step.
        step_seconds: Seconds of a training step, optimizer included.
        train_tokens_per_second: Training throughput.
        train_flops_per_second: Training throughput in FLOP/s.
        peak_flops_per_second: Measured matmul throughput in FLOP/s.
        mfu: Model FLOPs utilization, relative to the measured peak.
        decode_tokens_per_second: Throughput of one sequence.
        startup_seconds: Seconds to compile and to run a first step.
        steps: Timed training steps.
        tokens: Timed decode steps.
    """

    machine: str
    attention: str
    compiled: bool
    parameters: int
    tokens_per_step: int
    step_seconds: float
    train_tokens_per_second: float
    train_flops_per_second: float
    peak_flops_per_second: float
    mfu: float
    decode_tokens_per_second: float
    startup_seconds: float
    steps: int
    tokens: int


def bench(settings: dict[str, Any], seconds: float = 10.0, tokens: int = 200) -> Speed:
    """Measure training steps and decoding with these settings, as in a long run.

    Args:
        settings: Settings by name, as for training.
        seconds: Time for the training steps.
        tokens: Number of tokens to decode.

    Raises:
        UserError: If settings are wrong, or the model does not fit into memory.
    """
    config = resolve(settings | {"steps": 1_000_000, "minutes": None})
    prepared = prepare([TEXT], config.data)
    if not config.data.cross_documents:
        prepared = prepared.with_document_windows(config.model.context_length)
    vocab_size = prepared.tokenizer.vocab_size
    machine = device.select_device(config.device)
    machine, _ = autotune.autotune_for_training(
        machine, config.device, config.model, config.training.batch_size, 1e9
    )
    with memory.explain_oom(f"a model of this shape: {config.model}"):
        model, optimizer = build_model_and_optimizer(config, vocab_size, machine)
    with (
        tempfile.TemporaryDirectory(prefix="nanogpt-") as run,
        memory.explain_oom(f"a step of {config.training.batch_size} sequences"),
    ):
        context = RunContext(Path(run), machine, time.monotonic())
        trainer = Trainer(model, optimizer, prepared, config.training, TrainState(), context)
        start = time.perf_counter()
        trainer.prepare()
        startup_seconds = time.perf_counter() - start
        step_times = _step_times(trainer, seconds)
    seconds_per_token = _decode_seconds_per_token(model, prepared, machine, config, tokens)
    tokens_per_step = config.training.batch_size * config.model.context_length
    step_seconds = statistics.median(step_times)
    flops = tokens_per_step / step_seconds * flops_per_token(config.model, vocab_size)
    peak = measurements.peak_flops(machine.device, machine.dtype)
    return Speed(
        machine=str(machine),
        attention=machine.attention,
        compiled=machine.compile,
        parameters=sum(p.numel() for p in model.parameters()),
        tokens_per_step=tokens_per_step,
        step_seconds=step_seconds,
        train_tokens_per_second=tokens_per_step / step_seconds,
        train_flops_per_second=flops,
        peak_flops_per_second=peak,
        mfu=flops / peak,
        decode_tokens_per_second=1 / seconds_per_token,
        startup_seconds=startup_seconds,
        steps=len(step_times),
        tokens=tokens,
    )


def _decode_seconds_per_token(
    model: GPT, prepared: PreparedData, machine: Machine, config: Config, tokens: int
) -> float:
    prompt = prepared.val[: max(1, config.model.context_length // 2)].tolist()
    eot_id = prepared.tokenizer.eot_id
    with compile.force_eager():
        decoder = create_decoder(model.eval(), machine, config.device.dtype)
        # The end-of-text token is never sampled, so that decoding does not stop early.
        engine = Engine(decoder, prepared.tokenizer, [(eot_id, eot_id + 1)])
        engine.add(Request(prompt, SamplingConfig(max_tokens=tokens + 1), 1))
        steps = [(len(outputs), time.perf_counter()) for outputs in iter(engine.step, [])]
    return statistics.median(
        (end - start) / num_tokens for (_, start), (num_tokens, end) in itertools.pairwise(steps)
    )


def _step_times(trainer: Trainer, seconds: float) -> list[float]:
    """Return the seconds of each step, without two warm-up steps."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        event = trainer.step()
        times.append(event.tokens / event.tokens_per_second)
    return times[2:]
