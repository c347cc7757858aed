"""The network computes what it says: GPT-2's function, gradients included, cached or not; and dropout by key."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from nanogpt import model as network
from nanogpt.model import EPSILON, GPT, KVCache, causal_mask, dropout, dropout_keys, gelu, stretched_base
from nanogpt.sizes import swiglu_width


def own_name(theirs: str) -> str:
    """Our name for one of transformers' parameters."""
    name = theirs.removeprefix("transformer.").replace("h.", "blocks.", 1)
    return name.replace("c_attn", "qkv").replace("c_proj", "proj").replace("c_fc", "fc")


def as_theirs(name: str, ours: torch.Tensor) -> torch.Tensor:
    """transformers' GPT-2 keeps the matrices of its linear layers transposed."""
    return ours.T if "c_" in name and ours.dim() == 2 else ours


def gpt2_like(model: GPT) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of a model."""
    c = model.config
    shape = {"vocab_size": model.vocab_size, "n_positions": c.context_length, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
    peer = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(as_theirs(name, ours.pop(own_name(name))))
    assert not ours
    return peer


@pytest.mark.parametrize(("n_layer", "n_head", "n_embd"), [(1, 1, 4), (2, 2, 16), (3, 4, 24)])
def test_logits_and_gradients_equal_those_of_transformers(make_model, n_layer, n_head, n_embd):
    model = make_model(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    peer = gpt2_like(model)
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, dims=1)
    theirs = peer(idx).logits
    torch.testing.assert_close(model(idx), theirs, atol=1e-5, rtol=1e-5)
    model.nats(idx, targets).backward()
    F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours = dict(model.named_parameters())
    for name, parameter in peer.named_parameters():
        expected, got = parameter.grad, as_theirs(name, ours[own_name(name)].grad)
        torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=1e-5)


def qwen3_like(model: GPT) -> Qwen3ForCausalLM:
    """transformers' Qwen3 with the weights of a model; its embedding has the size that ours gets as it is read."""
    c = model.config
    shape = {"vocab_size": model.vocab_size, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head}
    shape |= {"num_key_value_heads": c.n_kv_head or c.n_head, "head_dim": c.n_embd // c.n_head, "intermediate_size": swiglu_width(c.n_embd)}
    rope = {"rope_type": "default", "rope_theta": c.rope_base}
    if c.window is not None:
        shape |= {"use_sliding_window": True, "sliding_window": c.window, "max_window_layers": 0}
    config = Qwen3Config(**shape, max_position_embeddings=c.context_length, rms_norm_eps=EPSILON, rope_parameters=rope, tie_word_embeddings=False)
    peer = Qwen3ForCausalLM(config).eval()
    ours = {"model.embed_tokens.weight": F.rms_norm(model.wte.weight, [c.n_embd], eps=EPSILON), "model.norm.weight": model.ln_f.weight}
    ours["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        attn, mlp = block.attn, block.mlp
        q, k, v = attn.qkv.weight.split([heads * attn.head_dim for heads in (attn.n_head, attn.n_kv_head, attn.n_kv_head)])
        gate, value = mlp.fc.weight.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": attn.proj.weight}
        parts |= {"self_attn.q_norm": attn.q_norm.weight, "self_attn.k_norm": attn.k_norm.weight, "mlp.gate_proj": gate, "mlp.up_proj": value}
        parts |= {"mlp.down_proj": mlp.proj.weight, "input_layernorm": block.ln_1.weight, "post_attention_layernorm": block.ln_2.weight}
        ours |= {f"model.layers.{i}.{name}.weight": part for name, part in parts.items()}
    peer.load_state_dict(ours)
    return peer


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "n_embd", "more"),
    [(1, None, 4, {}), (2, 2, 16, {}), (4, 2, 32, {}), (6, 1, 48, {}), (4, 2, 32, {"window": 3}), (2, 2, 16, {"window": 1, "rope_base": 400.0})],
)
def test_modern_is_qwen3(make_model, n_head, n_kv_head, n_embd, more):
    model = make_model(arch="modern", n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd, scale=1.0, **more)
    peer = qwen3_like(model)
    idx = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, dims=1)
    ours, theirs = model(idx), peer(idx).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    model.nats(idx, targets).backward()
    F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for i, block in enumerate(model.blocks):
        layer = peer.model.layers[i]
        expected = [torch.cat([part.weight.grad for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)])]
        expected += [layer.mlp.down_proj.weight.grad, layer.self_attn.q_norm.weight.grad, layer.input_layernorm.weight.grad]
        got = [block.attn.qkv.weight.grad, block.mlp.proj.weight.grad, block.attn.q_norm.weight.grad, block.ln_1.weight.grad]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=1e-4)


