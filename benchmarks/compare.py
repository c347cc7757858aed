"""Compare tokenizers, context lengths or model sizes at equal training time, as a Markdown table.

    python benchmarks/compare.py tokens|context|size [--text shakespeare] [--minutes 1]
                                 [--seeds 1] [--out FOLDER]

Each variant is trained on the command line with the recipe's other settings, and evaluated by
`nanogpt compare`. An uncounted first run of each variant measures the machine, prepares the text
and fills the compile cache. The variants alternate within a seed, so that a slowdown affects all.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from cyclopts import App

from nanogpt.config import TrainDeviceConfig
from nanogpt.device.device import select_device
from nanogpt.device.measurements import peak_flops

app = App(help=__doc__)
# Tokens per step at every context length, so that all variants make equally large updates.
STEP_TOKENS = 2048
SUBJECTS: dict[str, dict[str, list[str]]] = {
    "tokens": {kind: ["--tokenizer", kind] for kind in ("char", "byte", "word", "bpe")},
    "context": {
        str(T): ["--context-length", str(T), "--batch-size", str(STEP_TOKENS // T)]
        for T in (64, 256, 1024)
    },
    "size": {
        f"{n_layer}x{n_embd}": ["--n-layer", str(n_layer), "--n-embd", str(n_embd)]
        for n_layer, n_embd in ((3, 96), (6, 256))
    },
}
HEADER = (
    "| | model | parameters | steps | tokens/s | nats per token | bits per byte | seeds |\n"
    "|---|---|---|---|---|---|---|---|"
)


def train(text: str, settings: list[str], minutes: float, seed: int, run: Path) -> None:
    """Train one time-limited run."""
    args = ["train", text, *settings, "--minutes", f"{minutes:g}", "--seed", str(seed)]
    args += ["--out", str(run), "--overwrite"]
    subprocess.run([sys.executable, "-m", "nanogpt", *args], check=True, stdout=subprocess.DEVNULL)


def format_row(group: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """Return a group of seeds as a row; values that differ between its runs become a range."""
    members = [runs[name] for name in group["runs"]]

    def value_range(field: str, template: str = "{:,.0f}") -> str:
        values = sorted(run[field] for run in members)
        bounds = [template.format(values[0]), template.format(values[-1])]
        return " to ".join(dict.fromkeys(bounds))

    settings = members[0]["settings"]
    std = "" if group["std"] is None else f" ± {group['std']:.4f}"
    cells = [
        Path(group["runs"][0]).name.rpartition("-")[0],
        f"{settings['n_layer']}x{settings['n_embd']}, context {settings['context_length']}",
        value_range("parameters"),
        value_range("steps"),
        value_range("tokens_per_second"),
        value_range("val_loss", "{:.4f}"),
        f"{group['bits_per_byte']:.4f}{std}",
        str(group["num_runs"]),
    ]
    return f"| {' | '.join(cells)} |"


@app.default
def main(
    subject: Literal["tokens", "context", "size"],
    *,
    text: str = "shakespeare",
    minutes: float = 1,
    seeds: int = 1,
    out: Path | None = None,
) -> None:
    """Train every variant with every seed, and print the table, the command and the machine.

    With --out, the runs are kept in that folder.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        runs = []
        for seed in range(seeds + 1):
            for name, settings in SUBJECTS[subject].items():
                run = folder / (f"{name}-{seed}" if seed else "first")
                train(text, settings, minutes, seed, run)
                runs += [run] if seed else []
        args = [sys.executable, "-m", "nanogpt", "compare", *map(str, runs), "--json"]
        output = subprocess.run(args, check=True, stdout=subprocess.PIPE, text=True).stdout
    comparison = json.loads(output)
    by_name = {run["run"]: run for run in comparison["runs"]}
    print(HEADER)
    for group in comparison["groups"]:
        print(format_row(group, by_name))
    for run in comparison["runs"]:
        for note in run["notes"]:
            print(f"{run['run']}: {note}")
    command = f"python benchmarks/compare.py {subject} --text {text}"
    print(f"\n{command} --minutes {minutes:g} --seeds {seeds}")
    machine = select_device(TrainDeviceConfig())
    gflops = peak_flops(machine.device, machine.dtype) / 1e9
    print(f"{machine}, PyTorch {torch.__version__}; matmul peak {gflops:,.0f} GFLOP/s")


if __name__ == "__main__":
    app()
