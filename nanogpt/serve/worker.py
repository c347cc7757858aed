"""A model with its engine, in a thread of its own.

In: requests, from coroutines. Out: the pieces of their texts, to the event loop, many at a time. Refuses: more texts than rows and queue hold.

The engine belongs to its thread. What others want of it goes in as functions through one queue, which the thread empties between two steps. What the steps
make goes back in one call a step at most, and where steps are quicker than an eye, in fewer: each call wakes the event loop, which then competes with the
engine for Python.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from nanogpt.serve.metrics import Metrics
from nanogpt.serve.wire import ApiError

if TYPE_CHECKING:  # they import PyTorch, which takes seconds
    from nanogpt.generate import Engine, Piece, Request, Text
    from nanogpt.library import Model

PAUSE = 0.02  # seconds between two deliveries, where nothing begins or ends: fifty a second look like a flow
LONGEST_RETRY = 30  # seconds that a client is asked to wait at most
Made = list[tuple[int, "Piece"]]  # pieces, each with the place of its text among those that were asked for
T = TypeVar("T")
log = logging.getLogger(__name__)


class Busy(ApiError):
    """There is no place; there should be one in so many seconds."""

    def __init__(self, seconds: float):
        wait = min(LONGEST_RETRY, max(1, math.ceil(seconds)))
        super().__init__(429, f"All places are taken. Try again in {wait} s.", code="rate_limit_exceeded", headers={"Retry-After": str(wait)})


class Job:
    """The texts that were asked for together. Belongs to the event loop."""

    def __init__(self, worker: "Worker", texts: int, streamed: bool, seconds: float):
        """After so many `seconds` they end as they are."""
        self.begun, self.unfinished, self.streamed, self.tokens = time.monotonic(), texts, streamed, 0
        self.writing_since = self.begun  # once it is
        self.begun_writing = False  # the thread's
        self._worker, self._news = worker, asyncio.Event()
        self._error: Exception | None = None
        self._made: Made = []
        self._timer = asyncio.get_running_loop().call_later(seconds, self.cancel)

    async def pieces(self) -> AsyncIterator[Made]:
        """All pieces, some at a time where they are `streamed`, and else all at once when the last text has ended."""
        while self.unfinished or self._made or self._error:
            await self._news.wait()
            self._news.clear()
            if self._error:
                raise self._error
            made, self._made = self._made, []
            yield made

    def cancel(self) -> None:
        """Give up what is unfinished; its rows are free after the engine's next step."""
        if self.unfinished:
            self._worker.cancel(self)

    def add(self, index: int, piece: "Piece") -> None:
        """Receive a piece of the text at this place."""
        self._made.append((index, piece))
        self.tokens += piece.token is not None
        self.unfinished -= piece.finish is not None
        if not self.unfinished:
            self._timer.cancel()
        if self.streamed or not self.unfinished:
            self._news.set()

    def fail(self, error: Exception) -> None:
        """Receive that there will be no more."""
        self.unfinished, self._error = 0, error
        self._timer.cancel()
        self._news.set()


