"""What takes minutes: real text to a real result, and memory that does not grow with the text. Run with `pytest -m slow`."""

import subprocess
import sys

import pytest
from test_serve import make_run, resident, serving

import nanogpt

pytestmark = pytest.mark.slow
PEAK = """
import resource, sys
from nanogpt.config import TextConfig
from nanogpt.prepare import prepare
prepare([sys.argv[1]], TextConfig())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_python_s_own_documentation_is_learned_beyond_counting(tmp_path):
    shape = {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 64, "dropout": 0.0}
    model = nanogpt.train("python-docs", tmp_path / "run", batch_size=12, learning_rate=1e-3, steps=2000, **shape)
    result = model.evaluate()
    assert result.val_loss < 0.85 * result.baselines["trigram"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak this way")
def test_memory_does_not_grow_with_the_text(tmp_path):
    line = "The quick brown fox jumps over the lazy dog; 日本語 too.\n"
    peaks = []
    for megabytes in (50, 200):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w", encoding="utf-8") as file:
            for _ in range(megabytes):
                file.write(line * (1_000_000 // len(line.encode())))
        peaks.append(int(subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_s_memory_does_not_grow_with_the_requests(tmp_path):
    make_run(tmp_path / "a", 0)
    with serving(tmp_path / "a") as server:

        def ask(times):
            for i in range(times):
                assert server.post({"model": "a", "prompt": "the ", "max_tokens": 4, "logprobs": 5, "n": 3, "stream": i % 2 == 0, "stop": ["q"]})[0] == 200

        ask(500)
        before = resident(server.process)
        ask(10_000)
        assert resident(server.process) - before < 10
