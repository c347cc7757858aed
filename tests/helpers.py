"""Helpers shared by several test modules."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import openai
import torch
from safetensors.torch import load_file

from nanogpt import checkpoint
from nanogpt.cli.main import main
from nanogpt.config import ModelConfig
from nanogpt.distributed.sharded_io import load_full_state
from nanogpt.model import GPT, RMS_NORM_EPS
from nanogpt.tokenizer.tokenizer import train_tokenizer
from nanogpt.training.events import StepEnd

# Device settings are fixed, so that no test depends on what is faster on the machine it runs on.
TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "context_length": 16,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 5,
    "dtype": "float32",
    "attention": "sdpa",
    "compile": False,
}
CPU_FLAGS = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]  # Nothing is measured.


def run(*args):
    """Run a command, and return its exit code; capsys has its output."""
    try:
        main([str(arg) for arg in args])
    except SystemExit as error:
        return error.code or 0
    return 0


def metrics_without_timings(run):
    """Return the records of metrics.jsonl without their timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("seconds", "tokens_per_second")
    return [
        {key: value for key, value in record.items() if key not in timings} for record in records
    ]


def assert_runs_equal(run, other):
    """Assert that two runs have equal metrics, and equal files byte for byte."""
    assert metrics_without_timings(run) == metrics_without_timings(other)
    for name in ("samples.jsonl", "model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    folder, other_folder = (
        path / "state" / str(checkpoint.latest_step(path)) for path in (run, other)
    )
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (folder / name).read_bytes() == (other_folder / name).read_bytes()


def stop_at(step, number):
    """Return a listener that sends the signal `number` after a step."""

    def listener(event):
        if isinstance(event, StepEnd) and event.step == step:
            signal.raise_signal(number)

    return listener


def free_port():
    """Return a TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights(run):
    """Return the weights of the run's latest state, unsharded."""
    state = load_full_state(run / "state" / str(checkpoint.latest_step(run)))
    names = load_file(run / "model.safetensors").keys()
    return {name: state[name] for name in names}


def hf_to_ours(name: str) -> str:
    """Return our name for a parameter of transformers' GPT-2."""
    name = name.removeprefix("transformer.").replace("h.", "blocks.", 1)
    name = name.replace("c_attn", "qkv_proj").replace("attn.c_proj", "attn.o_proj")
    return name.replace("mlp.c_proj", "mlp.down_proj").replace("c_fc", "up_proj")


def to_hf_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Transpose a matrix if transformers' GPT-2 stores it transposed."""
    return tensor.T if "c_" in name and tensor.dim() == 2 else tensor


def gpt2_like(model: GPT):
    """Build transformers' GPT-2 with the weights of a model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=c.context_length,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        tie_word_embeddings=c.has_tied_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )
    peer = GPT2LMHeadModel(config).eval()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(to_hf_layout(name, ours.pop(hf_to_ours(name))))
    assert not ours
    return peer


def qwen3_like(model: GPT):
    """Build transformers' Qwen3 with the weights and normalised embeddings of a model."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    window = {}
    if c.sliding_window is not None:
        window = {
            "use_sliding_window": True,
            "sliding_window": c.sliding_window,
            "max_window_layers": 0,
        }
    config = Qwen3Config(
        vocab_size=model.vocab_size,
        hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_size,
        intermediate_size=c.intermediate_size,
        max_position_embeddings=c.context_length,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.has_tied_embeddings,
        **window,
    )
    peer = Qwen3ForCausalLM(config).eval()
    tensors = {
        "model.embed_tokens.weight": model.embedding_table(),
        "model.norm.weight": model.ln_f.weight,
        "lm_head.weight": model.head_weight(),
    }
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        num_heads = (attn.n_head, attn.n_kv_head, attn.n_kv_head)
        q, k, v = attn.qkv_proj.weight.split([n * attn.head_dim for n in num_heads])
        gate, up = mlp.up_proj.weight.chunk(2)
        layer = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": attn.o_proj.weight,
            "self_attn.q_norm": attn.q_norm.weight,
            "self_attn.k_norm": attn.k_norm.weight,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": mlp.down_proj.weight,
            "input_layernorm": block.ln_1.weight,
            "post_attention_layernorm": block.ln_2.weight,
        }
        tensors |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in layer.items()}
    peer.load_state_dict(tensors)
    return peer


def make_run(folder, seed):
    """Write a model file with random weights, whose training text was one sentence."""
    sentence = "the quick brown fox jumps over the lazy dog\n"
    tokenizer = train_tokenizer("char", [sentence])
    seen = tokenizer.encode(sentence)
    unseen = [[i, i + 1] for i in range(tokenizer.vocab_size) if i not in seen]
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, context_length=32, dropout=0.0)
    model = checkpoint.build_uninitialized(config, tokenizer.vocab_size, "cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.dim() == 2 else 1.0)
    summary = {"step": 1, "unseen_token_ranges": unseen}
    checkpoint.save_model(folder / "model.safetensors", model, tokenizer, summary)


class Server:
    """A running server: its process, its address, and ways to send requests."""

    def __init__(self, process, url):
        self.process, self.url = process, url
        self.host, self.port = re.fullmatch(r"http://([\d.]+):(\d+)", url).groups()

    def client(self, **options):
        """Return an OpenAI client of the server."""
        defaults = {"api_key": "none", "max_retries": 0, "timeout": 300}
        return openai.OpenAI(base_url=f"{self.url}/v1", **defaults | options)

    def ask(self, method, path, body=None, headers=None):
        """Send a plain HTTP request, and return the status and the content of the response."""
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=300)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, body, **headers):
        """Send a completion request, and return the status and the content of the response."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | headers
        return self.ask("POST", "/v1/completions", body, headers)

    def gauge(self, name, model="a"):
        """Return the value that /metrics has for a model."""
        metrics = self.ask("GET", "/metrics")[1].decode()
        match = re.search(rf'^{name}{{model="{model}"}} (\d+)\.0$', metrics, re.M)
        return int(match[1]) if match else 0

    def wait_until(self, name, value, model="a"):
        """Wait until /metrics has a value for a model."""
        deadline = time.monotonic() + 120
        while self.gauge(name, model) != value:
            found = self.gauge(name, model)
            assert time.monotonic() < deadline, f"{name} is {found} and not {value}"
            time.sleep(0.02)


@contextmanager
def serving(path, *args, env=None, before=""):
    """Run `nanogpt serve` in a process; `before` is Python code to run first."""
    code = f"import nanogpt.server.app; from nanogpt.cli.main import main\n{before}\nmain()"
    command = [sys.executable, "-c", code, "serve", str(path), "--port", "0", *CPU_FLAGS]
    process = subprocess.Popen(
        [*command, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (env or {}),
    )
    try:
        address = None
        while not address:
            line = process.stdout.readline()
            assert line, f"it ended with {process.wait()}"
            address = re.fullmatch(r"Page +(http://\S+)/\n", line)
        yield Server(process, address[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def resident(process):
    """Return the resident memory of a process, in MB."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
