"""The speed of writing text, against others on the same machine in the same run; each kind in a process of its own, all in
turn, some rounds long, medians with their extremes.

All have the seed's shape (6 layers, 6 heads, 384 wide, context 256), with random weights, which are as fast as trained ones; with --model the
shape and weights of a model file, which also tells what int8 costs in bits per byte. The others are skipped where they are not installed: transformers
(its GPT-2 with its cache), and llama.cpp through the packages xllamacpp and gguf (its GPT-2 with Q8_0 weights).

    python benchmarks/generate.py [--text shakespeare] [--model RUN] [--tokens 200] [--rounds 5]
"""

import importlib.util
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import numpy as np
import torch
from baseline import Textbook
from cyclopts import App

from nanogpt import checkpoint, generate, library, machine
from nanogpt.config import MachineConfig, ModelConfig, SamplingConfig
from nanogpt.corpus import expand
from nanogpt.generate.quantize import Precision
from nanogpt.machine import Machine
from nanogpt.plan import flops_per_token
from nanogpt.tokenizer import train_tokenizer

app = App(help=__doc__)
PROMPT, STREAMS, LATENCY_PROMPT = 20, 64, 200  # tokens before the first; texts at once; tokens before the first whose wait is measured
MANY = f", {STREAMS} texts"
PEERS = {"textbook": (), "transformers": ("transformers",), "llama.cpp Q8_0": ("xllamacpp", "gguf")}  # and the packages that they are
SPAWN = multiprocessing.get_context("spawn")

Writer = Callable[[int], float]  # so many tokens -> seconds of each


def has(*packages: str) -> bool:
    """Whether all are installed; says so where they are not."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed")
    return not missing


def textbook(parts: checkpoint.Parts) -> Writer:
    """The loop that reads the whole window again for every token."""
    c = parts.model.config
    model = Textbook(parts.tokenizer.vocab_size, c.n_layer, c.n_head, c.n_embd, c.context_length)
    window = torch.randint(parts.tokenizer.vocab_size, (1, c.context_length))

    def write(tokens: int) -> float:
        begin, few = time.perf_counter(), -(-tokens // 8)  # each takes as long as any other
        model.generate(window, few)
        return (time.perf_counter() - begin) / few

    return write


def transformers(parts: checkpoint.Parts) -> Writer:
    """Its `generate` with its cache, as its documentation has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c, V = parts.model.config, parts.tokenizer.vocab_size
    shape = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.context_length, "vocab_size": V}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    prompt = torch.randint(V, (1, PROMPT))

    def write(tokens: int) -> float:
        begin = time.perf_counter()
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=True, temperature=0.8, top_k=0)
        return (time.perf_counter() - begin) / (made.shape[1] - PROMPT)

    return write


