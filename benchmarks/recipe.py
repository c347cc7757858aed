"""The short experiments that `nanogpt.recipe` is fitted to: models of several sizes, so many steps, whole and cut-off texts, with and without dropout.

    python benchmarks/recipe.py [--text shakespeare] [--table benchmarks/recipe.csv]

Each row of the table is one training run, with the recipe's own settings but for those in the row; rows that are there already are not run again.
The last lines printed are the constants that fit the table, which stand in recipe.py. All runs together take about an hour on two cores.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
from cyclopts import App

import nanogpt
from nanogpt.config import ModelConfig
from nanogpt.corpus import expand
from nanogpt.plan import body_parameters
from nanogpt.recipe import heads_for, learning

app = App(help=__doc__)
ROWS, CONTEXT = 8, 256
GRID = [  # layers, width, steps, dropout, share of the training text
    *((n_layer, n_embd, steps, 0.0, 1.0) for steps in (200, 600) for n_layer, n_embd in ((2, 64), (3, 96), (4, 128), (4, 192), (6, 256))),
    *((n_layer, n_embd, 1800, 0.0, 1.0) for n_layer, n_embd in ((2, 64), (3, 96), (4, 128))),
    *((n_layer, n_embd, steps, dropout, 0.05) for steps in (200, 600) for n_layer, n_embd in ((2, 64), (4, 128)) for dropout in (0.0, 0.2, 0.4)),
    (4, 128, 600, 0.0, 0.25),
    *((4, 128, 1800, dropout, 0.25) for dropout in (0.0, 0.2)),
    (4, 128, 1800, 0.1, 1.0),
]
FIELDS = ["text", "n_layer", "n_embd", "steps", "dropout", "share", "train_tokens", "parameters", "tokens", "val_loss"]


def run(text: Path, val: Path, n_layer: int, n_embd: int, steps: int, dropout: float) -> float:
    """Train, and give the loss of the best model on the whole validation text."""
    shape = {"arch": "modern", "n_layer": n_layer, "n_head": heads_for(n_embd), "n_embd": n_embd, "context_length": CONTEXT, "dropout": dropout}
    settings = learning(steps) | {"batch_size": ROWS, "steps": steps, "eval_every": max(1, steps // 4), "compile": True}
    return nanogpt.train(text, val=str(val), **shape, **settings).summary["val_loss"]


def fit(rows: list[dict[str, str]]) -> dict[str, float]:
    """L = floor + A / parameters^a + B / tokens^b (Hoffmann et al. 2022, section 3.3) by least squares.

    Used are the rows without dropout on the whole text; not those of 200 steps, in which what is learned first, letters and words, follows another law.
    """
    used = [row for row in rows if float(row["dropout"]) == 0 and float(row["share"]) == 1 and int(row["steps"]) >= 600]
    n, d, loss = (np.array([float(row[name]) for row in used]) for name in ("parameters", "tokens", "val_loss"))
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for a in np.arange(0.1, 1.01, 0.05):
        for b in np.arange(0.1, 1.01, 0.05):
            terms = np.stack([np.ones_like(n), (n / 1e6) ** -a, (d / 1e6) ** -b], axis=1)
            (floor, of_parameters, of_tokens), *_ = np.linalg.lstsq(terms, loss, rcond=None)
            error = float(np.sqrt(np.mean((terms @ [floor, of_parameters, of_tokens] - loss) ** 2)))
            if error < best[0] and min(floor, of_parameters, of_tokens) > 0:
                best = (error, {"floor": floor, "A": of_parameters, "a": a, "B": of_tokens, "b": b, "error": error})
    return best[1]


@app.default
def main(*, text: str = "shakespeare", table: Path = Path(__file__).with_suffix(".csv")) -> None:
    """Run what is missing in the table, and fit."""
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    done = {(int(row["n_layer"]), int(row["n_embd"]), int(row["steps"]), float(row["dropout"]), float(row["share"])) for row in rows}
    whole = "".join(chunk for document in expand([text]) for chunk in document.chunks())
    split = len(whole) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        val = Path(folder) / "val.txt"
        val.write_text(whole[split:], encoding="utf-8", newline="")
        for n_layer, n_embd, steps, dropout, share in GRID:
            if (n_layer, n_embd, steps, dropout, share) in done:
                continue
            part = Path(folder) / f"{share}.txt"
            part.write_text(whole[: int(split * share)], encoding="utf-8", newline="")
            size = body_parameters(ModelConfig(arch="modern", n_layer=n_layer, n_head=heads_for(n_embd), n_embd=n_embd))
            loss = run(part, val, n_layer, n_embd, steps, dropout)
            values = [text, n_layer, n_embd, steps, dropout, share, int(split * share), size, steps * ROWS * CONTEXT, f"{loss:.4f}"]
            rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(*values, flush=True)
    print(", ".join(f"{name} {value:.4g}" for name, value in fit(rows).items()))


if __name__ == "__main__":
    app()
