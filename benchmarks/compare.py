"""Fair comparisons at equal time: what a token is, how far the model looks back, how large it is. Prints a Markdown table.

    python benchmarks/compare.py tokens|context|size [--text shakespeare] [--minutes 1] [--seeds 1] [--out FOLDER]

Each variant is trained through the command line, all else left to the recipe, and `nanogpt compare` lays the runs side by side. A first run of each, which does
not count, measures the machine, prepares the text and fills the compiler's cache, so that this weighs on no one. Seeds take turns, so that a machine that
becomes slower meanwhile is slower for all.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import App

from nanogpt.config import MachineConfig
from nanogpt.machine import choose, peak

app = App(help=__doc__)
STEP_TOKENS = 2048  # in a step of each context length, so that no variant makes more updates of the same size for being shorter
SUBJECTS: dict[str, dict[str, list[str]]] = {
    "tokens": {kind: ["--tokenizer", kind] for kind in ("char", "byte", "word", "bpe")},
    "context": {str(T): ["--context-length", str(T), "--batch-size", str(STEP_TOKENS // T)] for T in (64, 256, 1024)},
    "size": {f"{n_layer}x{n_embd}": ["--n-layer", str(n_layer), "--n-embd", str(n_embd)] for n_layer, n_embd in ((3, 96), (6, 256))},
}


def train(text: str, settings: list[str], minutes: float, seed: int, run: Path) -> None:
    """One run, by the clock."""
    words = ["train", text, *settings, "--minutes", f"{minutes:g}", "--seed", str(seed), "--out", str(run), "--overwrite"]
    subprocess.run([sys.executable, "-m", "nanogpt", *words], check=True, stdout=subprocess.DEVNULL)


def row(group: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """A group of seeds as a line of the table; what is not the same in all its runs as its extremes."""
    members = [runs[name] for name in group["runs"]]

    def extremes(field: str, shown: str = "{:,.0f}") -> str:
        values = sorted(run[field] for run in members)
        return " to ".join(dict.fromkeys([shown.format(values[0]), shown.format(values[-1])]))

    settings = members[0]["settings"]
    shape = f"{settings['n_layer']}x{settings['n_embd']}, context {settings['context_length']}"
    spread = "" if group["spread"] is None else f" ± {group['spread']:.4f}"
    cells = [
        Path(group["runs"][0]).name.rpartition("-")[0], shape, extremes("parameters"), extremes("steps"), extremes("tokens_per_second"),
        extremes("val_loss", "{:.4f}"), f"{group['bits_per_byte']:.4f}{spread}", str(group["n"]),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


@app.default
def main(subject: Literal["tokens", "context", "size"], *, text: str = "shakespeare", minutes: float = 1, seeds: int = 1, out: Path | None = None) -> None:
    """Train every variant with every seed, and print the table, the command and the machine. With --out the runs stay there."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        runs = []
        for seed in range(seeds + 1):
            for name, settings in SUBJECTS[subject].items():
                run = folder / (f"{name}-{seed}" if seed else "first")
                train(text, settings, minutes, seed, run)
                runs += [run] if seed else []
        words = [sys.executable, "-m", "nanogpt", "compare", *map(str, runs), "--json"]
        found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    by_name = {run["run"]: run for run in found["runs"]}
    print("| | model | parameters | steps | tokens/s | nats per token | bits per byte | seeds |\n|---|---|---|---|---|---|---|---|")
    for group in found["groups"]:
        print(row(group, by_name))
    for run in found["runs"]:
        for remark in run["remarks"]:
            print(f"{run['run']}: {remark}")
    place = choose(MachineConfig())
    print(f"\npython benchmarks/compare.py {subject} --text {text} --minutes {minutes:g} --seeds {seeds}")
    print(f"{place}, PyTorch {torch.__version__}; a matrix product reaches {peak(place.device, place.dtype) / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    app()
