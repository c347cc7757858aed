"""The speed of a training step, and its memory, against the textbook loop of baseline.py.

Each side runs in a process of its own, in turn, some rounds long; shown are medians over the rounds with their extremes, and ratios of the medians:

    python benchmarks/step.py [--text shakespeare] [--rounds 3] [--steps 5]
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from cyclopts import App

app = App(help=__doc__)
MODERN = ["--arch", "modern", "--n-layer", "6", "--n-head", "4", "--n-embd", "256", "--batch-size", "16", "--dropout", "0", "--optimizer", "muon"]


def run(words: list[str]) -> tuple[str, float]:
    """What a command prints, and the most memory it had, in MiB."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return printed, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def textbook(text: str, steps: int) -> dict[str, float]:
    """Seconds of a step of the textbook loop, and its memory."""
    code = (
        f"import statistics, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; from baseline import Textbook, read, seconds, train_step\n"
        f"data, vocab_size = read({text!r}); model = Textbook(vocab_size)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)\n"
        f"print(statistics.median(seconds(lambda: train_step(model, optimizer, data), {steps})))"
    )
    printed, memory = run([sys.executable, "-c", code])
    return {"seconds": float(printed), "memory": memory}


def own(settings: list[str]) -> dict[str, float]:
    """The same of nanogpt, with its share of the peak."""
    printed, memory = run([sys.executable, "-m", "nanogpt", "bench", "--json", *settings])
    speed = json.loads(printed)
    return {"seconds": speed["step_seconds"], "memory": memory, "share": speed["share_of_peak"], "gflops": speed["train_flops_per_second"] / 1e9}


def show(name: str, rounds: list[dict[str, float]], against: list[dict[str, float]] | None = None) -> None:
    """A line of the table."""
    times = sorted(one["seconds"] for one in rounds)
    line = f"{name:32} {statistics.median(times):6.3f} s ({times[0]:.3f} to {times[-1]:.3f})  {statistics.median(one['memory'] for one in rounds):6,.0f} MiB"
    if "share" in rounds[0]:
        line += f"  {statistics.median(one['gflops'] for one in rounds):4,.0f} GFLOP/s, {statistics.median(one['share'] for one in rounds):.0%} of the peak"
    if against:
        faster = statistics.median(one["seconds"] for one in against) / statistics.median(times)
        line += f"  {faster:.2f} times as fast"
    print(line, flush=True)


@app.default
def main(*, text: str = "shakespeare", rounds: int = 3, steps: int = 5) -> None:
    """Time the seed's recipe in both, and nanogpt's modern shape with Muon."""
    sides: dict[str, list[dict[str, float]]] = {"textbook, seed's recipe": [], "nanogpt, seed's recipe": [], "nanogpt, modern 6x256, batch 16": []}
    for _ in range(rounds):
        for side, measured in zip(sides.values(), (lambda: textbook(text, steps), lambda: own([]), lambda: own(MODERN)), strict=True):
            side.append(measured())
    first, second, third = sides
    show(first, sides[first])
    show(second, sides[second], sides[first])
    show(third, sides[third])


if __name__ == "__main__":
    app()
