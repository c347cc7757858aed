"""Load-test the server: errors, fairness, time to first token, throughput and memory.

Each client streams completions, one after another, with seeds of its own, and waits after a 429
as long as the server says. With `--deterministic`, some completions are compared with those of the
library alone. Afterwards small requests run in sequence, and memory is measured before and after:

    python benchmarks/serve.py [runs/book] [--clients 100] [--seconds 60] [--deterministic]

Without a model, one of preset `nano` with random weights is used. Linux only, because memory is
read from /proc.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import App

app = App(help=__doc__)
PROMPT = "The quick brown fox jumps over the lazy dog. "
MAX_COMPARED = 20  # completions compared with the library alone
ENGINE_SCRIPT = """
import sys, time
import nanogpt
model = nanogpt.load(sys.argv[1], deterministic=sys.argv[4] == "True")
batch_size, steps = int(sys.argv[2]), int(sys.argv[3])
engine = model.create_engine(batch_size)
for seed in range(batch_size):
    engine.add(model.make_request(sys.argv[5], seed=seed, temperature=1.0, max_tokens=10**6))
for _ in range(3):
    engine.step()
start = time.perf_counter()
num_tokens = sum(len(engine.step()) for _ in range(steps))
print(num_tokens / (time.perf_counter() - start))
"""


@dataclass
class ClientResult:
    """The results of one client."""

    texts: dict[int, str] = field(default_factory=dict)  # by seed
    first_token_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    rejected: int = 0
    errors: Counter[str] = field(default_factory=Counter)


@dataclass
class Response:
    """An HTTP response, with the seconds until its headers arrived."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: dict[str, object]
) -> Response:
    """Send a completion request; a minimal client leaves the processor to the server."""
    body = json.dumps(request).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    start = time.perf_counter()
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    seconds = time.perf_counter() - start
    status = int(lines[0].split()[1])
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    if "content-length" in headers:
        content = await reader.readexactly(int(headers["content-length"]))
        return Response(status, headers, content, seconds)
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return Response(status, headers, b"".join(chunks), seconds)


async def run_client(
    port: int, index: int, deadline: float, request: dict[str, object]
) -> ClientResult:
    """Send requests until the deadline, and return the results; the last request is completed."""
    result = ClientResult()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    seed = index * 10**6
    while time.perf_counter() < deadline:
        response = await post(reader, writer, request | {"seed": seed})
        if response.status == 429:
            result.rejected += 1
            await asyncio.sleep(float(response.headers["retry-after"]))
            continue
        if response.status != 200 or not response.body.endswith(b"data: [DONE]\n\n"):
            result.errors[f"{response.status} {response.body[-200:]!r}"] += 1
            continue
        events = response.body.decode().split("\n\n")[:-2]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        result.texts[seed] = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
        result.tokens += chunks[-1]["usage"]["completion_tokens"]
        result.first_token_seconds.append(response.seconds)
        seed += 1
    writer.close()
    return result


async def run_clients(
    port: int, num_clients: int, seconds: float, request: dict[str, object]
) -> tuple[list[ClientResult], float]:
    """Run all clients concurrently; return their results and the seconds until the last ended."""
    start = time.perf_counter()
    clients = (run_client(port, i, start + seconds, request) for i in range(num_clients))
    results = await asyncio.gather(*clients)
    return results, time.perf_counter() - start


