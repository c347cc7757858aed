"""Measure the preparation of text: MB/s from a file to token shards, and peak anonymous memory.

The text is the standard library's source, repeated up to the size, or a file. For comparison, the
`tokenizers` library encodes the first 20 MB directly, on all processors, with nothing written. With
`--train`, the memory of training a small model on the shards is measured, too:

    python benchmarks/prepare.py [--gigabytes 0.1] [--kinds char,byte,bpe] [--text FILE] [--train]

The rates that `nanogpt plan` uses are measured by

    python benchmarks/prepare.py rates

Linux only: memory is RssAnon of /proc/self/status, which does not count mapped files.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cyclopts import App

from nanogpt.data.sources import resolve_sources
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer.tokenizer import Tokenizer, train_tokenizer

app = App(help=__doc__)
T = TypeVar("T")
DIRECT_BYTES = 20_000_000
CHUNK_CHARS = 8192  # characters of a chunk for `tokenizers`
SMALL_MODEL = ["--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--context-length", "128"]
MEASURED_COMMAND = """
import sys
import threading
import time
from pathlib import Path

peak = 0


def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.01)


threading.Thread(target=watch, daemon=True).start()
from nanogpt.cli.main import main

try:
    main(sys.argv[1:])
finally:
    print(f"RssAnon {peak}", file=sys.stderr)
"""


def run_measured(*arguments: str | int | Path) -> tuple[float, float]:
    """Run a nanogpt command; return its seconds and its peak anonymous memory in MB."""
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", MEASURED_COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    kilobytes = int(process.stderr.rsplit("RssAnon", 1)[1])
    return time.perf_counter() - start, kilobytes * 1024 / 1e6


def direct_rate(folder: Path, text: Path) -> float:
    """Return the MB/s of the `tokenizers` library itself."""
    backend = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8")).backend
    with text.open("rb") as file:
        content = file.read(DIRECT_BYTES).decode(errors="ignore")
    chunks = [content[i : i + CHUNK_CHARS] for i in range(0, len(content), CHUNK_CHARS)]
    start = time.perf_counter()
    backend.encode_batch_fast(chunks, add_special_tokens=False)
    return len(content.encode()) / 1e6 / (time.perf_counter() - start)


def standard_library() -> bytes:
    """Return the standard library's source."""
    sources = resolve_sources(["python"])
    return b"".join(text.encode() for source in sources for text in source.iter_text())


def write_repeated(path: Path, content: bytes, size: int) -> None:
    """Write `content` repeatedly, up to `size` bytes."""
    with path.open("wb") as file:
        for _ in range(size // len(content)):
            file.write(content)
        file.write(content[: size % len(content)].decode(errors="ignore").encode())


def measure_rates(
    text: Path, out: Path, kind: str, vocab_size: int | None
) -> dict[str, float | str | None]:
    """Return the MB/s of one core, and the bytes per token."""
    from nanogpt.data.scan import CorpusScan
    from nanogpt.data.shards import write_unit

    def timed(work: Callable[[], T]) -> tuple[T, float]:
        start = time.process_time()
        result = work()
        return result, text.stat().st_size / 1e6 / (time.process_time() - start)

    scan, read_rate = timed(lambda: CorpusScan.read(resolve_sources([str(text)])))
    tokenizer, vocab_rate = timed(
        lambda: train_tokenizer(kind, scan.iter_text(), vocab_size, scan.total_bytes)
    )
    out.mkdir()
    split = scan.split(1_000_000)
    _, encode_rate = timed(lambda: write_unit(out, 0, scan, 0, split, tokenizer, ""))
    token_bytes = sum(path.stat().st_size for path in out.glob("*.bin"))
    num_tokens = token_bytes // token_dtype(tokenizer.vocab_size).itemsize
    return {
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "read_rate": read_rate,
        "vocab_rate": vocab_rate,
        "encode_rate": encode_rate,
        "bytes_per_token": text.stat().st_size / num_tokens,
    }


@app.command(name="rates")
def all_rates() -> None:
    """Measure the rates of `nanogpt plan`, in MB per second of processor time.

    A busy machine thus gives the same rates.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers starts its threads
    settings = [("char", None), ("byte", None), ("word", None), ("bpe", 1024), ("bpe", 32_768)]
    with tempfile.TemporaryDirectory(prefix="nanogpt-prepare-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_bytes(standard_library())
        for kind, vocab_size in settings:
            row = measure_rates(text, folder / f"{kind}{vocab_size}", kind, vocab_size)
            print(json.dumps(row), flush=True)


@app.default
def measure(
    gigabytes: float = 0.1,
    kinds: str = "char,byte,bpe",
    text: Path | None = None,
    train: bool = False,
) -> None:
    """Print one JSON object per kind of tokenizer."""
    with tempfile.TemporaryDirectory(prefix="nanogpt-prepare-") as name:
        folder = Path(name)
        file = text or folder / "text.txt"
        if text is None:
            write_repeated(file, standard_library(), int(gigabytes * 1e9))
        megabytes = file.stat().st_size / 1e6
        for kind in kinds.split(","):
            out = folder / kind
            seconds, memory = run_measured("prepare", file, "--out", out, "--tokenizer", kind)
            row = {
                "kind": kind,
                "processors": os.cpu_count(),
                "megabytes": megabytes,
                "megabytes_per_second": megabytes / seconds,
                "memory_megabytes": memory,
                "tokenizers_megabytes_per_second": direct_rate(out, file),
            }
            if train:
                settings = ["--steps", 100, "--batch-size", 8, "--no-compile", "--overwrite"]
                _, row["training_memory_megabytes"] = run_measured(
                    "train", out, *settings, *SMALL_MODEL, "--out", folder / "run"
                )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app()
