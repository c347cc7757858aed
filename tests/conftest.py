"""Fixtures: a cache folder per test, tiny models, and a text that a model can learn."""

import os
import random
import shutil
import signal
from contextlib import suppress

# Before torch is imported: a second thread only slows tiny tensors down.
os.environ["OMP_NUM_THREADS"] = "1"

import filelock
import hypothesis
import pytest
import torch

from nanogpt import checkpoint
from nanogpt.config import ModelConfig, TrainDeviceConfig
from nanogpt.device.device import select_device
from nanogpt.device.measurements import peak_flops

hypothesis.settings.register_profile("nanogpt", deadline=None)  # No test depends on speed.
hypothesis.settings.load_profile("nanogpt")


def pytest_collection_modifyitems(items):
    """Mark the tests that open a browser."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def measured(tmp_path_factory, worker_id):
    """A cache folder with the measurements and compiled kernels of this machine, for all tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "measured"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / "lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for dtype in (torch.float32, torch.bfloat16):
            peak_flops(torch.device("cpu"), dtype)
        with suppress(ImportError):
            from nanogpt.generate.numba_kernels.microkernel import cache_folder

            cache_folder().mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _cache_per_test(tmp_path_factory, monkeypatch, measured):
    folder = tmp_path_factory.mktemp("cache")
    cache = folder / "nanogpt"
    cache.mkdir()
    shutil.copy(measured / "nanogpt" / "measurements.json", cache)
    for kernels in (measured / "nanogpt").glob("numba-*"):
        (cache / kernels.name).symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True)
def _broken_pipes_are_errors():
    """Undo what commands do to end quietly on a broken pipe: here it would end all later tests."""
    yield
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@pytest.fixture(scope="session")
def machine():
    """The CPU in float32."""
    return select_device(TrainDeviceConfig(device="cpu", dtype="float32"))


@pytest.fixture
def make_model():
    """Build a small model with weights large enough that attention and norms matter."""

    def make(vocab_size=11, seed=0, scale=5.0, **settings):
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 8, "dropout": 0.0}
        config = ModelConfig(**shape | settings)
        model = checkpoint.build_uninitialized(config, vocab_size, "cpu")
        generator = torch.Generator().manual_seed(seed)
        model.init_weights(generator)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.mul_(scale if parameter.dim() == 2 else 1.0).add_(noise)
        return model

    return make


@pytest.fixture
def story(tmp_path):
    """A file of simple sentences, about 4,000 characters."""
    rng = random.Random(0)
    words = (("cat", "dog", "fox"), ("saw", "met"), ("bird", "mouse"), ("barn", "yard", "wood"))
    lines = ["The {} {} the {} in the {}.\n".format(*map(rng.choice, words)) for _ in range(120)]
    path = tmp_path / "story.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path
