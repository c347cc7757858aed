"""Tests that take minutes: learning real text, and constant memory. Run with `pytest -m slow`."""

import subprocess
import sys

import pytest
from helpers import make_run, resident, serving

import nanogpt

pytestmark = pytest.mark.slow
PEAK_MEMORY_SCRIPT = """
import resource, sys
from nanogpt.config import DataConfig
from nanogpt.data.prepare import prepare
prepare([sys.argv[1]], DataConfig())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_train_on_python_docs_beats_the_trigram_baseline(tmp_path):
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 64, "dropout": 0.0}
    model = nanogpt.train(
        "python-docs", tmp_path / "run", batch_size=12, learning_rate=1e-3, steps=2000, **shape
    )
    result = model.evaluate()
    assert result.loss < 0.85 * result.baselines["trigram"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_prepare_memory_does_not_grow_with_the_text(tmp_path):
    line = "The quick brown fox jumps over the lazy dog; 日本語 too.\n"
    peaks = []
    for megabytes in (50, 200):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(megabytes):
                file.write(line * (1_000_000 // len(line.encode())))
        command = [sys.executable, "-c", PEAK_MEMORY_SCRIPT, path]
        peaks.append(int(subprocess.run(command, capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_server_memory_does_not_grow_with_the_requests(tmp_path):
    make_run(tmp_path / "a", 0)
    with serving(tmp_path / "a") as server:

        def send_requests(count):
            body = {"model": "a", "prompt": "the ", "max_tokens": 4, "logprobs": 5, "n": 3}
            for i in range(count):
                status = server.post(body | {"stream": i % 2 == 0, "stop": ["q"]})[0]
                assert status == 200

        send_requests(500)
        before = resident(server.process)
        send_requests(10_000)
        assert resident(server.process) - before < 10
