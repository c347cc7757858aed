"""Measure the loss after a few minutes of training, from the start of the command to its end.

Every run is a process of its own, and `nanogpt eval` scores its model on the full validation
split. Cold: each run starts with an empty cache, so it measures the machine, compiles and
prepares the text itself. Warm: one untimed run fills the cache first.

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

from nanogpt.data.sources import resolve_sources

app = App(help=__doc__)
NANOGPT = [sys.executable, "-m", "nanogpt"]


def train(text: Path, minutes: float, seed: int, cache: Path, run: Path) -> dict[str, float]:
    """Train with all other settings chosen by the recipe; return seconds, losses and baselines."""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "compiler"),
    }
    limits = ["--minutes", str(minutes), "--seed", str(seed)]
    command = [*NANOGPT, "train", str(text), *limits, "--out", str(run), "--overwrite"]
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    model = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["model"]
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    shape = f"{model['n_layer']}x{model['n_embd']}"
    print(
        f"{shape}, {last['step']:,} steps in {last['seconds']:.0f} of {seconds:.1f} s", flush=True
    )
    command = [*NANOGPT, "eval", str(run), "--context-length", "256", "--json"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    result = json.loads(output)
    losses = {name: result[name] for name in ("loss", "bits_per_byte")}
    return {"seconds": seconds} | losses | result["baselines"]


@app.default
def main(
    *, minutes: float = 3, text: str = "shakespeare", seeds: int = 3, warm: bool = False
) -> None:
    """Train once per seed; print each result and the median loss."""
    with tempfile.TemporaryDirectory() as temp_dir:
        folder = Path(temp_dir)
        text_path, shared_cache, run = folder / "text.txt", folder / "shared", folder / "run"
        documents = resolve_sources([text])
        content = "".join(chunk for document in documents for chunk in document.iter_text())
        text_path.write_text(content, encoding="utf-8", newline="")
        if warm:
            train(text_path, minutes, 0, shared_cache, run)
        losses = []
        for seed in range(1, seeds + 1):
            cache = shared_cache if warm else folder / str(seed)
            result = train(text_path, minutes, seed, cache, run)
            loss, bits_per_byte = result["loss"], result["bits_per_byte"]
            losses.append(loss)
            # The trigram baseline in bits per byte; both losses share the tokens per byte.
            trigram = result["trigram"] / loss * bits_per_byte
            print(
                f"{minutes:g} minutes, seed {seed}: {loss:.4f} nats per token, "
                f"{bits_per_byte:.4f} bits per byte (trigram baseline {trigram:.4f}, "
                f"{1 - bits_per_byte / trigram:.0%} less) after {result['seconds']:.1f} s",
                flush=True,
            )
        kind = "warm" if warm else "cold"
        print(f"{minutes:g} minutes, {kind}: median {statistics.median(losses):.4f} of {seeds}")


if __name__ == "__main__":
    app()