async def run_in_sequence(port: int, num_requests: int, request: dict[str, object]) -> None:
    """Run small requests in sequence, to find leaks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    small = request | {"max_tokens": 4, "logprobs": 5}
    for i in range(num_requests):
        response = await post(reader, writer, small | {"stream": i % 2 == 0})
        assert response.status == 200, response.body
    writer.close()


def resident_megabytes(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def random_model(folder: Path) -> Path:
    """Write a model of preset nano with random weights."""
    import torch

    from nanogpt import checkpoint
    from nanogpt.config import ModelConfig
    from nanogpt.tokenizer.tokenizer import train_tokenizer

    tokenizer = train_tokenizer("char", [PROMPT + "\nABCDEFGHIJKLMNOPQRSTUVWXYZ,;:!?'-&$3"])
    model = checkpoint.build_uninitialized(ModelConfig(), tokenizer.vocab_size, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    summary = {"step": 0, "unseen_token_ranges": [[0, 1]]}
    run = folder / "nano"
    checkpoint.save_model(run / "model.safetensors", model, tokenizer, summary)
    return run


def compare(path: Path, results: list[ClientResult], request: dict[str, object]) -> tuple[int, int]:
    """Count completions that differ from those of the library alone, and all that are compared."""
    from nanogpt import api

    model = api.load(path, deterministic=True)
    options = {name: request[name] for name in ("max_tokens", "temperature")}
    texts = [next(iter(result.texts.items())) for result in results if result.texts][:MAX_COMPARED]
    expected = ["".join(model.stream(PROMPT, seed=seed, **options)) for seed, _ in texts]
    num_different = sum(a != b for a, (_, b) in zip(expected, texts, strict=True))
    return num_different, len(texts)


def print_results(results: list[ClientResult], seconds: float, engine_rate: float) -> None:
    """Print errors, completions, latency and throughput."""
    counts = sorted(len(result.texts) for result in results)
    latencies = sorted(value for result in results for value in result.first_token_seconds)
    errors = sum((result.errors for result in results), Counter[str]())
    rejected = sum(result.rejected for result in results)
    rate = sum(result.tokens for result in results) / seconds
    median_count = statistics.median(counts)
    median = statistics.median(latencies)
    p95 = latencies[int(0.95 * len(latencies))]
    print(f"errors                  {sum(errors.values())} {dict(errors) or ''}; 429: {rejected}")
    print(f"completions per client  {counts[0]} to {counts[-1]}, median {median_count:g}")
    print(f"completions             {sum(counts)} in {seconds:.1f} s")
    print(f"seconds to first token  median {median:.3f}, p95 {p95:.3f}, max {latencies[-1]:.3f}")
    print(f"tokens/s                {rate:,.0f}; engine alone, full batch: {engine_rate:,.0f}")


def measure_engine(model: Path, batch_size: int, steps: int, deterministic: bool) -> float:
    """Return the tokens per second of the engine alone, in a process of its own."""
    arguments = map(str, (model, batch_size, steps, deterministic, PROMPT))
    command = [sys.executable, "-c", ENGINE_SCRIPT, *arguments]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


@contextmanager
def running_server(
    model: Path, batch_size: int, deterministic: bool
) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run `nanogpt serve`; yield the process and its port."""
    command = [sys.executable, "-m", "nanogpt", "serve", str(model), "--port", "0"]
    command += ["--max-batch-size", str(batch_size)]
    if deterministic:
        command.append("--deterministic")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            page = next(line for line in process.stdout if line.startswith("Page"))
            yield process, int(page.split(":")[-1].strip(" /\n"))
        finally:
            process.terminate()


@app.default
def main(
    model: Path | None = None,
    /,
    *,
    clients: int = 100,
    seconds: float = 60,
    max_tokens: int = 200,
    batch_size: int = 64,
    requests: int = 10_000,
    steps: int = 60,
    deterministic: bool = False,
) -> None:
    """Serve a model, run the clients, and print the results."""
    with tempfile.TemporaryDirectory(prefix="nanogpt-serve-") as folder:
        model = model or random_model(Path(folder))
        print(f"machine                 {platform.machine()}, {os.cpu_count()} processors")
        print(f"load                    {clients} clients, {max_tokens} tokens each", flush=True)
        engine_rate = measure_engine(model, batch_size, steps, deterministic)
        request = {
            "model": model.absolute().name,
            "prompt": PROMPT,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with running_server(model, batch_size, deterministic) as (server, port):
            results, elapsed = asyncio.run(run_clients(port, clients, seconds, request))
            print_results(results, elapsed, engine_rate)
            if deterministic:
                num_different, num_compared = compare(model, results, request)
                print(f"different from library  {num_different} of {num_compared}", flush=True)
            asyncio.run(run_in_sequence(port, requests // 10, request))
            before = resident_megabytes(server.pid)
            asyncio.run(run_in_sequence(port, requests, request))
            after = resident_megabytes(server.pid)
            print(f"memory                  {before:.1f} MB before {requests:,} requests")
            print(f"                        {after:.1f} MB after")
        print(f"exit code               {server.returncode}")


if __name__ == "__main__":
    app()
