"""The model equals transformers', gradients included, cached or not; and seeded dropout."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, gpt2_like, hf_to_ours, qwen3_like, to_hf_layout

from nanogpt import model as network
from nanogpt.model import KVCache, gelu, ntk_scaled_rope_theta
from nanogpt.ops import causal_mask, dropout, split_dropout_seeds


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "more"),
    [
        (1, 1, 4, {}),
        (2, 2, 16, {}),
        (3, 4, 24, {}),
        (2, 2, 16, {"tie_word_embeddings": False}),
    ],
)
def test_gpt2_logits_and_gradients_equal_transformers(make_model, n_layer, n_head, n_embd, more):
    model = make_model(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **more)
    peer = gpt2_like(model)
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, dims=1)
    expected_logits = peer(idx).logits
    torch.testing.assert_close(model(idx), expected_logits, atol=1e-5, rtol=1e-5)
    model.loss_sum(idx, targets).backward()
    F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        gradient = to_hf_layout(name, ours[hf_to_ours(name)].grad)
        expected = parameter.grad
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradient, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("normalize_embedding", [True, False])
@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "n_embd", "more"),
    [
        (1, None, 4, {}),
        (2, 2, 16, {}),
        (4, 2, 32, {}),
        (6, 1, 48, {}),
        (4, 2, 32, {"sliding_window": 3}),
        (2, 2, 16, {"sliding_window": 1, "rope_theta": 400.0}),
        (3, None, 16, {"head_dim": 8}),
        (4, 2, 16, {"head_dim": 2, "tie_word_embeddings": True}),
    ],
)
def test_qwen3_logits_and_gradients_equal_transformers(
    make_model, n_head, n_kv_head, n_embd, more, normalize_embedding
):
    shape = {"n_head": n_head, "n_kv_head": n_kv_head, "n_embd": n_embd}
    model = make_model(arch="qwen3", scale=1.0, **shape, **more)
    model.normalize_embedding = normalize_embedding
    peer = qwen3_like(model)
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, dims=1)
    expected_logits = peer(idx).logits
    torch.testing.assert_close(model(idx), expected_logits, atol=1e-5, rtol=1e-5)
    model.loss_sum(idx, targets).backward()
    F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    pairs = []
    if not normalize_embedding:
        pairs.append((model.wte.weight, peer.model.embed_tokens.weight.grad))
    for block, layer in zip(model.blocks, peer.model.layers, strict=True):
        attn = layer.self_attn
        qkv = (attn.q_proj, attn.k_proj, attn.v_proj)
        pairs += [
            (block.attn.qkv_proj.weight, torch.cat([part.weight.grad for part in qkv])),
            (block.attn.o_proj.weight, attn.o_proj.weight.grad),
            (block.mlp.down_proj.weight, layer.mlp.down_proj.weight.grad),
            (block.attn.q_norm.weight, attn.q_norm.weight.grad),
            (block.ln_1.weight, layer.input_layernorm.weight.grad),
        ]
    for parameter, expected in pairs:
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(parameter.grad, expected, atol=atol, rtol=1e-4)


def test_attention_is_causal(make_model):
    model = make_model()
    idx = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(1))
    other = idx.clone()
    other[0, 5] = (other[0, 5] + 1) % 11
    before, after = model(idx), model(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arch": "qwen3"},
        {"arch": "qwen3", "n_head": 4, "n_kv_head": 2},
        {"arch": "qwen3", "sliding_window": 3},
        {"arch": "qwen3", "sliding_window": 8},
        {"arch": "qwen3", "n_head": 4, "n_kv_head": 2, "head_dim": 6, "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("chunk_size", [2, 1024])
@pytest.mark.parametrize("splits", [[8], [1] * 8, [3, 1, 4], [5, 3]])
def test_kv_cache_gives_the_uncached_logits(make_model, splits, settings, chunk_size, monkeypatch):
    model = make_model(**settings)
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    expected = model(idx)
    monkeypatch.setattr(network, "ATTN_CHUNK_SIZE", chunk_size)
    cache = KVCache.empty(model.config, 2, torch.device("cpu"), torch.float32)
    logits = torch.cat([model(part, cache=cache) for part in idx.split(splits, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="context"):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"arch": "qwen3"},
        {"arch": "qwen3", "n_head": 4, "n_kv_head": 2},
        {"arch": "qwen3", "sliding_window": 3},
        {"arch": "qwen3", "sliding_window": 8},
    ],
)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_kv_cache_rows_of_unequal_lengths_are_independent(
    make_model, settings, attn_implementation
):
    model = make_model(**settings)
    model.set_attn_implementation(attn_implementation)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    cache = KVCache.empty(model.config, 5, torch.device("cpu"), torch.float32)
    lengths = [3, 6, 1, 4]
    for row, length in enumerate(lengths):
        model(idx[row : row + 1, :length], cache=cache[row : row + 1])
    for step in range(2):
        positions = torch.tensor(lengths) + step
        logits = model(idx[range(4), positions].unsqueeze(1), cache=cache[:4])[:, 0]  # (4, V)
        expected = model(idx)[range(4), positions]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [5, 8, 3, 6, 0]


def test_last_token_logits_are_the_last_logits(make_model):
    model = make_model()
    idx = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.last_token_logits(idx), model(idx)[:, -1])


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_init_weights_gives_the_loss_of_a_uniform_guess(make_model, arch, tie_word_embeddings):
    model = make_model(vocab_size=50, arch=arch, tie_word_embeddings=tie_word_embeddings)
    model.init_weights(torch.Generator().manual_seed(0))
    idx = torch.randint(50, (8, 8), generator=torch.Generator().manual_seed(1))
    loss = model.loss_sum(idx, idx.roll(1, 1)).item() / 64
    assert loss == pytest.approx(math.log(50), abs=0.05)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_tied_head_is_the_embedding_table(make_model, arch):
    tied = make_model(arch=arch, tie_word_embeddings=True)
    untied = make_model(arch=arch, tie_word_embeddings=False)
    assert torch.equal(tied.head_weight(), tied.embedding_table())
    assert set(dict(untied.named_parameters())) - set(dict(tied.named_parameters())) == {
        "lm_head.weight"
    }


def test_gpt2_parameter_count_has_a_tied_head(make_model):
    model = make_model()
    C, V, T, layers = 16, 11, 8, 2
    assert (
        sum(p.numel() for p in model.parameters())
        == V * C + T * C + layers * (12 * C * C + 13 * C) + 2 * C
    )


SEEDS = torch.tensor([3, -70_000, 2**31 - 1, 12345], dtype=torch.int32)


def test_dropout_zeroes_a_fraction_and_keeps_the_mean():
    x = torch.ones(4, 64, 100)
    y = dropout(x, 0.2, SEEDS)
    assert (y == 0).float().mean().item() == pytest.approx(51 / 256, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert y.unique().numel() == 2


@pytest.mark.parametrize("shape", [(4, 7, 9), (4, 2, 5, 5), (4, 1, 3)])
def test_dropout_mask_of_a_row_depends_on_its_seed_alone(shape):
    x = torch.ones(shape)
    whole = dropout(x, 0.5, SEEDS)
    for row in range(4):
        assert torch.equal(
            dropout(x[row : row + 1], 0.5, SEEDS[row : row + 1]), whole[row : row + 1]
        )
        assert torch.equal(
            split_dropout_seeds(SEEDS[row : row + 1], 3),
            split_dropout_seeds(SEEDS, 3)[:, :, row : row + 1],
        )


def test_dropout_masks_of_rows_sites_and_neighbours_are_unrelated():
    x = torch.ones(4, 4096)
    here, there = (dropout(x, 0.5, keys) > 0 for keys in split_dropout_seeds(SEEDS, 2)[1, :2])
    for a, b in (
        (here, there),
        (here[0], here[1]),
        (here[:, 1:], here[:, :-1]),
        (here[:, 4:], here[:, :-4]),
    ):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_dropout_without_seeds_or_rate_returns_its_input(make_model):
    x = torch.randn(4, 5, 6)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, SEEDS) is x


def test_dropout_in_the_model_depends_on_the_seeds_alone(make_model):
    model = make_model(dropout=0.5)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    plain, dropped = model(idx), model(idx, SEEDS)
    assert not torch.allclose(plain, dropped)
    assert torch.equal(dropped, model(idx, SEEDS))
    torch.testing.assert_close(model(idx[1:2], SEEDS[1:2]), dropped[1:2])
    assert split_dropout_seeds(SEEDS, 3).unique().numel() == 3 * 3 * 4


def test_eager_attention_equals_sdpa(make_model):
    for arch in ("gpt2", "qwen3"):
        model, idx = (
            make_model(arch=arch),
            torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1)),
        )
        fused = model(idx)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(idx), fused, atol=1e-5, rtol=1e-5)


def test_gelu_compiled_is_the_same_function(monkeypatch):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    plain = gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x), plain, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(plain, torch.nn.functional.gelu(x, approximate="tanh"))


def gradients(model, idx, keys=None):
    """The loss and every gradient of it."""
    model.zero_grad()
    loss = model.loss_sum(idx, idx.roll(-1, 1), keys)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def naive_window(T, window):
    """Each token sees itself and the `window` - 1 before it."""
    return torch.tensor(
        [[0.0 if 0 <= t - s < window else -torch.inf for s in range(T)] for t in range(T)]
    )


@pytest.mark.parametrize(("T", "window"), [(7, 1), (7, 3), (7, 7), (7, 20)])
def test_causal_mask_hides_keys_outside_the_window(T, window):
    for seen in range(1, T + 1):
        assert torch.equal(
            causal_mask(torch.arange(T - seen, T), T, window), naive_window(T, window)[T - seen :]
        )
    positions = torch.tensor([[0, 3], [6, 2]])
    assert torch.equal(
        causal_mask(positions, T, window),
        torch.stack([naive_window(T, window)[row] for row in positions]),
    )


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 3, 8])
def test_chunked_attention_equals_masked_attention(make_model, monkeypatch, window, fused, queries):
    model = make_model(arch="qwen3", sliding_window=window, n_head=4, n_kv_head=2)
    model.set_attn_implementation("eager")
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(
        network.ops, "causal_mask", lambda positions, S, _=None: naive_window(S, window or S)[None]
    )
    expected = gradients(model, idx)
    monkeypatch.undo()
    monkeypatch.setattr(network, "ATTN_CHUNK_SIZE", queries)
    model.set_attn_implementation("sdpa" if fused else "eager")
    for got, right in zip(gradients(model, idx), expected, strict=True):
        torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


def test_chunked_attention_dropout_depends_on_the_seeds_alone(make_model, monkeypatch):
    monkeypatch.setattr(network, "ATTN_CHUNK_SIZE", 3)
    model = make_model(dropout=0.5)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    dropped = model(idx, SEEDS)
    assert torch.equal(dropped, model(idx, SEEDS))
    assert not torch.allclose(dropped, model(idx))
    torch.testing.assert_close(model(idx[1:2], SEEDS[1:2]), dropped[1:2])


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("queries", [3, 1024])
def test_activation_checkpointing_is_bit_exact(make_model, arch, queries, monkeypatch):
    monkeypatch.setattr(network, "ATTN_CHUNK_SIZE", queries)
    model, idx = (
        make_model(arch=arch, dropout=0.3),
        torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1)),
    )
    expected = gradients(model, idx, SEEDS)
    model.activation_checkpointing = True
    assert all(
        torch.equal(*pair) for pair in zip(gradients(model, idx, SEEDS), expected, strict=True)
    )


def test_chunked_cross_entropy_has_the_same_gradients_and_token_losses(make_model, monkeypatch):
    for arch in ("gpt2", "qwen3"):
        model, idx = (
            make_model(arch=arch),
            torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1)),
        )
        expected = gradients(model, idx)
        monkeypatch.setattr(network, "MAX_LOGITS_PER_CHUNK", 44)  # four positions
        for got, right in zip(gradients(model, idx), expected, strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
        each = model.token_losses(idx, idx.roll(-1, 1))
        torch.testing.assert_close(
            each, F.cross_entropy(model(idx).transpose(1, 2), idx.roll(-1, 1), reduction="none")
        )
        monkeypatch.undo()


def test_ntk_scaling_slows_the_slowest_rotation_only():
    assert ntk_scaled_rope_theta(10_000.0, 1.0, 64) == 10_000.0
    near, far = (
        network.rope_cos_sin(torch.arange(9), 16, base)
        for base in (100.0, ntk_scaled_rope_theta(100.0, 4.0, 16))
    )
    torch.testing.assert_close(far[:, :, 0], near[:, :, 0])
    torch.testing.assert_close(far[:, 8, -1], near[:, 2, -1])


PEAKS = """
import resource, sys
import numpy as np, torch
from nanogpt import checkpoint, evaluate
from nanogpt.device.device import select_device
from nanogpt.config import ModelConfig, TrainDeviceConfig

