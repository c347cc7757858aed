"""An asyncio interface to the generation engine of one model.

The engine runs in its own thread. Callers enqueue functions, and the thread drains the queue
between steps. Outputs are delivered at most every 20 ms, because each delivery wakes the event loop
and competes for the GIL.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanogpt.config import DeviceConfig, ServeConfig
from nanogpt.server.metrics import Metrics
from nanogpt.server.schemas import ApiError

if TYPE_CHECKING:  # Importing PyTorch takes seconds.
    from nanogpt.api import Model
    from nanogpt.generate.engine import Engine
    from nanogpt.generate.sequence import Request, Sequence, StepOutput

DELIVERY_INTERVAL = 0.02  # seconds
MAX_RETRY_AFTER = 30  # seconds

# Outputs with the indices of their sequences within the job.
IndexedOutputs = list[tuple[int, "StepOutput"]]
T = TypeVar("T")
log = logging.getLogger(__name__)


def capacity_error(seconds: float) -> ApiError:
    """Return the error of a server at capacity: 429 with Retry-After."""
    wait = min(MAX_RETRY_AFTER, max(1, math.ceil(seconds)))
    message = f"The server is at capacity. Retry in {wait} s."
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(wait)})


class GenerationJob:
    """The sequences of one request. Used on the event loop only.

    Args:
        engine: The engine that generates the sequences.
        num_sequences: Number of sequences.
        streamed: Deliver outputs as they come, not all at the end.
        timeout: Seconds after which the sequences end with the text so far.
    """

    def __init__(self, engine: "AsyncEngine", num_sequences: int, streamed: bool, timeout: float):
        self.submitted_at = time.monotonic()
        # The time of the first output.
        self.started_at: float | None = None
        self.unfinished = num_sequences
        self.streamed = streamed
        self.num_tokens = 0
        self.first_token_sent = False  # used by the engine's thread only
        self._engine = engine
        self._event = asyncio.Event()
        self._error: Exception | None = None
        self._outputs: IndexedOutputs = []
        self._timer = asyncio.get_running_loop().call_later(timeout, self.cancel)

    async def stream(self) -> AsyncIterator[IndexedOutputs]:
        """Yield lists of outputs until all sequences have finished.

        Raises:
            Exception: Any error of the engine.
        """
        while self.unfinished or self._outputs or self._error:
            await self._event.wait()
            self._event.clear()
            if self._error:
                raise self._error
            outputs, self._outputs = self._outputs, []
            yield outputs

    def cancel(self) -> None:
        """Cancel unfinished sequences; the engine's next step frees their rows."""
        if self.unfinished:
            self._engine.cancel(self)

    def add(self, index: int, output: "StepOutput") -> None:
        """Receive an output of the sequence with this index."""
        self._outputs.append((index, output))
        self.num_tokens += output.token_id is not None
        self.unfinished -= output.finish_reason is not None
        if not self.unfinished:
            self._timer.cancel()
        if self.streamed or not self.unfinished:
            self._event.set()

    def fail(self, error: Exception) -> None:
        """End the job with an error."""
        self.unfinished = 0
        self._error = error
        self._timer.cancel()
        self._event.set()