class Worker:
    """An engine at work. Belongs to the event loop, but for the methods that say otherwise."""

    def __init__(
        self, name: str, load: Callable[[], "Model"], engine: Callable[["Model"], "Engine"], rows: int, queue_length: int, metrics: Metrics
    ):  # fmt: skip
        """`load` and `engine`, which make the model and its engine of so many rows, run in the worker's thread."""
        self.name, self.rows, self.places, self.open, self.users = name, rows, rows + queue_length, 0, 0
        self.model: Model
        self.context_length: int
        self._metrics, self._loop, self._text_seconds = metrics, asyncio.get_running_loop(), 1.0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, args=(load, engine), name=f"engine of {name}", daemon=True)
        self._thread.start()

    async def loaded(self) -> None:
        """Wait until the model is there. Errors: what loading it raised."""
        with self.used():
            await asyncio.shield(self._loaded)  # others wait for it too

    def submit(self, requests: Sequence["Request"], streamed: bool, seconds: float) -> Job:
        """Have texts written, for at most so many seconds. Errors: `Busy` where there is no place for all of them."""
        if self.open + len(requests) > self.places:
            raise self.busy()
        self.open += len(requests)
        job = Job(self, len(requests), streamed, seconds)
        self._inbox.put(lambda: self._add(job, requests))
        return job

    def busy(self) -> Busy:
        """What to tell who finds no place: when the line should have moved by a row of texts."""
        return Busy(self._text_seconds * max(1.0, self.waiting / self.rows))

    def cancel(self, job: Job | None) -> None:
        """Give up what is unfinished of a job, or of all."""
        self._inbox.put(lambda: self._cancel(job))

    async def call(self, function: Callable[["Model"], T]) -> T:
        """What the function makes of the model, in the engine's thread, between two steps. Errors: its own."""
        made: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                result = function(self.model)
            except Exception as error:
                self._tell(_settle, made, None, error)
            else:
                self._tell(_settle, made, result, None)

        self._inbox.put(run)
        with self.used():
            return await made

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep it at work, even if no text is under way."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not self.open and not self.users

    @property
    def active(self) -> int:
        """Rows that are taken."""
        return min(self.open, self.rows)

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return self.open - self.active

    def retire(self) -> None:
        """Have the thread end after its current step."""
        self._inbox.put(None)

    async def close(self) -> None:
        """Have the thread end, and wait for it."""
        self.retire()
        await asyncio.to_thread(self._thread.join, 10)

    def _deliver(self, made: list[tuple[Job, int, "Piece"]], first: list[Job]) -> None:
        """Receive what the thread made, on the event loop."""
        now = time.monotonic()
        for job in first:
            job.writing_since = now
            self._metrics.first_token.observe(now - job.begun)
        for job, index, piece in made:
            if piece.finish is not None:
                self.open -= 1
                self._text_seconds += 0.1 * (now - job.writing_since - self._text_seconds)  # without the wait in the line, which is foreseen from it
            job.add(index, piece)
        self._metrics.count_tokens(self.name, "completion", sum(piece.token is not None for _, _, piece in made))

    def _give_up(self, jobs: list[Job], texts: int, error: Exception) -> None:
        self.open -= texts
        for job in jobs:
            job.fail(error)

    # What follows belongs to the thread.

    def _tell(self, function: Callable[..., None], *values: Any) -> None:
        """Call a function on the event loop, if that still runs."""
        try:
            self._loop.call_soon_threadsafe(function, *values)
        except RuntimeError:  # it is closed: nobody waits any more
            log.debug("The server has ended before %s.", self.name)

    def _work(self, load: Callable[[], "Model"], engine: Callable[["Model"], "Engine"]) -> None:
        try:
            self.model = load()
            self._engine = engine(self.model)
            self.context_length = self._engine.decoder.context_length
        except Exception as error:
            self._tell(_settle, self._loaded, None, error)
            return
        self._tell(_settle, self._loaded, None, None)
        self._texts: dict[Text, tuple[Job, int]] = {}
        self._made: list[tuple[Job, int, Piece]] = []
        self._first: list[Job] = []
        self._delivered = 0.0
        while True:
            try:
                if not self._take_orders():
                    return
                self._step()
            except Exception as error:  # a defect of ours, or no memory: these texts are lost, the next ones need not be
                log.exception("The engine of %s failed.", self.name)
                jobs = list({job: None for job, _ in self._texts.values()})
                self._tell(self._give_up, jobs, len(self._texts), error)
                self._texts, self._made, self._first = {}, [], []
                self._engine = engine(self.model)

    def _take_orders(self) -> bool:
        """Do what came in; without a text to write, wait for it. False at the end."""
        while True:
            try:
                order = self._inbox.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _add(self, job: Job, requests: Sequence["Request"]) -> None:
        try:
            self._texts |= {self._engine.add(request): (job, index) for index, request in enumerate(requests)}
        except Exception as error:
            self._tell(self._give_up, [job], len(requests), error)
            raise  # some may be in the engine, which has to be made anew

    def _cancel(self, job: Job | None) -> None:
        for text, (of, _) in self._texts.items():
            if job is None or of is job:
                text.cancel()

    def _step(self) -> None:
        urgent = False
        for piece in self._engine.step():
            job, index = self._texts[piece.of]
            if not job.begun_writing:
                job.begun_writing = urgent = True
                self._first.append(job)
            if piece.finish is not None:
                del self._texts[piece.of]
                urgent = True
            self._made.append((job, index, piece))
        now = time.monotonic()
        if self._made and (urgent or now - self._delivered >= PAUSE):
            self._tell(self._deliver, self._made, self._first)
            self._made, self._first, self._delivered = [], [], now


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if not future.done():  # who waited for it may be gone
        future.set_result(result) if error is None else future.set_exception(error)
