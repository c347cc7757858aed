"""Decoding throughput and time to first token, against other programs on the same machine.

Each variant runs in a process of its own. The variants take turns for some rounds; medians and
extremes are printed. All have the shape of the `nano` preset with random weights, which are as fast
as trained ones. A model file given by --model sets shape and weights, and adds the cost of int8 in
bits per byte.

Peers that are not installed are skipped: transformers (its GPT-2 with its cache), and llama.cpp by
the packages xllamacpp and gguf (its GPT-2 with Q8_0 weights).

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

from nanogpt import api, checkpoint
from nanogpt.config import ModelConfig, SamplingConfig, TrainDeviceConfig
from nanogpt.data.sources import resolve_sources
from nanogpt.device import device, measurements
from nanogpt.device.device import Machine
from nanogpt.generate.decoder import Decoder, create_decoder
from nanogpt.generate.engine import Engine
from nanogpt.generate.quantize import Precision
from nanogpt.generate.sequence import Request
from nanogpt.generate.torch_decoder import TorchDecoder, strip_modules
from nanogpt.plan.model_size import flops_per_token
from nanogpt.tokenizer.tokenizer import train_tokenizer

app = App(help=__doc__)
PROMPT_TOKENS = 20
BATCH_SIZE = 64
LATENCY_PROMPT_TOKENS = 200  # of the prompt whose time to first token is measured
BATCHED = f", batch {BATCH_SIZE}"
LATENCY = "latency "
# Peers and the packages that they need.
PEERS = {
    "textbook": (),
    "transformers": ("transformers",),
    "llama.cpp Q8_0": ("xllamacpp", "gguf"),
}
SPAWN = multiprocessing.get_context("spawn")

Generate = Callable[[int], float]  # a number of tokens -> seconds per token


def is_installed(*packages: str) -> bool:
    """Return whether all packages are installed; print those that are not."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        print(f"skipped: {', '.join(missing)} not installed")
    return not missing