class AsyncEngine:
    """A model and its engine in a thread. Public methods are for the event loop.

    Args:
        name: The model's name.
        file: The model file, which is loaded in the engine's thread.
        config: Settings of the server.
        device_config: Settings for loading the model.
        metrics: Receives token counts and times to the first token.
    """

    def __init__(
        self,
        name: str,
        file: Path,
        config: ServeConfig,
        device_config: DeviceConfig,
        metrics: Metrics,
    ):
        self.name = name
        self.max_batch_size = config.max_batch_size
        self.capacity = config.max_batch_size + config.max_queue
        self.in_flight = 0
        self.pins = 0
        self.model: Model
        self.context_length: int
        self._file = file
        self._file_version = _file_version(file)
        self._device_config = device_config
        self._timeout = config.timeout
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        # Moving average of the seconds from a sequence's first token to its last.
        self._sequence_seconds = 1.0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loaded: Future[None] = Future()
        # Several requests wait for it; now none of them can cancel it.
        self._loaded.set_running_or_notify_cancel()

        # State of the engine's thread: running and queued sequences, and undelivered outputs.
        self._engine: Engine
        self._sequences: dict[Sequence, tuple[GenerationJob, int]] = {}
        self._outputs: list[tuple[GenerationJob, int, StepOutput]] = []
        self._delivered_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"engine of {name}", daemon=True)
        self._thread.start()

    async def wait_until_loaded(self) -> None:
        """Wait until the model is loaded, or raise the error of loading it."""
        with self.pinned():
            await asyncio.wrap_future(self._loaded)

    def submit(self, requests: Collection["Request"], streamed: bool) -> GenerationJob:
        """Enqueue the requests of one job.

        Raises:
            ApiError: If they exceed the engine's remaining capacity.
        """
        if self.in_flight + len(requests) > self.capacity:
            raise self.busy_error()
        self.in_flight += len(requests)
        job = GenerationJob(self, len(requests), streamed, self._timeout)
        self._inbox.put(lambda: self._add(job, requests))
        return job

    def busy_error(self) -> ApiError:
        """Return the error for a full queue, with the estimated time until it advances."""
        batches = max(1.0, self.waiting / self.max_batch_size)
        return capacity_error(self._sequence_seconds * batches)

    def cancel(self, job: GenerationJob | None) -> None:
        """Cancel the unfinished sequences of a job, or of all jobs."""
        self._inbox.put(lambda: self._cancel(job))

    async def call(self, function: Callable[["Model"], T]) -> T:
        """Return `function(model)`, computed in the engine's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.model))
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        with self.pinned():
            return await asyncio.wrap_future(future)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the engine loaded, even without sequences in flight."""
        self.pins += 1
        try:
            yield
        finally:
            self.pins -= 1

    @property
    def is_idle(self) -> bool:
        """True if no request uses this engine."""
        return not self.in_flight and not self.pins

    @property
    def is_outdated(self) -> bool:
        """True if the model file has changed since this engine started."""
        return _file_version(self._file) != self._file_version

    @property
    def running(self) -> int:
        """Number of sequences being generated."""
        return min(self.in_flight, self.max_batch_size)

    @property
    def waiting(self) -> int:
        """Number of queued sequences."""
        return self.in_flight - self.running

    def stop(self) -> None:
        """End the thread after its current step."""
        self._inbox.put(None)

    async def close(self) -> None:
        """End the thread and wait for it."""
        self.stop()
        await asyncio.to_thread(self._thread.join, 10)

    def _deliver(self, outputs: list[tuple[GenerationJob, int, "StepOutput"]]) -> None:
        """Receive outputs on the event loop."""
        now = time.monotonic()
        for job, index, output in outputs:
            if job.started_at is None:
                job.started_at = now
                self._metrics.first_token.observe(now - job.submitted_at)
            if output.finish_reason is not None:
                self.in_flight -= 1
                # Time in the queue is not part of it, because it is predicted from it.
                seconds = now - job.started_at
                self._sequence_seconds += 0.1 * (seconds - self._sequence_seconds)
            job.add(index, output)
        num_tokens = sum(output.token_id is not None for _, _, output in outputs)
        self._metrics.count_tokens(self.name, "completion", num_tokens)

    def _fail_jobs(self, jobs: Collection[GenerationJob], error: Exception) -> None:
        """Receive an error on the event loop."""
        for job in jobs:
            self.in_flight -= job.unfinished
            job.fail(error)

    # Methods below run in the engine's thread.

    def _call_in_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # The loop is closed.
            log.debug("The server ended before the engine of %s.", self.name)

    def _run(self) -> None:
        try:
            # Imports PyTorch, which a folder of runs does not need until a model is used.
            from nanogpt import api

            self.model = api.load(self._file, **self._device_config.model_dump(exclude_unset=True))
            self._engine = self.model.create_engine(self.max_batch_size)
            self.context_length = self._engine.decoder.context_length
        except Exception as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        while True:
            try:
                if not self._drain_inbox():
                    return
                self._step()
            except Exception as error:
                # A bug, or out of memory: these sequences are lost, but later ones can succeed.
                log.exception("The engine of %s failed.", self.name)
                jobs = {job for job, _ in self._sequences.values()}
                self._call_in_loop(self._fail_jobs, jobs, error)
                self._sequences = {}
                self._outputs = []
                self._engine = self.model.create_engine(self.max_batch_size)

    def _drain_inbox(self) -> bool:
        """Run queued functions, and block while the engine is idle. Return False to stop."""
        while True:
            try:
                function = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if function is None:
                return False
            function()

    def _add(self, job: GenerationJob, requests: Collection["Request"]) -> None:
        try:
            added = {self._engine.add(request): (job, i) for i, request in enumerate(requests)}
        except Exception as error:
            self._call_in_loop(self._fail_jobs, [job], error)
            # The engine may hold some of the sequences, so the caller replaces it.
            raise
        self._sequences |= added

    def _cancel(self, job: GenerationJob | None) -> None:
        for sequence, (owner, _) in self._sequences.items():
            if job is None or owner is job:
                sequence.cancel()

    def _step(self) -> None:
        """Run one step, and deliver outputs if a sequence starts or ends, or at intervals."""
        is_urgent = False
        for output in self._engine.step():
            job, index = self._sequences[output.sequence]
            if not job.first_token_sent:
                job.first_token_sent = True
                is_urgent = True
            if output.finish_reason is not None:
                del self._sequences[output.sequence]
                is_urgent = True
            self._outputs.append((job, index, output))
        now = time.monotonic()
        if self._outputs and (is_urgent or now - self._delivered_at >= DELIVERY_INTERVAL):
            self._call_in_loop(self._deliver, self._outputs)
            self._outputs = []
            self._delivered_at = now


def _file_version(file: Path) -> tuple[int, int]:
    """Return the time and the size of a file."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
