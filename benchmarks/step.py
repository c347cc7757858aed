"""Compare the speed and memory of a training step with the textbook loop of baseline.py.

Every measurement runs in a process of its own, alternating over several rounds. Printed are the
medians over the rounds, the extremes, and the ratios of the medians.

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
QWEN3_ARGS = (
    "--arch qwen3 --n-layer 6 --n-head 4 --n-embd 256 --batch-size 16 --dropout 0 --optimizer muon"
)


def run(command: list[str]) -> tuple[str, float]:
    """Run a command; return its output and its peak memory in MiB."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return output, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure_textbook(text: str, steps: int) -> dict[str, float]:
    """Measure seconds and memory of a step of the textbook loop."""
    code = (
        f"import statistics, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; from baseline import Textbook, read, seconds, train_step\n"
        f"data, vocab_size = read({text!r}); model = Textbook(vocab_size)\n"
        "optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)\n"
        f"print(statistics.median(seconds(lambda: train_step(model, optimizer, data), {steps})))"
    )
    output, memory = run([sys.executable, "-c", code])
    return {"seconds": float(output), "memory": memory}


def measure_nanogpt(args: str) -> dict[str, float]:
    """Measure seconds, memory, throughput and utilization of a step of nanogpt."""
    output, memory = run([sys.executable, "-m", "nanogpt", "bench", "--json", *args.split()])
    speed = json.loads(output)
    return {
        "seconds": speed["step_seconds"],
        "memory": memory,
        "mfu": speed["mfu"],
        "gflops": speed["train_flops_per_second"] / 1e9,
    }


def print_row(
    name: str, rounds: list[dict[str, float]], baseline: list[dict[str, float]] | None = None
) -> None:
    """Print one line of the table."""

    def median(key: str) -> float:
        return statistics.median(values[key] for values in rounds)

    times = sorted(values["seconds"] for values in rounds)
    line = f"{name:32} {median('seconds'):6.3f} s ({times[0]:.3f} to {times[-1]:.3f})"
    line += f"  {median('memory'):6,.0f} MiB"
    if "mfu" in rounds[0]:
        line += f"  {median('gflops'):4,.0f} GFLOP/s, {median('mfu'):.0%} of the peak"
    if baseline:
        speedup = statistics.median(values["seconds"] for values in baseline) / median("seconds")
        line += f"  {speedup:.2f}x"
    print(line, flush=True)


@app.default
def main(*, text: str = "shakespeare", rounds: int = 3, steps: int = 5) -> None:
    """Time the default configuration in both, and a qwen3 model trained with Muon."""
    textbook: list[dict[str, float]] = []
    nano: list[dict[str, float]] = []
    qwen3: list[dict[str, float]] = []
    for _ in range(rounds):
        textbook.append(measure_textbook(text, steps))
        nano.append(measure_nanogpt(""))
        qwen3.append(measure_nanogpt(QWEN3_ARGS))
    print_row("textbook, preset nano", textbook)
    print_row("nanogpt, preset nano", nano, textbook)
    print_row("nanogpt, qwen3 6x256, batch 16", qwen3)


if __name__ == "__main__":
    app()
