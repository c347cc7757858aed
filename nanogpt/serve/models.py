"""The models that are served: which there are, by name, and each loaded once, when it is first asked for.

In: a model file, a run folder, or a folder of runs. Out: a `Worker` for a name. Refuses: names that are not in the list, which are never made into paths.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.config import PlaceConfig, ServeConfig
from nanogpt.errors import UserError
from nanogpt.serve.metrics import Metrics
from nanogpt.serve.worker import Busy, Worker

if TYPE_CHECKING:
    from nanogpt.library import Model

LOADED = 4  # models at a time; each has the keys and values of all its rows


class Models:
    """The models in a folder, and those of them that are at work. Belongs to one event loop."""

    def __init__(self, path: Path, settings: ServeConfig = ServeConfig(), place: PlaceConfig = PlaceConfig()):
        """Errors: `UserError` where there is neither a model nor a run."""
        self.path, self.settings, self.place = path, settings, place
        self.metrics = Metrics()
        self._workers: dict[str, tuple[Worker, tuple[int, int]]] = {}  # with the file's time and size; the last asked for at the end
        if not path.exists():
            raise UserError(f"There is no model or folder of runs at {path.absolute()}.", "Train a model with: nanogpt train TEXT")
        if path.is_dir() and not self.files() and not any(path.glob("config.toml")) and not any(path.glob("*/config.toml")):
            raise UserError(f"The folder {path.absolute()} holds neither a model nor runs.", "Train a model with: nanogpt train TEXT")

    def files(self) -> dict[str, Path]:
        """The model files by the names of their run folders, as they are now: one in training may come."""
        if self.path.is_file():
            return {self.path.absolute().parent.name if self.path.name == "model.safetensors" else self.path.stem: self.path}
        found = [self.path / "model.safetensors", *sorted(self.path.glob("*/model.safetensors"))]
        served = self.path.resolve()  # a link that leads out of it is none of the models
        return {file.absolute().parent.name: file for file in found if file.is_file() and file.resolve().is_relative_to(served)}

    @property
    def names(self) -> list[str]:
        """What they are asked for by."""
        return list(self.files())

    @property
    def only(self) -> str | None:
        """The name of the model, where one and not a folder of runs is served."""
        return self.names[0] if self.path.is_file() or (self.path / "model.safetensors").is_file() else None

    @property
    def workers(self) -> list[Worker]:
        """Those at work."""
        return [worker for worker, _ in self._workers.values()]

    async def open(self, name: str) -> Worker:
        """The worker of a model, whose model is loaded. A model that training has replaced meanwhile is loaded anew as soon as no text is under way.

        Who does not submit or call at once keeps it with `Worker.used`.
        Errors: `KeyError` for a name that is not there, `UserError` for a file that holds no model, `Busy` where too many others are at work.
        """
        file = self.files()[name]
        state = file.stat()
        version = (state.st_mtime_ns, state.st_size)
        worker, loaded = self._workers.pop(name, (None, version))
        if worker is not None and loaded != version and worker.idle:
            worker.retire()
            worker = None
        if worker is None:
            self._make_room()
            worker, loaded = self._start(name, file), version
        self._workers[name] = (worker, loaded)
        try:
            await worker.loaded()
        except UserError:
            if self._workers.get(name, (None,))[0] is worker:
                del self._workers[name]
            raise
        return worker

    def cut_short(self) -> None:
        """Have all texts end where they are."""
        for worker in self.workers:
            worker.cancel(None)

    async def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            await worker.close()

    def _make_room(self) -> None:
        if len(self._workers) >= LOADED:
            idle = next((name for name, (worker, _) in self._workers.items() if worker.idle), None)
            if idle is None:
                raise Busy(1.0)
            self._workers.pop(idle)[0].retire()

    def _start(self, name: str, file: Path) -> Worker:
        def load() -> "Model":
            from nanogpt import library  # and PyTorch with it, which a folder of runs does without until a model is asked for

            return library.load(file, **self.place.model_dump(exclude_unset=True))

        rows = self.settings.rows
        return Worker(name, load, lambda model: model.engine(rows), rows, self.settings.queue, self.metrics)
