"""The served models: found by name, and loaded on first use."""

import difflib
from pathlib import Path

from nanogpt.config import DeviceConfig, ServeConfig
from nanogpt.errors import UserError
from nanogpt.server.async_engine import AsyncEngine, capacity_error
from nanogpt.server.metrics import Metrics
from nanogpt.server.schemas import ApiError

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
        # The engines of the loaded models by name; the least recently used comes first.
        self.engines: dict[str, AsyncEngine] = {}
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

    def find(self, name: str) -> Path:
        """Return the file of a model. Raises `ApiError` if there is none of this name."""
        files = self.files()
        if name in files:
            return files[name]
        if matches := difflib.get_close_matches(name, files, n=1):
            fix = f"Did you mean {matches[0]!r}?"
        elif files:
            fix = f"Use one of: {', '.join(sorted(files)[:20])}."
        else:
            fix = "The server has no models yet."
        message = f"There is no model {name[:80]!r}. {fix}"
        raise ApiError(404, message, "model", "model_not_found")

    @property
    def single_model(self) -> str | None:
        """Name of the model, or None if a folder of runs is served."""
        is_single = self.path.is_file() or (self.path / "model.safetensors").is_file()
        return next(iter(self.files())) if is_single else None

    async def get_engine(self, name: str) -> AsyncEngine:
        """Return the engine of a model, and load the model if necessary.

        A model file that changed is reloaded once no request uses the old engine. A caller that
        awaits anything before it submits a job must pin the engine.

        Raises:
            ApiError: If there is no such model, or `MAX_LOADED` other models are in use.
            UserError: If the file holds no valid model.
        """
        file = self.find(name)
        engine = self.engines.get(name)
        if engine is not None and engine.is_idle and engine.is_outdated:
            engine.stop()
            engine = None
        self.engines.pop(name, None)  # Added again below, as the most recently used.
        if engine is None:
            self._evict_idle()
            engine = AsyncEngine(name, file, self.config, self.device_config, self.metrics)
        self.engines[name] = engine
        try:
            await engine.wait_until_loaded()
        except UserError:
            if self.engines.get(name) is engine:
                del self.engines[name]
            raise
        return engine

    def cancel_all(self) -> None:
        """End all sequences with the text so far."""
        for engine in self.engines.values():
            engine.cancel(None)

    async def close(self) -> None:
        """Stop all engines."""
        for engine in list(self.engines.values()):  # Requests may load or unload one meanwhile.
            await engine.close()

    def _evict_idle(self) -> None:
        """Unload the least recently used idle model if `MAX_LOADED` are loaded."""
        if len(self.engines) < MAX_LOADED:
            return
        idle = next((name for name, engine in self.engines.items() if engine.is_idle), None)
        if idle is None:
            raise capacity_error(1.0)
        self.engines.pop(idle).stop()
