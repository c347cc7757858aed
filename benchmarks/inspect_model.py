"""Time each inspection of a text with a model of the `nano` preset: median, minimum, maximum.

python benchmarks/inspect_model.py [--text shakespeare] [--characters 1000] [--rounds 5]
"""

import tempfile
from pathlib import Path

from baseline import seconds, spread
from cyclopts import App

import nanogpt
from nanogpt.data.sources import resolve_sources

app = App(help=__doc__)


@app.default
def main(*, text: str = "shakespeare", characters: int = 1000, rounds: int = 5) -> None:
    """Train for one step, because the time does not depend on the weights, and inspect."""
    chunks = (chunk for source in resolve_sources([text]) for chunk in source.iter_text())
    excerpt = "".join(chunks)[-characters:]
    with tempfile.TemporaryDirectory() as folder:
        model = nanogpt.train(text, Path(folder) / "run", preset="nano", steps=1, compile=False)
        inspector = model.inspect(excerpt)
        for name in ("surprisal", "attention", "neurons", "embedding", "memorization"):
            times = seconds(getattr(inspector, name), rounds, warmup=1)
            print(f"{name:12} {spread(times)}", flush=True)


if __name__ == "__main__":
    app()
