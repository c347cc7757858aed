"""Carry out a training run: plan it on rank 0, build the model, own the run folder, train."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanogpt import checkpoint
from nanogpt.config import Config
from nanogpt.data.prepare import PreparedData
from nanogpt.data.sources import absolute_source
from nanogpt.device import device, measurements, memory
from nanogpt.device.device import Machine
from nanogpt.distributed import launch
from nanogpt.distributed.context import DistContext
from nanogpt.errors import Notice, UserError
from nanogpt.files import file_lock, remove_stale_temp_files, require_space, write_text
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.plan.model_size import flops_per_token
from nanogpt.run_folder import RunFolder
from nanogpt.training import finetune
from nanogpt.training.events import Event, Interrupted, StopRequested, TrainStart
from nanogpt.training.jsonl_logger import log_event
from nanogpt.training.recipe import ChosenSetting
from nanogpt.training.resolve import TrainRequest, resolve_run
from nanogpt.training.run_data import open_same_data
from nanogpt.training.setup import build_model_and_optimizer, fit_to_memory
from nanogpt.training.state import TrainState
from nanogpt.training.trainer import RunContext, Trainer

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class TrainResult:
    """The best model of a finished run, with the text and the machine that trained it."""

    model: checkpoint.LoadedModel
    machine: Machine
    run: Path
    prepared: PreparedData


@dataclass(frozen=True)
class SharedPlan:
    """The decisions that every rank needs."""

    config: Config
    prepared: PreparedData
    machine: Machine
    resuming: bool
    has_init_checkpoint: bool


@dataclass(frozen=True)
class RunPlan:
    """The decisions of rank 0, made before a model is built."""

    shared: SharedPlan
    choices: list[ChosenSetting]
    required_bytes: float
    free_bytes: float | None
    init_checkpoint: checkpoint.LoadedModel | None
    resume_mode: dict[str, bool]
    user_settings: dict[str, Any]


def run_training(
    request: TrainRequest,
    listeners: Sequence[Listener] = (),
    on_end: Callable[[Path, TrainResult | None], None] = lambda run, result: None,
) -> TrainResult:
    """Train on this rank, together with all others if there are several.

    Args:
        request: What to train on, where, and with which settings.
        listeners: Called on rank 0 with every event.
        on_end: Called on rank 0 while the run folder is still locked, with the folder and the
            result, or None after an interruption. It is not called without `request.out`.

    Returns:
        The best model by validation loss. With parallel = "fsdp" it stays sharded.

    Raises:
        UserError: If the run cannot start or continue.
        KeyboardInterrupt: After SIGINT, when the state is saved.
        SystemExit: After SIGTERM or SIGHUP, when the state is saved.
    """
    requested_device = str(request.merged_settings(resuming=True).get("device", "auto"))
    context = launch.init_distributed(requested_device)
    with context.peer_failure_guard(), ExitStack() as stack:
        context.check_same_on_all_ranks(request.cross_rank_fingerprint())
        run = request.out or Path(stack.enter_context(TemporaryDirectory(prefix="nanogpt-")))
        plan = context.run_on_main(lambda: plan_run(run, request, context))
        shared = broadcast_plan(plan, context)
        is_fsdp = context.world_size > 1 and shared.config.device.parallel == "fsdp"
        context = replace(context, is_fsdp=is_fsdp)
        model, optimizer, state = _load_training_state(run, request, plan, shared, context, stack)
        train_start = None
        if plan:
            plan = replace(plan, init_checkpoint=None)  # frees its memory
            write_run_metadata(run, shared.config, shared.prepared, context.run_id)
            # Peak FLOP/s may be measured here: until signals are caught, Ctrl-C ends it at once.
            train_start = _train_start(run, plan, state.step, model, context)
        listeners = [partial(log_event, RunFolder(run)), *listeners] if plan else []

        def emit(event: Event) -> None:
            for listener in listeners:
                listener(event)

        signals: list[int] = []
        if request.out:
            # Under torchrun, a rank can get the same Ctrl-C twice.
            signals = stack.enter_context(catch_stop_signals(emit, once=context.run_id == ""))
        run_context = RunContext(
            run, shared.machine, request.start_time, lambda: bool(signals), context
        )
        settings = shared.config.training
        trainer = Trainer(model, optimizer, shared.prepared, settings, state, run_context)
        if train_start:
            emit(train_start)
        event: Event | None = None
        for event in trainer.train():
            emit(event)
        result = None
        if not isinstance(event, Interrupted):
            final_model = load_final_model(run, shared, model, context)
            result = TrainResult(final_model, shared.machine, run, shared.prepared)
        if plan and request.out:
            on_end(run, result)
        if result is None:
            # Without a signal on this rank, another rank received one.
            number = signals[0] if signals else signal.SIGTERM
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        return result


def _load_training_state(
    run: Path,
    request: TrainRequest,
    plan: RunPlan | None,
    shared: SharedPlan,
    context: DistContext,
    stack: ExitStack,
) -> tuple[GPT, Optimizer, TrainState]:
    """Build the model, take the run folder, and load the saved state or the initial checkpoint."""
    config, prepared = shared.config, shared.prepared
    with memory.explain_oom(f"a model of this shape: {config.model}"):
        model, optimizer = build_model_and_optimizer(
            config, prepared.tokenizer.vocab_size, shared.machine, context
        )
    context.run_on_main(
        lambda: plan and stack.enter_context(own_run_folder(run, request, plan, model))
    )
    state = TrainState()
    if shared.resuming:
        state = TrainState.from_json(checkpoint.load_state(run, model, optimizer, context))
    if shared.has_init_checkpoint:
        init_model = plan.init_checkpoint.model if plan and plan.init_checkpoint else None
        checkpoint.load_weights(model, init_model, context)
        prepared.metadata["init_from"] = absolute_source(request.init_from or "")
    return model, optimizer, state


def plan_run(run: Path, request: TrainRequest, context: DistContext) -> RunPlan:
    """Check that the run folder may be used, and decide everything that building a model needs.

    Raises:
        UserError: If the folder, the settings, the text or the memory do not allow the run.
    """
    mode = resume_mode(run, request, context)
    RunFolder(run).check_writable(**mode)
    resuming = mode["resume"] and checkpoint.latest_step(run) is not None
    if request.resume and not resuming:
        if not request.sources:
            raise _nothing_to_resume_error(run)
        warnings.warn(
            f"There is no saved state in {run}: training starts at step 0.", Notice, stacklevel=2
        )
    user_settings = request.merged_settings(resuming)
    init_checkpoint = None
    if request.init_from is not None and not resuming:
        init_checkpoint = finetune.load_init_checkpoint(request.init_from, user_settings)
    config, prepared, machine, choices = resolve_run(
        run, request, user_settings, resuming, init_checkpoint, context
    )
    config, required_bytes, free_bytes, memory_choices = fit_to_memory(
        config, prepared.tokenizer.vocab_size, machine, context
    )
    return RunPlan(
        SharedPlan(config, prepared, machine, resuming, init_checkpoint is not None),
        choices + memory_choices,
        required_bytes,
        free_bytes,
        init_checkpoint,
        mode,
        user_settings,
    )


def resume_mode(run: Path, request: TrainRequest, context: DistContext) -> dict[str, bool]:
    """Return whether to resume and whether to overwrite.

    If torchrun restarted this very run after a process died, it resumes from its last save, or
    starts again where nothing was saved.
    """
    resume, overwrite = request.resume, request.overwrite
    with suppress(OSError):
        run_id = RunFolder(run).run_id_path
        if context.is_restart and run_id.read_text(encoding="utf-8") == context.run_id:
            resume = checkpoint.latest_step(run) is not None
            overwrite = not resume
    return {"resume": resume, "overwrite": overwrite}


def broadcast_plan(plan: RunPlan | None, context: DistContext) -> SharedPlan:
    """Return the decisions of rank 0 on every rank.

    Only names and settings are sent. Other machines open the text where it is, or prepare it.
    """
    if context.world_size == 1:
        assert plan is not None
        return plan.shared
    message = plan and [
        plan.shared.config.model_dump(),
        plan.shared.prepared.metadata,
        plan.shared.resuming,
        plan.init_checkpoint and plan.init_checkpoint.tokenizer.to_json(),
    ]
    settings, metadata, resuming, tokenizer = context.broadcast_object(message)
    config = Config.model_validate(settings)

    def open_data() -> PreparedData:
        if plan:
            return plan.shared.prepared
        return open_same_data(metadata, config, tokenizer, context.rank)

    prepared = context.local_main_process_first(open_data)
    machine = device.select_device(config.device, context.local_rank, context.local_world_size)
    return SharedPlan(config, prepared, machine, resuming, tokenizer is not None)


@contextmanager
def own_run_folder(run: Path, request: TrainRequest, plan: RunPlan, model: GPT) -> Iterator[None]:
    """Lock the run folder, and remove the files of an overwritten run.

    Raises:
        UserError: If the disk is too full, the folder is in use, or a resume does not fit it.
    """
    # The model and its optimizer state both exist twice while they are replaced.
    require_space(run, 8 * sum(p.nbytes for p in model.parameters()))
    with file_lock(RunFolder(run).lock_path):
        # Another process may have used the folder since it was first checked.
        RunFolder(run).check_writable(**plan.resume_mode)
        if plan.shared.resuming:
            _check_resume_request(run, request, plan)
        else:
            RunFolder(run).clear()
        del plan  # This frame would otherwise keep the initial checkpoint in memory.
        yield


def write_run_metadata(run: Path, config: Config, prepared: PreparedData, run_id: str) -> None:
    """Write config.toml, data.json and the id of a torchrun launch."""
    remove_stale_temp_files(run, older_than=0)
    folder = RunFolder(run)
    folder.write_config(config)
    folder.write_data(prepared.metadata)
    if run_id:
        write_text(folder.run_id_path, run_id)


def load_final_model(
    run: Path, shared: SharedPlan, model: GPT, context: DistContext
) -> checkpoint.LoadedModel:
    """Load the best model on every rank; only rank 0 needs to see its file.

    With FSDP the model stays sharded, because it may fit into the memory of no single rank.
    """
    tokenizer = shared.prepared.tokenizer
    if context.is_fsdp:
        metadata = context.run_on_main(lambda: checkpoint.read_metadata(run)[0])
        summary = context.broadcast_object(metadata)
        return checkpoint.LoadedModel(model.eval(), tokenizer, summary)
    machine = shared.machine
    loaded = context.run_on_main(lambda: checkpoint.load(run, machine.device))
    best = loaded.model if loaded else None
    final_model = best or checkpoint.build_uninitialized(
        model.config, model.vocab_size, machine.device
    )
    checkpoint.load_weights(final_model, best, context)
    final_model.normalize_embedding = False  # The rows in the file are normalized.
    summary = context.broadcast_object(loaded and loaded.summary)
    return checkpoint.LoadedModel(final_model.eval(), tokenizer, summary)


@contextmanager
def catch_stop_signals(emit: Listener, once: bool = True) -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of ending the process.

    Args:
        emit: Called with `StopRequested` at the first signal, inside the signal handler.
        once: Restore the previous handlers after the first signal, so that a second one ends the
            process. Under torchrun, which repeats signals, it is False.
    """
    received: list[int] = []
    # Only the main thread may set signal handlers.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if once:
            restore()
        if len(received) == 1:
            emit(StopRequested())

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        restore()


