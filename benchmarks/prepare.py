"""From a text file to shards of tokens: megabytes a second, end to end, and the most memory that the system cannot take back, for each kind of tokenizer.

The text is the standard library's source, repeated up to the size, or a file. Beside it stands `tokenizers` itself, called directly on all processors with the
text in memory, on the first 20 MB, with nothing written. With `--train`, a small model is trained on the shards for some steps too, and its memory told:

    python benchmarks/prepare.py [--gigabytes 0.1] [--kinds char,byte,bpe] [--text FILE] [--train]

What `nanogpt plan` counts with is measured by

    python benchmarks/prepare.py rates

Linux only: memory is RssAnon of /proc/self/status, which leaves the mapped pages of files aside.
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

from nanogpt.corpus import expand
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer import Tokenizer, train_tokenizer

app = App(help=__doc__)
T = TypeVar("T")
DIRECT_BYTES = 20_000_000
PIECE = 8192  # characters that `tokenizers` is given at a time
WATCHED = """
import sys, threading, time
from pathlib import Path
most, status = [0], Path("/proc/self/status")
def watch():
    while True:
        most[0] = max(most[0], int(status.read_text().split("RssAnon:")[1].split()[0]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
from nanogpt.cli import main
try:
    main(sys.argv[1:])
finally:
    print(f"RssAnon {most[0]}", file=sys.stderr)
"""


def watched(*words: str | int | Path) -> tuple[float, float]:
    """Seconds that a command of nanogpt takes, and the most anonymous memory it had, in MB."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin, int(done.stderr.rsplit("RssAnon", 1)[1]) * 1024 / 1e6


def direct(folder: Path, text: Path) -> float:
    """Megabytes a second of `tokenizers` by itself."""
    backend = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8")).backend
    with text.open("rb") as file:
        content = file.read(DIRECT_BYTES).decode(errors="ignore")
    pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    begin = time.perf_counter()
    backend.encode_batch_fast(pieces, add_special_tokens=False)
    return len(content.encode()) / 1e6 / (time.perf_counter() - begin)


def repeated(path: Path, size: int) -> None:
    """Write the standard library's source again and again, up to so many bytes."""
    source = b"".join(chunk.encode() for text in expand(["python"]) for chunk in text.chunks())
    with path.open("wb") as file:
        for _ in range(size // len(source)):
            file.write(source)
        file.write(source[: size % len(source)].decode(errors="ignore").encode())


def rates(text: Path, out: Path, kind: str, vocab_size: int | None) -> dict[str, float | str | None]:
    """Megabytes a second of a core, and bytes in a token."""
    from nanogpt.prepare.scan import Scan
    from nanogpt.prepare.shards import write_unit

    def megabytes_per_second(work: Callable[[], T]) -> tuple[T, float]:
        begin = time.process_time()
        done = work()
        return done, text.stat().st_size / 1e6 / (time.process_time() - begin)

    scan, reading = megabytes_per_second(lambda: Scan(expand([str(text)])))
    tokenizer, choosing = megabytes_per_second(lambda: train_tokenizer(kind, scan.texts(), vocab_size, scan.total))
    out.mkdir()
    _, encoding = megabytes_per_second(lambda: write_unit(out, 0, scan, 0, scan.split(1_000_000), tokenizer, ""))
    tokens = sum(path.stat().st_size for path in out.glob("*.bin")) // token_dtype(tokenizer.vocab_size).itemsize
    row: dict[str, float | str | None] = {"kind": kind, "vocab_size": tokenizer.vocab_size, "reading": reading, "choosing": choosing, "encoding": encoding}
    return row | {"bytes_per_token": text.stat().st_size / tokens}


@app.command(name="rates")
def all_rates() -> None:
    """What `nanogpt plan` counts with: what a core reads, looks through and encodes in a second, in processor time, and so on a busy machine too."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers begins any
    with tempfile.TemporaryDirectory(prefix="nanogpt-prepare-") as name:
        file = Path(name) / "text.txt"
        repeated(file, len(b"".join(chunk.encode() for text in expand(["python"]) for chunk in text.chunks())))
        for kind, vocab_size in (("char", None), ("byte", None), ("word", None), ("bpe", 1024), ("bpe", 32_768)):
            print(json.dumps(rates(file, Path(name) / f"{kind}{vocab_size}", kind, vocab_size)), flush=True)


@app.default
def measure(gigabytes: float = 0.1, kinds: str = "char,byte,bpe", text: Path | None = None, train: bool = False) -> None:
    """Print one JSON object a kind."""
    with tempfile.TemporaryDirectory(prefix="nanogpt-prepare-") as name:
        folder = Path(name)
        file = text or folder / "text.txt"
        if text is None:
            repeated(file, int(gigabytes * 1e9))
        megabytes = file.stat().st_size / 1e6
        for kind in kinds.split(","):
            out = folder / kind
            seconds, memory = watched("prepare", file, "--out", out, "--tokenizer", kind)
            row = {"kind": kind, "processors": os.cpu_count(), "megabytes": megabytes, "megabytes_per_second": megabytes / seconds, "memory_megabytes": memory}
            row["tokenizers_megabytes_per_second"] = direct(out, file)
            if train:
                shape = ["--n-layer", 2, "--n-head", 2, "--n-embd", 64, "--batch-size", 8, "--context-length", 128, "--no-compile", "--overwrite"]
                row["training_memory_megabytes"] = watched("train", out, "--steps", 100, *shape, "--out", folder / "run")[1]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app()
