"""What tests share: a cache of their own, tiny models, and a text that can be learned from."""

import os
import random
import shutil
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: tiny tensors only lose by a second thread

import hypothesis
import pytest
import torch

from nanogpt import checkpoint
from nanogpt.config import MachineConfig, ModelConfig
from nanogpt.machine import choose, peak

hypothesis.settings.register_profile("nanogpt", deadline=None)  # no test depends on speed
hypothesis.settings.load_profile("nanogpt")

# The machine's part is given, so that no test depends on what is faster where it runs.
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 5}
TINY |= {"dtype": "float32", "attention": "fused", "compile": False}


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A cache that holds what was measured of this machine, and what was compiled for it, once for all tests."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for dtype in (torch.float32, torch.bfloat16):
            peak(torch.device("cpu"), dtype)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch, measured):
    folder = tmp_path_factory.mktemp("cache")
    own = folder / "nanogpt"
    own.mkdir()
    shutil.copy(measured / "nanogpt" / "machine.json", own)
    for compiled in (measured / "nanogpt").glob("numba-*"):
        os.symlink(compiled, own / compiled.name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield
    for name in os.listdir(own):
        if name.startswith("numba-") and not (measured / "nanogpt" / name).exists():  # this test was the first to compile
            shutil.move(own / name, measured / "nanogpt")


@pytest.fixture(autouse=True)
def _broken_pipes_are_errors():
    """Commands that end quietly with their reader have a broken pipe end the whole process: here that would be all tests to come."""
    yield
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@pytest.fixture(scope="session")
def place():
    return choose(MachineConfig(device="cpu", dtype="float32"))


@pytest.fixture
def make_model():
    """Build a small model with weights large enough that attention and norms matter."""

    def make(vocab_size=11, seed=0, scale=5.0, **settings):
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 8, "dropout": 0.0} | settings
        model = checkpoint.empty_model(ModelConfig(**shape), vocab_size, "cpu")
        generator = torch.Generator().manual_seed(seed)
        model.init_weights(generator)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale if parameter.dim() == 2 else 1.0).add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture
def story(tmp_path):
    """A file of simple sentences, some 4,000 characters."""
    chance = random.Random(0)
    words = (("cat", "dog", "fox"), ("saw", "met"), ("bird", "mouse"), ("barn", "yard", "wood"))
    lines = ["The {} {} the {} in the {}.\n".format(*map(chance.choice, words)) for _ in range(120)]
    path = tmp_path / "story.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path
