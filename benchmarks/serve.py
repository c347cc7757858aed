"""The server under many clients at once: errors, how evenly they are served, time to the first token, tokens a second beside those of the engine alone, memory.

Each client streams one text after another, with seeds of its own, for so many seconds, and comes again when it is told to. With `--deterministic`, some of the
texts are then compared with what the library writes alone. Afterwards small requests follow each other, and the server's memory is told before and after:

    python benchmarks/serve.py [runs/book] [--clients 100] [--seconds 60] [--max-tokens 200] [--requests 10000] [--deterministic]

Without a model, one of the seed's size with random weights is used, which is as fast. Linux only: memory is resident memory in /proc.
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import App

app = App(help=__doc__)
PROMPT = "The quick brown fox jumps over the lazy dog. "
CHECKED = 20  # texts that are written again
ALONE = """
import sys, time
from nanogpt import library
model = library.load(sys.argv[1], deterministic=sys.argv[4] == "True")
rows, steps = int(sys.argv[2]), int(sys.argv[3])
engine = model.engine(rows)
for seed in range(rows):
    engine.add(model.request(sys.argv[5], seed=seed, temperature=1.0, max_tokens=10**6))
for _ in range(3):
    engine.step()
begin = time.perf_counter()
made = sum(len(engine.step()) for _ in range(steps))
print(made / (time.perf_counter() - begin))
"""


@dataclass
class Client:
    """What one client saw."""

    texts: dict[int, str] = field(default_factory=dict)  # by their seeds
    firsts: list[float] = field(default_factory=list)  # seconds to the first token
    tokens: int = 0
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[str, object]) -> tuple[int, dict[str, str], bytes, float]:
    """Status, headers and body of an answer, and seconds to its first byte; a client of a few lines, so that the machine is the server's."""
    body, begin = json.dumps(asked).encode(), time.perf_counter()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    first = time.perf_counter() - begin
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    if "content-length" in headers:
        return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])), first
    parts = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return int(head[0].split()[1]), headers, b"".join(parts), first


async def client(port: int, number: int, until: float, asked: dict[str, object], seen: Client) -> None:
    """Ask until the time is over; what is under way then is finished, and counts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    seed = number * 10**6
    while time.perf_counter() < until:
        status, headers, body, first = await ask(reader, writer, asked | {"seed": seed})
        if status == 429:
            seen.refused += 1
            await asyncio.sleep(float(headers["retry-after"]))
            continue
        if status != 200 or not body.endswith(b"data: [DONE]\n\n"):
            seen.errors[f"{status} {body[-200:]!r}"] += 1
            continue
        chunks = [json.loads(line[6:]) for line in body.decode().split("\n\n")[:-2]]
        seen.texts[seed] = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
        seen.tokens += chunks[-1]["usage"]["completion_tokens"]
        seen.firsts.append(first)
        seed += 1
    writer.close()


async def crowd(port: int, clients: int, seconds: float, asked: dict[str, object]) -> tuple[list[Client], float]:
    """All clients at once, and the seconds until the last had its text."""
    begin, seen = time.perf_counter(), [Client() for _ in range(clients)]
    await asyncio.gather(*(client(port, i, begin + seconds, asked, one) for i, one in enumerate(seen)))
    return seen, time.perf_counter() - begin


async def one_after_another(port: int, requests: int, asked: dict[str, object]) -> None:
    """Small requests, for what they leave behind."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for i in range(requests):
        status, _, body, _ = await ask(reader, writer, asked | {"max_tokens": 4, "logprobs": 5, "stream": i % 2 == 0})
        assert status == 200, body
    writer.close()


def memory(pid: int) -> float:
    """Resident memory of a process, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def random_model(folder: Path) -> Path:
    """A model of the seed's size that nobody trained."""
    import torch

    from nanogpt import checkpoint
    from nanogpt.config import ModelConfig
    from nanogpt.tokenizer import train_tokenizer

    tokenizer = train_tokenizer("char", [PROMPT + "\nABCDEFGHIJKLMNOPQRSTUVWXYZ,;:!?'-&$3"])
    model = checkpoint.empty_model(ModelConfig(), tokenizer.vocab_size, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    checkpoint.save_model(folder / "seed" / "model.safetensors", model, tokenizer, {"step": 0, "unused": [[0, 1]]})
    return folder / "seed"


def differing(model: Path, seen: list[Client], asked: dict[str, object]) -> int:
    """How many of `CHECKED` texts are not what the library writes alone."""
    from nanogpt import library

    alone = library.load(model, deterministic=True)
    made = [next(iter(one.texts.items())) for one in seen if one.texts][:CHECKED]
    options = {"max_tokens": asked["max_tokens"], "temperature": asked["temperature"]}
    return sum("".join(alone.stream(PROMPT, seed=seed, **options)) != text for seed, text in made)


def show(seen: list[Client], seconds: float, engine: float) -> None:
    """The table."""
    counts, firsts = sorted(len(one.texts) for one in seen), sorted(first for one in seen for first in one.firsts)
    errors = sum((one.errors for one in seen), Counter[str]())
    rate = sum(one.tokens for one in seen) / seconds
    print(f"errors                     {sum(errors.values())}, and {sum(one.refused for one in seen)} answers of 429 {dict(errors) or ''}")
    print(f"texts of a client          {counts[0]} to {counts[-1]}, median {statistics.median(counts):g}; {sum(counts)} in {seconds:.1f} s")
    print(f"seconds to the first token median {statistics.median(firsts):.3f}, 95 % within {firsts[int(0.95 * len(firsts))]:.3f}, longest {firsts[-1]:.3f}")
    print(f"tokens a second            {rate:,.0f}; the engine alone, all rows always full: {engine:,.0f}", flush=True)


@app.default
def main(
    model: Path | None = None, /, *, clients: int = 100, seconds: float = 60, max_tokens: int = 200, rows: int = 64, requests: int = 10_000, steps: int = 60,
    deterministic: bool = False,
) -> None:  # fmt: skip
    """Serve a model, ask it, and print what came of it."""
    with tempfile.TemporaryDirectory(prefix="nanogpt-serve-") as name:
        model = model or random_model(Path(name))
        print(
            f"machine                    {platform.machine()}, {os.cpu_count()} processors; {clients} clients, {rows} rows, texts of {max_tokens} tokens",
            flush=True,
        )
        words = [sys.executable, "-c", ALONE, str(model), str(rows), str(steps), str(deterministic), PROMPT]
        engine = float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
        command = [sys.executable, "-m", "nanogpt", "serve", str(model), "--port", "0", "--rows", str(rows), *["--deterministic"] * deterministic]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                page = next(line for line in server.stdout if line.startswith("Page"))
                port = int(page.split(":")[-1].strip(" /\n"))
                asked = {"model": model.absolute().name, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 1.0, "stream": True}
                asked["stream_options"] = {"include_usage": True}
                seen, took = asyncio.run(crowd(port, clients, seconds, asked))
                show(seen, took, engine)
                if deterministic:
                    print(f"not as if alone            {differing(model, seen, asked)} of {CHECKED}", flush=True)
                asyncio.run(one_after_another(port, requests // 10, asked))
                before = memory(server.pid)
                asyncio.run(one_after_another(port, requests, asked))
                print(f"memory                     {before:.1f} MB, and {memory(server.pid):.1f} MB {requests:,} requests later")
            finally:
                server.terminate()
        print(f"exit code                  {server.returncode}")


if __name__ == "__main__":
    app()
