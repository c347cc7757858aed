"""How good a model is after so many minutes: whole processes, from the command to its end, and `nanogpt eval` on the full validation split.

Cold: every run has an empty cache, so that it measures the machine, compiles and prepares the text itself. Warm: one run of the same kind goes before.

    python benchmarks/minutes.py --minutes 3 [--text shakespeare] [--seeds 3] [--warm]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from cyclopts import App

from nanogpt.corpus import expand

app = App(help=__doc__)


def train(text: Path, minutes: float, seed: int, cache: Path, run: Path) -> dict[str, float]:
    """Train with everything left open, and evaluate."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "compiler")}
    nanogpt = [sys.executable, "-m", "nanogpt"]
    begin = time.perf_counter()
    words = [*nanogpt, "train", str(text), "--minutes", str(minutes), "--seed", str(seed), "--out", str(run), "--overwrite"]
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    words = [*nanogpt, "eval", str(run), "--context-length", "256", "--json"]
    model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["model"]
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    print(f"{model['n_layer']}x{model['n_embd']}, {last['step']:,} steps in {last['seconds']:.0f} of {seconds:.1f} s", flush=True)
    found = json.loads(subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return {"seconds": seconds, "val_loss": found["val_loss"], "bits_per_byte": found["bits_per_byte"], **found["baselines"]}


@app.default
def main(*, minutes: float = 3, text: str = "shakespeare", seeds: int = 3, warm: bool = False) -> None:
    """Train with each of some seeds; print each result and the median."""
    with tempfile.TemporaryDirectory() as folder:
        book, shared = Path(folder) / "text.txt", Path(folder) / "shared"
        book.write_text("".join(chunk for document in expand([text]) for chunk in document.chunks()), encoding="utf-8", newline="")
        if warm:
            train(book, minutes, 0, shared, Path(folder) / "run")
        losses = []
        for seed in range(1, seeds + 1):
            cache = shared if warm else Path(folder) / str(seed)
            found = train(book, minutes, seed, cache, Path(folder) / "run")
            losses.append(found["val_loss"])
            trigram = found["trigram"] / found["val_loss"] * found["bits_per_byte"]
            print(
                f"{minutes:g} minutes, seed {seed}: {found['val_loss']:.4f} nats per token, {found['bits_per_byte']:.4f} bits per byte (trigram baseline "
                f"{trigram:.4f}, {1 - found['bits_per_byte'] / trigram:.0%} less) after {found['seconds']:.1f} s",
                flush=True,
            )
        print(f"{minutes:g} minutes, {'warm' if warm else 'cold'}: median {statistics.median(losses):.4f} of {seeds}")


if __name__ == "__main__":
    app()
