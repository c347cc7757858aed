"""The served models: found by name, and loaded on first use."""

from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt.config import DeviceConfig, ServeConfig
from nanogpt.errors import UserError
from nanogpt.server.async_engine import AsyncEngine, TooManyRequestsError
from nanogpt.server.metrics import Metrics

if TYPE_CHECKING:
    from nanogpt.api import Model

# Models loaded at a time; each has its own KV cache for all rows.
MAX_LOADED = 4


class ModelPool:
    """The models in a folder and the engines of the loaded ones. Used on one event loop only.

    Args:
        path: A model file, a run folder, or a folder of runs.
        config: Settings of the server.
        device_config: Settings for loading models.

    Raises:
        UserError: If the path holds neither a model nor a run.
    """

    def __init__(
        self,
        path: Path,
        config: ServeConfig = ServeConfig(),
        device_config: DeviceConfig = DeviceConfig(),
    ):
        self.path = path
        self.config = config
        self.device_config = device_config
        self.metrics = Metrics()
        # Each with its file's time and size; the least recently used comes first.
        self._engines: dict[str, tuple[AsyncEngine, tuple[int, int]]] = {}
        fix = "Train a model with: nanogpt train TEXT"
        if not path.exists():
            raise UserError(f"There is no model or folder of runs at {path.absolute()}.", fix)
        is_run = any(path.glob("config.toml")) or any(path.glob("*/config.toml"))
        if path.is_dir() and not is_run and not self.files():
            raise UserError(f"The folder {path.absolute()} holds neither a model nor runs.", fix)

    def files(self) -> dict[str, Path]:
        """Return the current model files by name, which is that of the run folder.

        Names in requests are only looked up here, and never become paths.
        """
        if self.path.is_file():
            is_run = self.path.name == "model.safetensors"
            return {self.path.absolute().parent.name if is_run else self.path.stem: self.path}
        paths = [self.path / "model.safetensors", *sorted(self.path.glob("*/model.safetensors"))]
        root = self.path.resolve()
        # Links that lead out of the folder are not served.
        return {
            file.absolute().parent.name: file
            for file in paths
            if file.is_file() and file.resolve().is_relative_to(root)
        }

    @property
    def names(self) -> list[str]:
        """Names of the current models."""
        return list(self.files())

    @property
    def single_model(self) -> str | None:
        """Name of the model, or None if a folder of runs is served."""
        is_single = self.path.is_file() or (self.path / "model.safetensors").is_file()
        return self.names[0] if is_single else None

    @property
    def engines(self) -> list[AsyncEngine]:
        """Engines of the loaded models."""
        return [engine for engine, _ in self._engines.values()]

    async def get_engine(self, name: str) -> AsyncEngine:
        """Return the engine of a model, and load the model if necessary.

        A model file that changed is reloaded once no request uses the old engine. A caller that
        awaits anything before it submits a job must pin the engine.

        Raises:
            KeyError: If there is no such model.
            UserError: If the file holds no valid model.
            TooManyRequestsError: If `MAX_LOADED` other models are in use.
        """
        file = self.files()[name]
        stat = file.stat()
        version = (stat.st_mtime_ns, stat.st_size)
        engine, loaded_version = self._engines.pop(name, (None, version))
        if engine is not None and loaded_version != version and engine.is_idle:
            engine.stop()
            engine = None
        if engine is None:
            self._evict_idle()
            engine = self._start_engine(name, file)
            loaded_version = version
        self._engines[name] = (engine, loaded_version)
        try:
            await engine.wait_until_loaded()
        except UserError:
            if self._engines.get(name, (None,))[0] is engine:
                del self._engines[name]
            raise
        return engine

    def cancel_all(self) -> None:
        """End all sequences with the text so far."""
        for engine in self.engines:
            engine.cancel(None)

    async def close(self) -> None:
        """Stop all engines."""
        for engine in self.engines:
            await engine.close()

    def _evict_idle(self) -> None:
        """Unload the least recently used idle model if `MAX_LOADED` are loaded."""
        if len(self._engines) < MAX_LOADED:
            return
        idle = [name for name, (engine, _) in self._engines.items() if engine.is_idle]
        if not idle:
            raise TooManyRequestsError(1.0)
        engine, _ = self._engines.pop(idle[0])
        engine.stop()

    def _start_engine(self, name: str, file: Path) -> AsyncEngine:
        def load() -> "Model":
            # Imports PyTorch, which a folder of runs does not need until a model is used.
            from nanogpt import api

            return api.load(file, **self.device_config.model_dump(exclude_unset=True))

        max_batch_size = self.config.max_batch_size
        return AsyncEngine(
            name,
            load,
            lambda model: model.create_engine(max_batch_size),
            max_batch_size,
            self.config.max_queue,
            self.metrics,
        )
