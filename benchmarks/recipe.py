"""The experiments that `nanogpt.recipe` is fitted to: models of several sizes, steps, learning rates, dropout, weight decay, whole and cut-off texts.

    python benchmarks/recipe.py [--text shakespeare] [--table benchmarks/recipe.csv]

Each row of the table is one training run, with the recipe's own settings but for those in the row; rows that have no loss yet are run, and the table is
written anew. To repeat one, or to try another text, take losses out of a copy.
The text's last tenth, on which models are judged everywhere else, is left out: these runs learn from the first nine tenths of the rest, or from a share of
that, and are measured on its last tenth. The last line printed has the constants that fit the table, which stand in recipe.py. Two cores take minutes to an
hour for a row; those with seeds 1 to 3 were made on an H200. One that was made on both came to 1.3922 there, and to 1.3929 on two cores.
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
from nanogpt.recipe import decay_for, heads_for, learning

app = App(help=__doc__)
ROWS, CONTEXT = 8, 256


def shape(row: dict[str, str]) -> dict[str, int]:
    """The model's layers, heads and width."""
    n_layer, n_embd = int(row["n_layer"]), int(row["n_embd"])
    return {"n_layer": n_layer, "n_head": heads_for(n_embd), "n_embd": n_embd}


def run(row: dict[str, str], text: Path, val: Path) -> float:
    """Train, and give the loss of the best model on the whole validation text."""
    steps, rate = int(row["steps"]), float(row["rate"])
    model = shape(row) | {"arch": "modern", "context_length": CONTEXT, "dropout": float(row["dropout"])}
    rates = {"matrix_learning_rate": rate, "learning_rate": rate / 5, "weight_decay": float(row["decay"]), "seed": int(row["seed"])}
    settings = learning(steps) | rates | {"batch_size": ROWS, "steps": steps, "eval_every": max(1, steps // 4)}
    return nanogpt.train(text, val=str(val), **model, **settings).summary["val_loss"]


def fit(rows: list[dict[str, str]]) -> dict[str, float]:
    """L = floor + A / parameters^a + B / tokens^b (Hoffmann et al. 2022, section 3.3) by least squares, where to read again counts for less, the sooner the
    lower R is (Muennighoff et al. 2023, eq. 5).

    Used are the rows on the whole text, without dropout, with about the rate and the weight decay that the recipe would take.
    """
    losses, sizes, read, again = [], [], [], []
    for row in rows:
        steps, rate, tokens = int(row["steps"]), float(row["rate"]), int(row["train_tokens"])
        readings = steps * ROWS * CONTEXT / tokens
        ratios = rate / learning(steps)["matrix_learning_rate"], float(row["decay"]) / decay_for(readings, steps, rate)
        as_chosen = all(0.8 < ratio < 1.25 for ratio in ratios)
        if float(row["share"]) == 1 and float(row["dropout"]) == 0 and as_chosen:
            losses.append(float(row["val_loss"]))
            sizes.append(body_parameters(ModelConfig(arch="modern", **shape(row))) / 1e6)
            read.append(min(1.0, readings) * tokens / 1e6)
            again.append(max(0.0, readings - 1))
    best: tuple[float, dict[str, float]] = (np.inf, {})
    exponents = np.arange(0.1, 1.01, 0.05)
    for R in (0.5, 1, 1.5, 2, 3, 5, 10, 15.4):
        worth = np.array(read) * (1 + R * (1 - np.exp(-np.array(again) / R)))
        for a in exponents:
            for b in exponents:
                terms = np.stack([np.ones(len(losses)), np.array(sizes) ** -a, worth**-b], axis=1)
                (floor, A, B), *_ = np.linalg.lstsq(terms, losses, rcond=None)
                error = float(np.sqrt(np.mean((terms @ [floor, A, B] - losses) ** 2)))
                if error < best[0] and min(floor, A, B) > 0:
                    best = (error, {"floor": floor, "A": A, "a": a, "B": B, "b": b, "R": R, "rows": len(losses), "error": error})
    return best[1]


@app.default
def main(*, text: str = "shakespeare", table: Path = Path(__file__).with_suffix(".csv")) -> None:
    """Run what is missing in the table, and fit."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    whole = "".join(chunk for document in expand([text]) for chunk in document.chunks())
    whole = whole[: len(whole) * 9 // 10]
    split = len(whole) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        part, val = Path(folder) / "part.txt", Path(folder) / "val.txt"
        val.write_text(whole[split:], encoding="utf-8", newline="")
        for row in rows:
            if row["val_loss"]:
                continue
            length = int(split * float(row["share"]))
            part.write_text(whole[:length], encoding="utf-8", newline="")
            row |= {"train_tokens": str(length), "val_loss": f"{run(row, part, val):.4f}"}
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(*row.values(), flush=True)
    print(", ".join(f"{name} {value:.4g}" for name, value in fit(rows).items()))


if __name__ == "__main__":
    app()