def llama_cpp(parts: checkpoint.Parts, threads: int, folder: Path) -> Writer:
    """The same weights, rounded to Q8_0: its own measure of a token, without the time it takes to read the prompt."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(parts, folder / "model.gguf"))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = parts.model.config.context_length, 1, threads, -1
    server = xllamacpp.Server(params)

    def write(tokens: int) -> float:
        wanted = {"prompt": list(range(1, PROMPT + 1)), "n_predict": tokens, "temperature": 0.8, "top_k": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(wanted)
        return float(answer["timings"]["predicted_per_token_ms"]) / 1e3

    return write


def write_gguf(parts: checkpoint.Parts, path: Path) -> Path:
    """A classic model as llama.cpp reads it, matrices in Q8_0; its tokens are bytes or plain words to it."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    c, tokenizer, weights = parts.model.config, parts.tokenizer, {name: tensor.float().numpy() for name, tensor in parts.model.state_dict().items()}
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("llama")
    single = [token for token, spelled in enumerate(tokenizer.token_bytes) if len(spelled) == 1]
    in_bytes = {tokenizer.token_bytes[token][0]: token for token in single}  # the last of a spelling is the byte's own token
    names = [f"t{token}" for token in range(tokenizer.vocab_size)]
    for byte, token in in_bytes.items():
        names[token] = f"<0x{byte:02X}>"
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types([TokenType.BYTE if name.startswith("<0x") else TokenType.NORMAL for name in names])
    writer.add_eos_token_id(tokenizer.end)
    places = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm"}
    places |= {"attn.qkv": "attn_qkv", "attn.proj": "attn_output", "mlp.fc": "ffn_up", "mlp.proj": "ffn_down"}
    for name, array in weights.items():
        where, _, kind = name.rpartition(".")
        block, _, inner = where.removeprefix("blocks.").partition(".") if where.startswith("blocks.") else ("", "", where)
        place = f"blk.{block}.{places[inner]}.{kind}" if block else f"{places[inner]}.{kind}"
        if array.ndim == 2 and inner != "wpe":
            writer.add_tensor(place, quantize(array, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(place, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def nanogpt(parts: checkpoint.Parts, decoder: generate.Decoder, texts: int = 1) -> Writer:
    """The engine with all that a user gets: tokens drawn one by one, spelled, with their log-probabilities."""
    end = (parts.tokenizer.end, parts.tokenizer.end + 1)

    def write(tokens: int) -> float:
        engine = generate.Engine(decoder, parts.tokenizer, [end])
        for seed in range(texts):
            prompt = np.random.default_rng(seed).integers(parts.tokenizer.vocab_size, size=PROMPT).tolist()
            engine.add(generate.Request(prompt, SamplingConfig(max_tokens=tokens + 1), seed))
        engine.step()
        begin = time.perf_counter()
        while engine.busy:
            engine.step()
        return (time.perf_counter() - begin) / tokens

    return write


def first_token(parts: checkpoint.Parts, decoder: generate.Decoder) -> Writer:
    """The wait for the first token of a prompt, another one each time."""

    def write(tokens: int) -> float:
        engine = generate.Engine(decoder, parts.tokenizer)
        prompt = np.random.default_rng().integers(parts.tokenizer.vocab_size, size=min(LATENCY_PROMPT, decoder.context_length)).tolist()
        engine.add(generate.Request(prompt, SamplingConfig(max_tokens=1), 0))
        begin = time.perf_counter()
        engine.step()
        return time.perf_counter() - begin

    return write


def show(name: str, seconds: list[float], sides: dict[str, list[float]], tokens_at_once: int = 1) -> None:
    """A line of the table: tokens per second, and how many times that of the others is."""
    paces = sorted(tokens_at_once / one for one in seconds)
    against = [f"{statistics.median(paces) * statistics.median(sides[peer]):.3g} times {peer}" for peer in PEERS if peer in sides]
    ratios = f"  {', '.join(against)}" if name.startswith("nanogpt") else ""
    print(f"{name:30} {statistics.median(paces):9,.1f} tokens/s ({paces[0]:,.1f} to {paces[-1]:,.1f}){ratios}", flush=True)


def int8_cost(path: Path, text: str, place: Machine) -> None:
    """Bits per byte of a trained model, as it is, with all that `fast` keeps in int8, and with PyTorch's int8 products: on its run's validation split, or
    without a run on the text."""
    of = () if (path / "text.json").is_file() else (text,)
    exact, fast, plain = (library.load(path, device="cpu", dtype=dtype, threads=place.threads) for dtype in ("float32", "int8", "float32"))
    plain._model = generate.bare(plain._model, "int8")
    bits = {name: model.evaluate(*of).bits_per_byte for name, model in (("float32", exact), ("fast int8", fast), ("plain int8", plain))}
    for name, value in bits.items():
        print(f"{name:10} {value:.5f} bits per byte, {value / bits['float32'] - 1:+.3%}")


def parts_of(text: str, model: Path | None) -> checkpoint.Parts:
    """The model of a file, or one of the seed's shape with random weights and the characters of the text."""
    if model is not None:
        return checkpoint.load(model)
    tokenizer = train_tokenizer("char", [chunk for document in expand([text]) for chunk in document.chunks()])
    parts = checkpoint.Parts(checkpoint.empty_model(ModelConfig(), tokenizer.vocab_size, "cpu").eval(), tokenizer, {"unused": []})
    parts.model.init_weights(torch.Generator().manual_seed(1337))
    return parts


def writer_of(kind: str, parts: checkpoint.Parts, place: Machine, folder: Path) -> Writer:
    """What writes in the way that a line of the table is called."""
    if kind in PEERS:
        return {"textbook": textbook, "transformers": transformers, "llama.cpp Q8_0": lambda parts: llama_cpp(parts, place.threads, folder)}[kind](parts)
    (_, way, precision), texts = kind.removeprefix("wait ").removesuffix(MANY).split(), STREAMS if kind.endswith(MANY) else 1
    if way == "plain":
        decoder: generate.Decoder = generate.TorchDecoder(generate.bare(parts.model, cast(Precision, precision)), place, texts)
    else:
        decoder = generate.open_decoder(parts.model, place, precision, texts)
    return first_token(parts, decoder) if kind.startswith("wait ") else nanogpt(parts, decoder, texts)


def work(pipe: Connection, kind: str, text: str, model: Path | None, threads: int, folder: Path) -> None:
    """A process for one kind: what another leaves behind in its process, threads above all, would slow it down. It writes when it is told to."""
    torch.manual_seed(1337)
    parts = parts_of(text, model)
    write = writer_of(kind, parts, machine.choose(MachineConfig(device="cpu", dtype="float32", threads=threads)), folder)
    write(16)  # does not count
    while tokens := pipe.recv():
        pipe.send(write(tokens))


@app.default
def main(*, text: str = "shakespeare", model: Path | None = None, tokens: int = 200, rounds: int = 5, threads: int | None = None) -> None:
    """Time every kind that is installed; print the table."""
    place = machine.choose(MachineConfig(device="cpu", dtype="float32", threads=threads))
    parts = parts_of(text, model)
    tokens = min(tokens, parts.model.config.context_length - PROMPT - 1)  # within the window, where peers have their cache
    print(f"{place}, {machine.processor()}; torch {torch.__version__}; {sum(p.numel() for p in parts.model.parameters()):,} parameters, {tokens} tokens")
    kinds = [name for name, packages in PEERS.items() if (name == "textbook" or parts.model.config.arch == "classic") and has(*packages)]
    ours = [f"nanogpt {way} {precision}" for way in ("plain", "fast") if way == "plain" or has("numba") for precision in ("float32", "int8")]
    kinds += [*ours, *(name + MANY for name in ours), *(f"wait {name}" for name in ours)]
    sides: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for kind in kinds:
            pipes[kind], end = SPAWN.Pipe()
            SPAWN.Process(target=work, args=(end, kind, text, model, place.threads, Path(folder)), daemon=True).start()
        for _ in range(rounds):
            for kind, pipe in pipes.items():
                pipe.send(tokens)
                sides[kind].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(0)
    peak = max(machine.peak(place.device, dtype) for dtype in (torch.bfloat16, torch.float32))  # without instructions for bfloat16 it is the slower by far
    c, seen = parts.model.config, PROMPT + tokens / 2
    attention = 4 * c.n_layer * c.n_embd
    flops = flops_per_token(c, parts.tokenizer.vocab_size) / 3 - attention * (min(c.context_length, c.window or math.inf) - min(seen, c.window or math.inf))
    for kind, seconds in sides.items():
        if kind.startswith("wait "):
            times = sorted(1e3 * one for one in seconds)
            print(f"first token after {LATENCY_PROMPT}, {kind[5:]:22} {statistics.median(times):6.1f} ms ({times[0]:.1f} to {times[-1]:.1f})")
        elif kind.endswith(MANY):
            show(kind, seconds, sides, STREAMS)
            speed = STREAMS * flops / statistics.median(seconds)
            print(f"{'':30} {speed / 1e9:9,.1f} GFLOP/s, {speed / peak:.0%} of the peak, {peak / 1e9:,.0f} GFLOP/s")
        else:
            show(kind, seconds, sides)
    if model is not None:
        int8_cost(model, text, place)


if __name__ == "__main__":
    app()
