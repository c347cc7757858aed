"""Compare one process of several threads with several processes of one thread, on `nano`.

Both train alternately for some rounds with the same precision and attention, without a compiler.
Prints the median, minimum and maximum tokens/s over the rounds, the ratio of the medians, and the
fraction of forward and backward that the gradient all-reduce takes:

    python benchmarks/distributed.py [--text python-docs] [--processes 2] [--rounds 3]
        [--steps 8] [--parallel ddp] [--dtype float32]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cyclopts import App

app = App(help=__doc__)
WARMUP_STEPS = 2


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(launcher: list[str], text: str, steps: int, flags: list[str]) -> tuple[float, float]:
    """Return the tokens/s of the median step, and the fraction spent on communication."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        last_step = str(steps + WARMUP_STEPS)
        command = [*launcher, "-m", "nanogpt", "train", text, "--out", str(run)]
        command += ["--steps", last_step, "--eval-every", last_step, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
            )
        rows = [row for row in read_jsonl(run / "metrics.jsonl") if "tokens_per_second" in row]
        speed = statistics.median(row["tokens_per_second"] for row in rows[WARMUP_STEPS:])
        timings = run / "ranks.jsonl"
        if not timings.exists():
            return speed, 0.0
        return speed, read_jsonl(timings)[0]["comm_fraction"] or 0.0


@app.default
def main(
    text: str = "python-docs",
    processes: int = 2,
    rounds: int = 3,
    steps: int = 8,
    parallel: str = "ddp",
    dtype: str = "float32",
) -> None:
    """Measure both and print the comparison."""
    flags = ["--dtype", dtype, "--attention", "eager", "--no-compile", "--max-val-bytes", "20000"]
    one_process = [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(processes)]
    single, distributed, comm_fractions = [], [], []
    for _ in range(rounds):
        single_flags = [*flags, "--threads", str(processes)]
        single.append(measure(one_process, text, steps, single_flags)[0])
        distributed_flags = [*flags, "--threads", "1", "--parallel", parallel]
        speed, comm_fraction = measure(torchrun, text, steps, distributed_flags)
        distributed.append(speed)
        comm_fractions.append(comm_fraction)
    results = {
        f"one process of {processes} threads": single,
        f"{processes} processes of one thread, {parallel}": distributed,
    }
    for name, speeds in results.items():
        median = statistics.median(speeds)
        print(f"{name:40} {median:8,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})")
    ratio = statistics.median(distributed) / statistics.median(single)
    comm_fraction = statistics.median(comm_fractions)
    print(f"ratio {ratio:.2f}; all-reduce: {comm_fraction:.1%} of forward and backward")


if __name__ == "__main__":
    app()
