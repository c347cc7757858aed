"""How much of a machine's speed is left when its cores are shared by processes of one thread each instead of threads of one process, on the seed recipe.

Both sides run in turn, some rounds long, with the same precision, attention and no compiler; shown are medians of tokens/s over the rounds with their
extremes, the ratio of the medians, and what share of forward and backward it takes to add up the gradients:

    python benchmarks/distributed.py [--text python-docs] [--processes 2] [--rounds 3] [--steps 8] [--parallel ddp] [--dtype float32]
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cyclopts import App

app = App(help=__doc__)
WARM = 2  # steps that do not count


def measure(launcher: list[str], text: str, steps: int, settings: list[str]) -> tuple[float, float | None]:
    """Tokens/s of the median step, and the share of exchange where there is one, of a run of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [*launcher, "-m", "nanogpt", "train", text, "--out", str(run), "--steps", str(steps + WARM), "--eval-every", str(steps + WARM), *settings]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        speed = statistics.median(row["tokens_per_second"] for row in [row for row in rows if "tokens_per_second" in row][WARM:])
        pace = run / "ranks.jsonl"
        return speed, json.loads(pace.read_text(encoding="utf-8").splitlines()[0])["exchange"] if pace.exists() else None


@app.default
def main(text: str = "python-docs", processes: int = 2, rounds: int = 3, steps: int = 8, parallel: str = "ddp", dtype: str = "float32") -> None:
    """Measure both sides, and print them."""
    settings = ["--dtype", dtype, "--attention", "plain", "--no-compile", "--val-bytes", "20000"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    alone, together, exchanges = [], [], []
    for _ in range(rounds):
        alone.append(measure([sys.executable], text, steps, [*settings, "--threads", str(processes)])[0])
        speed, exchange = measure(torchrun, text, steps, [*settings, "--threads", "1", "--parallel", parallel])
        together.append(speed)
        exchanges.append(exchange or 0.0)
    for name, speeds in ((f"one process of {processes} threads", alone), (f"{processes} processes of one thread, {parallel}", together)):
        print(f"{name:40} {statistics.median(speeds):8,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})")
    print(
        f"ratio {statistics.median(together) / statistics.median(alone):.2f}; adding up gradients: {statistics.median(exchanges):.1%} of forward and backward"
    )


if __name__ == "__main__":
    app()