def textbook(loaded: checkpoint.LoadedModel) -> Generate:
    """Return the textbook loop: a forward pass over the whole window for every token."""
    c, vocab_size = loaded.model.config, loaded.tokenizer.vocab_size
    model = Textbook(vocab_size, c.n_layer, c.n_head, c.n_embd, c.context_length)
    window = torch.randint(vocab_size, (1, c.context_length))

    def generate(tokens: int) -> float:
        few = -(-tokens // 8)  # enough: every token takes equally long
        start = time.perf_counter()
        model.generate(window, few)
        return (time.perf_counter() - start) / few

    return generate


def transformers(loaded: checkpoint.LoadedModel) -> Generate:
    """Return transformers' `generate` with its default cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c, vocab_size = loaded.model.config, loaded.tokenizer.vocab_size
    config = GPT2Config(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_positions=c.context_length,
        vocab_size=vocab_size,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    prompt = torch.randint(vocab_size, (1, PROMPT_TOKENS))

    def generate(tokens: int) -> float:
        start = time.perf_counter()
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=0.8,
            top_k=0,
        )
        return (time.perf_counter() - start) / (generated.shape[1] - PROMPT_TOKENS)

    return generate


def llama_cpp(loaded: checkpoint.LoadedModel, threads: int, folder: Path) -> Generate:
    """Return llama.cpp with the weights in Q8_0, timed by itself and without the prefill."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(write_gguf(loaded, folder / "model.gguf"))
    params.n_ctx = loaded.model.config.context_length
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.verbosity = -1
    server = xllamacpp.Server(params)

    def generate(tokens: int) -> float:
        request = {
            "prompt": list(range(1, PROMPT_TOKENS + 1)),
            "n_predict": tokens,
            "temperature": 0.8,
            "top_k": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        response = server.handle_completions(request)
        return float(response["timings"]["predicted_per_token_ms"]) / 1e3

    return generate


GGUF_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.qkv_proj": "attn_qkv",
    "attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(loaded: checkpoint.LoadedModel, path: Path) -> Path:
    """Write a gpt2 model for llama.cpp with matrices in Q8_0; tokens are bytes or plain words."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    c, tokenizer = loaded.model.config, loaded.tokenizer
    writer = GGUFWriter(path, "gpt2")
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("llama")
    # Where two tokens have the same byte, the last is the byte's own.
    byte_tokens = {b[0]: token for token, b in enumerate(tokenizer.token_bytes) if len(b) == 1}
    names = [f"t{token}" for token in range(tokenizer.vocab_size)]
    for byte, token in byte_tokens.items():
        names[token] = f"<0x{byte:02X}>"
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * len(names))
    writer.add_token_types(
        [TokenType.BYTE if name.startswith("<0x") else TokenType.NORMAL for name in names]
    )
    writer.add_eos_token_id(tokenizer.eot_id)
    for name, tensor in loaded.model.state_dict().items():
        array = tensor.float().numpy()
        module, _, kind = name.rpartition(".")
        prefix = ""
        if module.startswith("blocks."):
            block, _, module = module.removeprefix("blocks.").partition(".")
            prefix = f"blk.{block}."
        gguf_name = f"{prefix}{GGUF_NAMES[module]}.{kind}"
        if array.ndim == 2 and module != "wpe":
            q_weight = quantize(array, GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, q_weight, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_prompt(loaded: checkpoint.LoadedModel, size: int, seed: int | None) -> list[int]:
    rng = np.random.default_rng(seed)
    prompt: list[int] = rng.integers(loaded.tokenizer.vocab_size, size=size).tolist()
    return prompt


def nanogpt(loaded: checkpoint.LoadedModel, decoder: Decoder, batch_size: int = 1) -> Generate:
    """Return the engine as users run it, with sampling, detokenization and log-probabilities."""
    eot = (loaded.tokenizer.eot_id, loaded.tokenizer.eot_id + 1)

    def generate(tokens: int) -> float:
        engine = Engine(decoder, loaded.tokenizer, [eot])
        for seed in range(batch_size):
            prompt = random_prompt(loaded, PROMPT_TOKENS, seed)
            engine.add(Request(prompt, SamplingConfig(max_tokens=tokens + 1), seed))
        engine.step()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return (time.perf_counter() - start) / tokens

    return generate


def first_token(loaded: checkpoint.LoadedModel, decoder: Decoder) -> Generate:
    """Return a function that measures the seconds to the first token of a new prompt."""

    def generate(tokens: int) -> float:
        engine = Engine(decoder, loaded.tokenizer)
        size = min(LATENCY_PROMPT_TOKENS, decoder.context_length)
        prompt = random_prompt(loaded, size, None)
        engine.add(Request(prompt, SamplingConfig(max_tokens=1), 0))
        start = time.perf_counter()
        engine.step()
        return time.perf_counter() - start

    return generate


def print_throughput(
    name: str, seconds: list[float], results: dict[str, list[float]], batch_size: int = 1
) -> None:
    """Print tokens per second, and for our variants their ratio to each peer."""
    speeds = sorted(batch_size / each for each in seconds)
    median = statistics.median(speeds)
    ratios = [
        f"{median * statistics.median(results[peer]):.3g}x {peer}"
        for peer in PEERS
        if peer in results
    ]
    suffix = f"  {', '.join(ratios)}" if name.startswith("nanogpt") else ""
    extremes = f"({speeds[0]:,.1f} to {speeds[-1]:,.1f})"
    print(f"{name:30} {median:9,.1f} tokens/s {extremes}{suffix}", flush=True)


def print_int8_cost(path: Path, text: str, machine: Machine) -> None:
    """Print a trained model's bits per byte in float32, in Numba's int8 and in PyTorch's int8.

    They are measured on the run's validation split, or without a run on the text.
    """
    texts = () if (path / "data.json").is_file() else (text,)
    exact, numba_int8, torch_int8 = (
        api.load(path, device="cpu", dtype=dtype, threads=machine.threads)
        for dtype in ("float32", "int8", "float32")
    )
    torch_int8._model = strip_modules(torch_int8._model, "int8")
    models = {"float32": exact, "numba int8": numba_int8, "torch int8": torch_int8}
    bits = {name: model.evaluate(*texts).bits_per_byte for name, model in models.items()}
    for name, value in bits.items():
        print(f"{name:10} {value:.5f} bits per byte, {value / bits['float32'] - 1:+.3%}")


def load_model(text: str, path: Path | None) -> checkpoint.LoadedModel:
    """Load a model, or build a random one in `nano` shape with the characters of the text."""
    if path is not None:
        return checkpoint.load(path)
    chunks = [chunk for source in resolve_sources([text]) for chunk in source.iter_text()]
    tokenizer = train_tokenizer("char", chunks)
    model = checkpoint.build_uninitialized(ModelConfig(), tokenizer.vocab_size, "cpu").eval()
    model.init_weights(torch.Generator().manual_seed(1337))
    return checkpoint.LoadedModel(model, tokenizer, {"unseen_token_ranges": []})


def make_variant(
    variant: str, loaded: checkpoint.LoadedModel, machine: Machine, folder: Path
) -> Generate:
    """Return the function that runs a variant of the table."""
    if variant == "textbook":
        return textbook(loaded)
    if variant == "transformers":
        return transformers(loaded)
    if variant == "llama.cpp Q8_0":
        return llama_cpp(loaded, machine.threads, folder)
    _, backend, precision = variant.removeprefix(LATENCY).removesuffix(BATCHED).split()
    batch_size = BATCH_SIZE if variant.endswith(BATCHED) else 1
    if backend == "torch":
        model = strip_modules(loaded.model, cast(Precision, precision))
        decoder: Decoder = TorchDecoder(model, machine, batch_size)
    else:
        decoder = create_decoder(loaded.model, machine, precision, batch_size)
    if variant.startswith(LATENCY):
        return first_token(loaded, decoder)
    return nanogpt(loaded, decoder, batch_size)


def serve_variant(
    pipe: Connection, variant: str, text: str, model: Path | None, threads: int, folder: Path
) -> None:
    """Run a variant in this process for each number of tokens that arrives.

    A process of its own, because threads that another variant leaves would slow it down.
    """
    torch.manual_seed(1337)
    config = TrainDeviceConfig(device="cpu", dtype="float32", threads=threads)
    machine = device.select_device(config)
    generate = make_variant(variant, load_model(text, model), machine, folder)
    generate(16)  # warm-up
    while tokens := pipe.recv():
        pipe.send(generate(tokens))


def list_variants(loaded: checkpoint.LoadedModel) -> list[str]:
    """Return the variants that are installed and support the model."""
    is_gpt2 = loaded.model.config.arch == "gpt2"
    peers = [
        name
        for name, packages in PEERS.items()
        if (name == "textbook" or is_gpt2) and is_installed(*packages)
    ]
    backends = ["torch", "numba"] if is_installed("numba") else ["torch"]
    ours = [f"nanogpt {backend} {dtype}" for backend in backends for dtype in ("float32", "int8")]
    return [*peers, *ours, *(name + BATCHED for name in ours), *(LATENCY + name for name in ours)]


@app.default
def main(
    *,
    text: str = "shakespeare",
    model: Path | None = None,
    tokens: int = 200,
    rounds: int = 5,
    threads: int | None = None,
) -> None:
    """Time every variant that is installed; print the table."""
    config = TrainDeviceConfig(device="cpu", dtype="float32", threads=threads)
    machine = device.select_device(config)
    loaded = load_model(text, model)
    # Within the context window, where the peers have their cache.
    tokens = min(tokens, loaded.model.config.context_length - PROMPT_TOKENS - 1)
    num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    print(f"{machine}, {measurements.cpu_name()}; torch {torch.__version__}")
    print(f"{num_parameters:,} parameters, {tokens} tokens")
    results: dict[str, list[float]] = {variant: [] for variant in list_variants(loaded)}
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for variant in results:
            pipes[variant], end = SPAWN.Pipe()
            args = (end, variant, text, model, machine.threads, Path(folder))
            SPAWN.Process(target=serve_variant, args=args, daemon=True).start()
        for _ in range(rounds):
            for variant, pipe in pipes.items():
                pipe.send(tokens)
                results[variant].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(0)
    print_table(results, loaded, machine, tokens)
    if model is not None:
        print_int8_cost(model, text, machine)


def print_table(
    results: dict[str, list[float]],
    loaded: checkpoint.LoadedModel,
    machine: Machine,
    tokens: int,
) -> None:
    """Print throughput, latency, and for batches the fraction of the peak FLOP/s."""
    # Without bfloat16 instructions, bfloat16 is far slower than float32.
    dtypes = (torch.bfloat16, torch.float32)
    peak = max(measurements.peak_flops(machine.device, dtype) for dtype in dtypes)
    flops = decode_flops(loaded, PROMPT_TOKENS + tokens / 2)
    for variant, seconds in results.items():
        median = statistics.median(seconds)
        if variant.startswith(LATENCY):
            name = f"first token after {LATENCY_PROMPT_TOKENS}, {variant.removeprefix(LATENCY):22}"
            extremes = f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
            print(f"{name} {1e3 * median:6.1f} ms {extremes}")
        elif variant.endswith(BATCHED):
            print_throughput(variant, seconds, results, BATCH_SIZE)
            speed = BATCH_SIZE * flops / median
            fraction = f"{speed / peak:.0%} of the peak, {peak / 1e9:,.0f} GFLOP/s"
            print(f"{'':30} {speed / 1e9:9,.1f} GFLOP/s, {fraction}")
        else:
            print_throughput(variant, seconds, results)


def decode_flops(loaded: checkpoint.LoadedModel, context: float) -> float:
    """Return the FLOPs of a decoded token that attends to `context` tokens on average."""
    c = loaded.model.config
    window = c.sliding_window or math.inf
    unused_context = min(c.context_length, window) - min(context, window)
    attention_flops = 4 * c.n_layer * c.n_embd
    forward_flops = flops_per_token(c, loaded.tokenizer.vocab_size) / 3
    return forward_flops - attention_flops * unused_context


if __name__ == "__main__":
    app()
