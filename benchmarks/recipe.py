"""The short experiments that `nanogpt.recipe` is fitted to: models of several sizes, steps, learning rates, dropout, weight decay, whole and cut-off texts.

    python benchmarks/recipe.py [--text shakespeare] [--table benchmarks/recipe.csv]

Each row of the table is one training run, with the recipe's own settings but for those in the row; rows that are there already are not run again.
The text's last tenth, on which models are judged everywhere else, is left out: these runs learn from the first nine tenths of the rest, and are
measured on its last tenth. The last line printed has the constants that fit the table, which stand in recipe.py. All runs together take
hours on two cores.
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
from nanogpt.recipe import DECAY, heads_for, learning

app = App(help=__doc__)
ROWS, CONTEXT = 8, 256
RATES = {
    150: 0.058,
    225: 0.0468,
    450: 0.033,
    675: 0.0318,
    900: 0.024,
    1350: 0.019,
    2250: 0.0209,
    2700: 0.019,
    4050: 0.015,
}  # of Muon, by the number of steps; a fifth of it is AdamW's
GRID = [  # layers, width, steps, Muon's learning rate, dropout, weight decay, share of the training text
    *((n_layer, n_embd, steps, RATES[steps], 0.0, DECAY, 1.0) for steps in (150, 450) for n_layer, n_embd in ((2, 64), (3, 96), (4, 128), (4, 192), (6, 256))),
    *((n_layer, n_embd, 1350, RATES[1350], 0.0, DECAY, 1.0) for n_layer, n_embd in ((2, 64), (3, 96), (4, 128), (4, 192))),
    (2, 64, 4050, RATES[4050], 0.0, DECAY, 1.0),
    *((n_layer, n_embd, 2700, RATES[2700], 0.0, DECAY, 1.0) for n_layer, n_embd in ((4, 192), (6, 256))),
    (6, 256, 2700, RATES[2700], 0.2, DECAY, 1.0),
    *((3, 96, steps, round(times * RATES[steps], 4), 0.0, DECAY, 1.0) for steps in (150, 1350) for times in (0.5, 2.0)),
    *((4, 128, 450, RATES[450], dropout, DECAY, 0.05) for dropout in (0.0, 0.1, 0.2)),
    *((n_layer, n_embd, 450, RATES[450], 0.0, DECAY, 0.05) for n_layer, n_embd in ((2, 64), (3, 96))),
    *((4, 128, steps, RATES[steps], dropout, DECAY, 0.25) for steps in (450, 900, 1350) for dropout in (0.0, 0.1)),
    *((4, 128, 450, RATES[450], 0.0, decay, 0.05) for decay in (0.5, 2.0, 4.0)),
    (4, 128, 450, RATES[450], 0.2, 2.0, 0.05),
    *((n_layer, n_embd, 450, RATES[450], 0.0, 2.0, 0.05) for n_layer, n_embd in ((3, 96), (4, 192))),
    *((4, 128, steps, RATES[steps], 0.0, decay, 0.05) for steps, decay in ((225, 1.36), (900, 2.0), (900, 4.0))),
    *((4, 128, steps, RATES[steps], 0.0, decay, 0.25) for steps, decay in ((450, 0.5), (675, 0.4), (900, 0.5), (1350, 0.65), (2250, 0.5))),
    (4, 128, 900, RATES[900], 0.1, 0.5, 0.25),
    *((4, 192, 450, RATES[450], 0.0, decay, 0.25) for decay in (DECAY, 0.5)),
    *((4, 192, 900, RATES[900], dropout, decay, 0.25) for dropout, decay in ((0.0, 0.5), (0.2, DECAY), (0.2, 0.5), (0.3, DECAY), (0.3, 0.15), (0.3, 0.5))),
    (4, 128, 450, RATES[450], 0.0, 0.2, 1.0),
    (4, 192, 2700, RATES[2700], 0.0, 0.2, 1.0),
    (6, 256, 2700, RATES[2700], 0.2, 0.2, 1.0),
]
FIELDS = ["text", "n_layer", "n_embd", "steps", "rate", "dropout", "decay", "share", "train_tokens", "parameters", "tokens", "val_loss"]
KEY = FIELDS[1:8]


def run(text: Path, val: Path, n_layer: int, n_embd: int, steps: int, rate: float, dropout: float, decay: float) -> float:
    """Train, and give the loss of the best model on the whole validation text."""
    shape = {"arch": "modern", "n_layer": n_layer, "n_head": heads_for(n_embd), "n_embd": n_embd, "context_length": CONTEXT, "dropout": dropout}
    rates = {"matrix_learning_rate": rate, "learning_rate": rate / 5, "weight_decay": decay}
    settings = learning(steps) | rates | {"batch_size": ROWS, "steps": steps, "eval_every": max(1, steps // 4)}
    return nanogpt.train(text, val=str(val), **shape, **settings).summary["val_loss"]


def fit(rows: list[dict[str, str]]) -> dict[str, float]:
    """L = floor + A / parameters^a + B / tokens^b (Hoffmann et al. 2022, section 3.3) by least squares.

    Used are the rows on the whole text, with the rates of `RATES` and the usual decay, that read it less than four times: reading again counts for less
    (`recipe.foreseen`).
    """
    whole = [row for row in rows if float(row["share"]) == 1 and float(row["decay"]) == DECAY and int(row["tokens"]) < 4 * int(row["train_tokens"])]
    used = [row for row in whole if float(row["rate"]) == RATES[int(row["steps"])]]
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
    done = {tuple(float(row[name]) for name in KEY) for row in rows if row["text"] == text}
    whole = "".join(chunk for document in expand([text]) for chunk in document.chunks())
    whole = whole[: len(whole) * 9 // 10]
    split = len(whole) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        val = Path(folder) / "val.txt"
        val.write_text(whole[split:], encoding="utf-8", newline="")
        for key in GRID:
            if key in done:
                continue
            n_layer, n_embd, steps, rate, dropout, decay, share = key
            part = Path(folder) / f"{share}.txt"
            part.write_text(whole[: int(split * share)], encoding="utf-8", newline="")
            size = body_parameters(ModelConfig(arch="modern", n_layer=n_layer, n_head=heads_for(n_embd), n_embd=n_embd))
            loss = run(part, val, n_layer, n_embd, steps, rate, dropout, decay)
            values = [text, *key, int(split * share), size, steps * ROWS * CONTEXT, f"{loss:.4f}"]
            rows.append(dict(zip(FIELDS, map(str, values), strict=True)))
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(*values, flush=True)
    print(", ".join(f"{name} {value:.4g}" for name, value in fit([row for row in rows if row["text"] == text]).items()))


if __name__ == "__main__":
    app()
