"""Run the experiments that the recipe of `nanogpt.training.recipe` is fitted to, and fit it.

    python benchmarks/recipe.py [--text shakespeare] [--table benchmarks/recipe.csv]

Each row of the table is one training run with the recipe's settings, except for those in the row.
Rows without a loss are run, and the table is updated. To repeat a run or to try another text,
delete losses from a copy. The last line printed holds the constants of the scaling law.

The last tenth of the text, on which models are evaluated everywhere else, is left out. The runs
train on the first nine tenths of the rest, or on a fraction of them. They validate on its last
tenth.
A row takes minutes to an hour on two CPU cores.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np
from cyclopts import App

import nanogpt
from nanogpt.config import ModelConfig
from nanogpt.data.sources import resolve_sources
from nanogpt.plan.model_size import non_embedding_matmul_params
from nanogpt.training.recipe import ScalingLaw, muon_weight_decay, num_heads_for, optimizer_settings

app = App(help=__doc__)
BATCH_SIZE = 8
CONTEXT_LENGTH = 256
REPEAT_DECAYS = (0.5, 1, 1.5, 2, 3, 5, 10, 15.4)


def model_shape(row: dict[str, str]) -> dict[str, int]:
    n_layer, n_embd = int(row["n_layer"]), int(row["n_embd"])
    return {"n_layer": n_layer, "n_head": num_heads_for(n_embd), "n_embd": n_embd}


def run(row: dict[str, str], text: Path, val: Path) -> float:
    """Train one row, and return the loss of the best model on the full validation text."""
    steps, learning_rate = int(row["steps"]), float(row["rate"])
    settings = optimizer_settings(steps) | {
        "muon_learning_rate": learning_rate,
        "learning_rate": learning_rate / 5,
        "weight_decay": float(row["decay"]),
        "seed": int(row["seed"]),
        "arch": "qwen3",
        "context_length": CONTEXT_LENGTH,
        "dropout": float(row["dropout"]),
        "batch_size": BATCH_SIZE,
        "steps": steps,
        "eval_every": max(1, steps // 4),
    }
    model = nanogpt.train(text, val_text=str(val), **settings, **model_shape(row))
    return model.summary["val_loss"]


def uses_recipe(row: dict[str, str], epochs: float) -> bool:
    """Return True for the full text, no dropout, and about the recipe's rate and weight decay."""
    steps, learning_rate = int(row["steps"]), float(row["rate"])
    lr_ratio = learning_rate / optimizer_settings(steps)["muon_learning_rate"]
    decay_ratio = float(row["decay"]) / muon_weight_decay(epochs, steps, learning_rate)
    is_near = all(0.8 < ratio < 1.25 for ratio in (lr_ratio, decay_ratio))
    return is_near and float(row["share"]) == 1 and float(row["dropout"]) == 0


def fit(rows: list[dict[str, str]]) -> tuple[ScalingLaw, dict[str, float]]:
    """Fit the scaling law by least squares, over a grid of exponents and repeat decays.

    The law is that of Hoffmann et al. 2022, section 3.3, where tokens of repeated epochs count for
    less (Muennighoff et al. 2023, equation 5). Only rows with the recipe's settings are used.

    Returns:
        The law; and its floor, the number of rows and the error (rms, nats per token).
    """
    losses, num_params, unique_tokens, repeat_epochs = [], [], [], []
    for row in rows:
        tokens = int(row["train_tokens"])
        epochs = int(row["steps"]) * BATCH_SIZE * CONTEXT_LENGTH / tokens
        if uses_recipe(row, epochs):
            model = ModelConfig(arch="qwen3", **model_shape(row))
            losses.append(float(row["val_loss"]))
            num_params.append(non_embedding_matmul_params(model) / 1e6)
            unique_tokens.append(min(1.0, epochs) * tokens / 1e6)
            repeat_epochs.append(max(0.0, epochs - 1))
    N, repeats = np.array(num_params), np.array(repeat_epochs)
    best: tuple[ScalingLaw, dict[str, float]] = (ScalingLaw(), {"error": np.inf})
    exponents = np.arange(0.1, 1.01, 0.05)
    for decay in REPEAT_DECAYS:
        D = np.array(unique_tokens) * (1 + decay * (1 - np.exp(-repeats / decay)))
        for alpha in exponents:
            for beta in exponents:
                terms = np.stack([np.ones(len(losses)), N**-alpha, D**-beta], axis=1)
                (floor, A, B), *_ = np.linalg.lstsq(terms, losses, rcond=None)
                error = float(np.sqrt(np.mean((terms @ [floor, A, B] - losses) ** 2)))
                if error < best[1]["error"] and min(floor, A, B) > 0:
                    law = ScalingLaw(A, alpha, B, beta, decay)
                    best = law, {"floor": floor, "rows": len(losses), "error": error}
    return best


@app.default
def main(*, text: str = "shakespeare", table: Path = Path(__file__).with_suffix(".csv")) -> None:
    """Run the rows that have no loss yet, and fit the law."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    full = "".join(chunk for document in resolve_sources([text]) for chunk in document.iter_text())
    full = full[: len(full) * 9 // 10]
    split = len(full) * 9 // 10
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder) / "part.txt", Path(folder) / "val.txt"
        val.write_text(full[split:], encoding="utf-8", newline="")
        for row in rows:
            if row["val_loss"]:
                continue
            length = int(split * float(row["share"]))
            train.write_text(full[:length], encoding="utf-8", newline="")
            row |= {"train_tokens": str(length), "val_loss": f"{run(row, train, val):.4f}"}
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(*row.values(), flush=True)
    law, quality = fit(rows)
    print(", ".join(f"{name} {value:.4g}" for name, value in (vars(law) | quality).items()))


if __name__ == "__main__":
    app()