def test_a_token_changes_nothing_before_it(make_model):
    model = make_model()
    idx = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(1))
    other = idx.clone()
    other[0, 5] = (other[0, 5] + 1) % 11
    before, after = model(idx), model(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    "settings", [{}, {"arch": "modern"}, {"arch": "modern", "n_head": 4, "n_kv_head": 2}, {"arch": "modern", "window": 3}, {"arch": "modern", "window": 8}]
)
@pytest.mark.parametrize("queries", [2, 1024])
@pytest.mark.parametrize("pieces", [[8], [1] * 8, [3, 1, 4], [5, 3]])
def test_reading_in_pieces_through_the_cache_gives_the_same_logits(make_model, pieces, settings, queries, monkeypatch):
    model = make_model(**settings)
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    whole = model(idx)
    monkeypatch.setattr(network, "QUERIES", queries)
    cache = KVCache.empty(model.config, 2, torch.device("cpu"), torch.float32)
    got = torch.cat([model(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="context"):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize(
    "settings", [{}, {"arch": "modern"}, {"arch": "modern", "n_head": 4, "n_kv_head": 2}, {"arch": "modern", "window": 3}, {"arch": "modern", "window": 8}]
)
@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_unequal_lengths_are_each_as_if_alone(make_model, settings, fused):
    model = make_model(**settings)
    model.fuse_attention(fused)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    cache, lengths = KVCache.empty(model.config, 5, torch.device("cpu"), torch.float32), [3, 6, 1, 4]
    for row, length in enumerate(lengths):
        model(idx[row : row + 1, :length], cache=cache[row : row + 1])
    for step in range(2):
        places = torch.tensor(lengths) + step
        got = model(idx[range(4), places].unsqueeze(1), cache=cache[:4])[:, 0]  # (4, V)
        torch.testing.assert_close(got, model(idx)[range(4), places], atol=1e-5, rtol=1e-5)
    assert cache.lengths.tolist() == [5, 8, 3, 6, 0]


def test_next_logits_are_the_last_ones(make_model):
    model = make_model()
    idx = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.next_logits(idx), model(idx)[:, -1])


def test_the_loss_of_first_weights_is_that_of_chance(make_model):
    model = make_model(vocab_size=50)
    model.init_weights(torch.Generator().manual_seed(0))
    idx = torch.randint(50, (8, 8), generator=torch.Generator().manual_seed(1))
    assert model.nats(idx, idx.roll(1, 1)).item() / 64 == pytest.approx(torch.tensor(50.0).log().item(), abs=0.05)


def test_the_head_is_the_embedding_and_no_parameter_is_left_out(make_model):
    model = make_model()
    C, V, T, layers = 16, 11, 8, 2
    assert sum(p.numel() for p in model.parameters()) == V * C + T * C + layers * (12 * C * C + 13 * C) + 2 * C


KEYS = torch.tensor([3, -70_000, 2**31 - 1, 12345], dtype=torch.int32)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = torch.ones(4, 64, 100)
    y = dropout(x, 0.2, KEYS)
    assert (y == 0).float().mean().item() == pytest.approx(51 / 256, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert y.unique().numel() == 2


@pytest.mark.parametrize("shape", [(4, 7, 9), (4, 2, 5, 5), (4, 1, 3)])
def test_the_mask_of_a_row_depends_on_its_key_alone(shape):
    x = torch.ones(shape)
    whole = dropout(x, 0.5, KEYS)
    for row in range(4):
        assert torch.equal(dropout(x[row : row + 1], 0.5, KEYS[row : row + 1]), whole[row : row + 1])
        assert torch.equal(dropout_keys(KEYS[row : row + 1], 3), dropout_keys(KEYS, 3)[:, :, row : row + 1])


def test_masks_of_rows_places_and_neighbours_are_unrelated():
    x = torch.ones(4, 4096)
    here, there = (dropout(x, 0.5, keys) > 0 for keys in dropout_keys(KEYS, 2)[1, :2])
    for a, b in ((here, there), (here[0], here[1]), (here[:, 1:], here[:, :-1]), (here[:, 4:], here[:, :-4])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_without_keys_or_without_a_rate_nothing_is_dropped(make_model):
    x = torch.randn(4, 5, 6)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, KEYS) is x


def test_dropout_acts_on_embedding_attention_and_both_branches(make_model):
    model = make_model(dropout=0.5)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    plain, dropped = model(idx), model(idx, KEYS)
    assert not torch.allclose(plain, dropped)
    assert torch.equal(dropped, model(idx, KEYS))
    torch.testing.assert_close(model(idx[1:2], KEYS[1:2]), dropped[1:2])
    assert dropout_keys(KEYS, 3).unique().numel() == 3 * 3 * 4


def test_attention_by_its_probabilities_equals_fused_attention(make_model):
    for arch in ("classic", "modern"):
        model, idx = make_model(arch=arch), torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
        fused = model(idx)
        for block in model.blocks:
            block.attn.fused = False
        torch.testing.assert_close(model(idx), fused, atol=1e-5, rtol=1e-5)


def test_the_compilers_gelu_is_the_same_function(monkeypatch):
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    plain = gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu(x), plain, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(plain, torch.nn.functional.gelu(x, approximate="tanh"))


def gradients(model, idx, keys=None):
    """The loss and every gradient of it."""
    model.zero_grad()
    loss = model.nats(idx, idx.roll(-1, 1), keys)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def naive_window(T, window):
    """Each token sees itself and the `window` - 1 before it."""
    return torch.tensor([[0.0 if 0 <= t - s < window else -torch.inf for s in range(T)] for t in range(T)])


@pytest.mark.parametrize(("T", "window"), [(7, 1), (7, 3), (7, 7), (7, 20)])
def test_a_window_hides_what_lies_further_back(T, window):
    for seen in range(1, T + 1):
        assert torch.equal(causal_mask(torch.arange(T - seen, T), T, window), naive_window(T, window)[T - seen :])
    positions = torch.tensor([[0, 3], [6, 2]])
    assert torch.equal(causal_mask(positions, T, window), torch.stack([naive_window(T, window)[row] for row in positions]))


@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("queries", [1, 2, 3, 8])
def test_attention_by_blocks_is_attention_through_a_mask(make_model, monkeypatch, window, fused, queries):
    model = make_model(arch="modern", window=window, n_head=4, n_kv_head=2)
    model.fuse_attention(False)
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(network, "causal_mask", lambda positions, S, _=None: naive_window(S, window or S)[None])
    expected = gradients(model, idx)
    monkeypatch.undo()
    monkeypatch.setattr(network, "QUERIES", queries)
    model.fuse_attention(fused)
    for got, right in zip(gradients(model, idx), expected, strict=True):
        torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


def test_blocks_drop_their_share_of_probabilities_by_the_row(make_model, monkeypatch):
    monkeypatch.setattr(network, "QUERIES", 3)
    model = make_model(dropout=0.5)
    idx = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    dropped = model(idx, KEYS)
    assert torch.equal(dropped, model(idx, KEYS))
    assert not torch.allclose(dropped, model(idx))
    torch.testing.assert_close(model(idx[1:2], KEYS[1:2]), dropped[1:2])


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("queries", [3, 1024])
def test_checkpointed_activations_give_the_same_gradients_bit_for_bit(make_model, arch, queries, monkeypatch):
    monkeypatch.setattr(network, "QUERIES", queries)
    model, idx = make_model(arch=arch, dropout=0.3), torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(1))
    expected = gradients(model, idx, KEYS)
    model.checkpoint_activations(True)
    assert all(torch.equal(*pair) for pair in zip(gradients(model, idx, KEYS), expected, strict=True))


def test_a_loss_in_pieces_has_the_same_gradients_and_parts(make_model, monkeypatch):
    for arch in ("classic", "modern"):
        model, idx = make_model(arch=arch), torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(1))
        expected = gradients(model, idx)
        monkeypatch.setattr(network, "SCORES", 44)  # four positions
        for got, right in zip(gradients(model, idx), expected, strict=True):
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
        each = model.nats_of_each(idx, idx.roll(-1, 1))
        torch.testing.assert_close(each, F.cross_entropy(model(idx).transpose(1, 2), idx.roll(-1, 1), reduction="none"))
        monkeypatch.undo()