def _train_start(
    run: Path, plan: RunPlan, step: int, model: GPT, context: DistContext
) -> TrainStart:
    config, machine = plan.shared.config, plan.shared.machine
    description = str(machine)
    if context.world_size > 1:
        parallel = config.device.parallel
        description += f", {context.world_size} processes ({context}, {parallel})"
    return TrainStart(
        run=str(run),
        step=step,
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        data=plan.shared.prepared.metadata,
        machine=description,
        flops_per_token=flops_per_token(config.model, model.vocab_size),
        peak_flops=context.world_size * measurements.peak_flops(machine.device, machine.dtype),
        choices=plan.choices,
        required_bytes=plan.required_bytes,
        free_bytes=plan.free_bytes,
    )


def _nothing_to_resume_error(run: Path) -> UserError:
    runs = sorted(str(path.parent.parent) for path in run.parent.glob("*/state/latest"))
    fix = (
        f"Runs that can be resumed: {', '.join(runs[:10])}."
        if runs
        else "Start one: nanogpt train TEXT"
    )
    return UserError(f"There is no run to resume in {run}.", fix)


def _check_resume_request(run: Path, request: TrainRequest, plan: RunPlan) -> None:
    """Check the initial checkpoint and the time budget of a run that is resumed."""
    init_from = plan.shared.prepared.metadata.get("init_from")
    if request.init_from is not None and absolute_source(request.init_from) != init_from:
        raise UserError(
            f"The run in {run} has another initial checkpoint: {init_from or 'none'} "
            f"(requested {request.init_from}).",
            "Leave out init_from.",
        )
    elapsed_minutes = checkpoint.elapsed_seconds(run) / 60
    minutes = plan.user_settings.get("minutes")
    if minutes is not None and minutes < elapsed_minutes:
        raise UserError(
            f"The run in {run} has already taken {elapsed_minutes:.2g} minutes "
            f"(limit minutes = {minutes:g}).",
            {"minutes": float(f"{2 * elapsed_minutes:.2g}")},
        )