machine = select_device(TrainDeviceConfig(device="cpu", dtype="float32", threads=1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for T in (4096, 8192, 16384):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": T} | eval(sys.argv[2])
    model = checkpoint.build_uninitialized(ModelConfig(**shape), 300, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = np.arange(T + 1, dtype=np.uint16) % 300
    if sys.argv[1] == "train":
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        model.loss_sum(ids[:, :-1], ids[:, 1:], torch.zeros(1, dtype=torch.int32)).backward()
    else:
        model.set_attn_implementation("eager")
        evaluate.evaluate(model, tokens, evaluate.TextSize(T), machine)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is told in other ways")
@pytest.mark.parametrize(
    ("what", "shape"),
    [
        ("train", {"arch": "qwen3"}),
        ("train", {"arch": "qwen3", "sliding_window": 300}),
        ("evaluate", {"arch": "gpt2"}),
    ],
)
def test_memory_is_linear_in_the_context_length(what, shape):
    words = [sys.executable, "-c", PEAKS, what, repr(shape)]
    near, middle, far = map(
        int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    )
    assert far - middle < 3 * max(
        middle - near, 30_000
    )  # KiB; in proportion it is 2 times, by the square 4
    assert far < 500_000  # a number for each pair of tokens would be 1 GiB in each head


WITHOUT_COMPILER = """
import sys
import numpy as np
import nanogpt
from nanogpt import checkpoint, evaluate, model
from nanogpt.device.device import select_device
from nanogpt.config import ModelConfig, TrainDeviceConfig

# The evaluation runs in chunks, the training step does not.
model.ATTN_CHUNK_SIZE, model.MAX_LOGITS_PER_CHUNK = 4, 50
machine = select_device(TrainDeviceConfig(device="cpu", dtype="float32", threads=1))
config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16)
gpt = checkpoint.build_uninitialized(config, 11, "cpu")
gpt.set_attn_implementation("eager")
gpt.activation_checkpointing = True
evaluate.evaluate(gpt, np.arange(40) % 11, evaluate.TextSize(40), machine)
model.ATTN_CHUNK_SIZE, model.MAX_LOGITS_PER_CHUNK = 1024, 2**25
nanogpt.train(sys.argv[1], **eval(sys.argv[2]))
print("torch._dynamo" in sys.modules)
"""


def test_evaluation_and_uncompiled_steps_do_not_import_the_compiler(story):
    words = [
        sys.executable,
        "-c",
        WITHOUT_COMPILER,
        str(story),
        repr(TINY | {"steps": 2, "device": "cpu"}),
    ]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"
