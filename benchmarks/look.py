"""How long it takes to look at a text: surprise, attention, neurons, the alphabet and copies, with a model of the seed's shape. Medians with their extremes.

python benchmarks/look.py [--text shakespeare] [--characters 1000] [--rounds 5]
"""

import tempfile
from pathlib import Path

from baseline import seconds, spread
from cyclopts import App

import nanogpt
from nanogpt.corpus import expand

app = App(help=__doc__)


@app.default
def main(*, text: str = "shakespeare", characters: int = 1000, rounds: int = 5) -> None:
    """Train for one step, which costs as much to look into as any model, and look."""
    passage = "".join(chunk for document in expand([text]) for chunk in document.chunks())[-characters:]
    with tempfile.TemporaryDirectory() as folder:
        model = nanogpt.train(text, Path(folder) / "run", preset="classic", steps=1, compile=False)
        look = model.look(passage)
        for name in ("surprise", "attention", "neurons", "embedding", "copies"):
            print(f"{name:10} {spread(seconds(getattr(look, name), rounds, warmup=1))}", flush=True)


if __name__ == "__main__":
    app()