def test_stretching_by_one_changes_nothing_and_else_slows_the_slowest_turn():
    assert stretched_base(10_000.0, 1.0, 64) == 10_000.0
    near, far = (network.turns(torch.arange(9), 16, base) for base in (100.0, stretched_base(100.0, 4.0, 16)))
    torch.testing.assert_close(far[:, :, 0], near[:, :, 0])
    torch.testing.assert_close(far[:, 8, -1], near[:, 2, -1])


PEAKS = """
import resource, sys
import numpy as np, torch
from nanogpt import checkpoint, evaluate, machine
from nanogpt.config import MachineConfig, ModelConfig

place = machine.choose(MachineConfig(device="cpu", dtype="float32", threads=1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for T in (4096, 8192, 16384):
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_length": T} | eval(sys.argv[2])
    model = checkpoint.empty_model(ModelConfig(**shape), 300, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = np.arange(T + 1, dtype=np.uint16) % 300
    if sys.argv[1] == "train":
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        model.nats(ids[:, :-1], ids[:, 1:], torch.zeros(1, dtype=torch.int32)).backward()
    else:
        model.fuse_attention(False)
        evaluate.evaluate(model, tokens, T, place)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is told in other ways")
@pytest.mark.parametrize(("what", "shape"), [("train", {"arch": "modern"}), ("train", {"arch": "modern", "window": 300}), ("evaluate", {"arch": "classic"})])
def test_memory_grows_no_faster_than_the_context(what, shape):
    words = [sys.executable, "-c", PEAKS, what, repr(shape)]
    near, middle, far = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert far - middle < 3 * max(middle - near, 30_000)  # KiB; in proportion it is 2 times, by the square 4
    assert far < 500_000  # a number for each pair of tokens would be 1 GiB in each head


WITHOUT_COMPILER = """
import sys
import numpy as np
import nanogpt
from nanogpt import checkpoint, evaluate, machine, model
from nanogpt.config import MachineConfig, ModelConfig

model.QUERIES, model.SCORES = 4, 50  # an evaluation goes by blocks and in pieces, and a step does not
place = machine.choose(MachineConfig(device="cpu", dtype="float32", threads=1))
whole = checkpoint.empty_model(ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16), 11, "cpu")
whole.fuse_attention(False)
whole.checkpoint_activations(True)
evaluate.evaluate(whole, np.arange(40) % 11, 40, place)
model.QUERIES, model.SCORES = 1024, 2**25
nanogpt.train(sys.argv[1], **eval(sys.argv[2]))
print("torch._dynamo" in sys.modules)
"""


def test_neither_an_evaluation_nor_a_plain_step_imports_the_compiler(story):
    words = [sys.executable, "-c", WITHOUT_COMPILER, str(story), repr(TINY | {"steps": 2, "device": "cpu"})]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "False\n"
