"""Tests of the compiled decoder: equal to the reference, whatever the batch and the threads."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import checkpoint
from nanogpt.config import ModelConfig, SamplingConfig
from nanogpt.generate.quantize import fake_quantize, quantize
from nanogpt.generate.torch_decoder import TorchDecoder
from nanogpt.tokenizer.tokenizer import train_tokenizer

pytest.importorskip("numba")
from nanogpt.generate.engine import Engine
from nanogpt.generate.numba_kernels import kernels, rowwise
from nanogpt.generate.numba_kernels.decoder import MIN_PARALLEL_MACS, NumbaDecoder, pack_panels
from nanogpt.generate.sequence import Request


def random_model(config, vocab_size, seed):
    model = checkpoint.build_uninitialized(config, vocab_size, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name or "ln_" in name else 0.0
            parameter.normal_(mean, parameter.shape[-1] ** -0.5, generator=generator)
    return model


@st.composite
def models(draw):
    """Draw models of both architectures, narrower and wider than vectors, panels and tiles."""
    arch = draw(st.sampled_from(["gpt2", "qwen3"]))
    kv_heads = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    context = draw(st.sampled_from([1, 2, 7, 64, 65, 150]))
    shape = {
        "arch": arch,
        "n_layer": draw(st.integers(1, 2)),
        "n_head": kv_heads * groups,
        "context_length": context,
        "dropout": 0.0,
    }
    shape["n_embd"] = shape["n_head"] * draw(st.sampled_from([2, 6, 16, 64, 72]))
    if arch == "qwen3":
        shape |= {
            "n_kv_head": kv_heads,
            "sliding_window": draw(st.one_of(st.none(), st.integers(1, 2 * context))),
            "rope_theta": draw(st.sampled_from([50.0, 1e4])),
        }
    vocab_size = draw(st.sampled_from([1, 11, 64, 130]))
    return random_model(ModelConfig(**shape), vocab_size, draw(st.integers(0, 99)))


def random_ids(model, n, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def all_logits(decoder, slot, prompt, following):
    """Return the logits after a prompt and after each of the ids that follow."""
    logits = [decoder.prefill(slot, prompt)]
    logits += [decoder.decode([slot], [token])[0] for token in following]
    return np.stack(logits)


@settings(max_examples=40)
@given(models(), st.data())
def test_float32_logits_equal_the_reference_up_to_rounding(machine, model, data):
    context = model.config.context_length
    n = data.draw(st.integers(1, context))
    ids = random_ids(model, min(context, n + 3))
    decoder = NumbaDecoder(model, "float32", num_slots=2)
    reference = TorchDecoder(model, machine, num_slots=2)
    for slot in (1, 0, 1):  # a slot that is prefilled again holds nothing of its old content
        expected = all_logits(reference, slot, ids[:n], ids[n:])
        found = all_logits(decoder, slot, ids[:n], ids[n:])
        atol = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@settings(max_examples=25)
@given(models(), st.sampled_from(["float32", "bfloat16", "int8"]), st.data())
def test_logits_do_not_depend_on_the_batch_bit_for_bit(model, precision, data):
    """Compare sequences decoded together token by token with each prefilled alone."""
    context = model.config.context_length
    num_slots = data.draw(st.integers(1, 20))  # up to several tiles of rows
    lengths = [data.draw(st.integers(1, context)) for _ in range(num_slots)]
    sequences = [random_ids(model, length, seed) for seed, length in enumerate(lengths)]
    batched = NumbaDecoder(model, precision, num_slots=num_slots)
    logits = [batched.prefill(slot, ids[:1]) for slot, ids in enumerate(sequences)]
    for i in range(1, max(lengths)):
        slots = [slot for slot, ids in enumerate(sequences) if i < len(ids)]
        decoded = batched.decode(slots, [sequences[slot][i] for slot in slots])
        for slot, row in zip(slots, decoded, strict=True):
            logits[slot] = row
    alone = NumbaDecoder(model, precision)
    for ids, expected in zip(sequences, logits, strict=True):
        assert np.array_equal(alone.prefill(0, ids), expected)


def test_prefill_of_several_chunks_equals_the_reference(machine):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 700, "sliding_window": 300}
    model = random_model(ModelConfig(arch="qwen3", **shape), 11, 0)
    ids = random_ids(model, 700)
    expected = all_logits(TorchDecoder(model, machine), 0, ids[:690], ids[690:])
    found = all_logits(NumbaDecoder(model, "float32"), 0, ids[:690], ids[690:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_quantized_logits_equal_the_fake_quantized_model(machine, arch, precision):
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 48, "context_length": 20, "dropout": 0.0}
    model = random_model(ModelConfig(arch=arch, **shape), 70, 0)
    ids = random_ids(model, 20)
    reference = TorchDecoder(fake_quantize(model, precision), machine)
    expected = all_logits(reference, 0, ids[:9], ids[9:])
    found = all_logits(NumbaDecoder(model, precision), 0, ids[:9], ids[9:])
    # A key halfway between two integers may be rounded to either.
    tolerance = 1e-5 if precision == "bfloat16" else 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    exact = all_logits(NumbaDecoder(model, "float32"), 0, ids[:9], ids[9:])
    assert np.abs(found - exact).max() > 2 * tolerance * np.abs(expected).max()


def test_quantize_int8_is_off_by_half_a_step_at_most_and_keeps_zeros():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([1.0, 1e-6, 0.0, 1e6, 1.0])[:, None]
    q_weight, scale = quantize(weight, "int8")
    assert q_weight.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]
    assert ((q_weight * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_fake_quantize_returns_a_copy(make_model):
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantized = fake_quantize(model, "int8")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not torch.equal(quantized.head_weight(), model.head_weight())


def test_logits_do_not_depend_on_the_number_of_threads(make_model):
    model = make_model(n_embd=384, arch="qwen3", context_length=20, scale=1.0)
    ids = random_ids(model, 20)
    one, two = (NumbaDecoder(model, "int8", threads=threads) for threads in (1, 2))
    assert two.threads == 1 or two.macs_per_stage > MIN_PARALLEL_MACS  # both threads are used
    expected = all_logits(one, 0, ids[:12], ids[12:])
    assert np.array_equal(expected, all_logits(two, 0, ids[:12], ids[12:]))


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("temperature_factor", [1.0, 1.5])
def test_multi_step_decoding_equals_token_by_token(make_model, precision, temperature_factor):
    """Compare across the edge of the context, with biases, and greedily.

    With another temperature in the decoder than in the engine, it often has to roll back.
    """
    tokenizer = train_tokenizer("char", ["abcdefghi\n"])
    model = make_model(tokenizer.vocab_size, context_length=24, scale=1.0)
    num_steps, rollbacks = [], []

    class RecordingDecoder(NumbaDecoder):
        def decode_steps(self, slot, token, uniforms, temperature, logit_bias):
            num_steps.append(len(uniforms))
            temperature *= temperature_factor
            return super().decode_steps(slot, token, uniforms, temperature, logit_bias)

        def rollback(self, slot, n):
            rollbacks.append(n)
            super().rollback(slot, n)

    allowed = tuple(tokenizer.encode("abc"))
    stopping = SamplingConfig(max_tokens=60, allowed_token_ids=allowed, stop=("abc", "cba"))
    greedy = SamplingConfig(max_tokens=41, temperature=0, logit_bias={4: 1.0})
    requests = [
        Request([1, 2], SamplingConfig(max_tokens=90, temperature=1.0), 5),
        Request([3], greedy, 6),
        Request([3], stopping, 7, num_logprobs=2),
        Request([3], SamplingConfig(max_tokens=30, top_k=3), 8),
    ]
    multi_step, single_step = (RecordingDecoder(model, precision) for _ in range(2))
    single_step.max_steps = 1
    for request in requests:
        results = []
        for decoder in (multi_step, single_step):
            engine = Engine(decoder, tokenizer)
            engine.add(request)
            steps = [step for outputs in iter(engine.step, []) for step in outputs]
            results.append(
                [
                    (step.token_id, step.text, step.logprob, step.top_logprobs, step.finish_reason)
                    for step in steps
                ]
            )
        assert results[0] == results[1]
    assert max(num_steps) > 5
    if temperature_factor == 1.0:
        assert len(rollbacks) <= len(requests)  # only where a sequence ends
    else:
        assert len(rollbacks) > len(requests)


def test_decoder_asserts_against_misuse(make_model):
    decoder = NumbaDecoder(make_model(), "float32")
    decoder.prefill(0, [1] * 8)
    with pytest.raises(AssertionError, match="more tokens"):
        decoder.decode([0], [1])
    with pytest.raises(AssertionError, match="no token"):
        decoder.prefill(0, [11])


@pytest.mark.parametrize("K", [1, 384, 5001, 100_000])
def test_quantize_int16_uses_the_range_that_a_dot_product_allows(K):
    for x in (
        np.ones(K, np.float32),
        np.random.default_rng(K).standard_normal(K, np.float32),
        np.zeros(K, np.float32),
    ):
        values = np.zeros(K, np.int16)
        scale = rowwise.quantize_int16(x, values)
        assert np.abs(values.astype(np.int64)).sum() * 127 < 2**31
        assert np.abs(values * np.float64(scale) - x).max() <= 0.501 * scale
        assert np.abs(values).max() > 100 or not x.any()


def test_matmul_of_integers_is_exact_at_their_limits():
    K = 4096
    values, weights = np.zeros((9, K), np.int16), np.full((64, K), -127, np.int8)
    for row in values:
        rowwise.quantize_int16(np.ones(K, np.float32), row)
    panels, _ = pack_panels(torch.from_numpy(weights), torch.ones(64), None)
    found = np.zeros((9, 64), np.float32)
    # 9 rows are one tile of 8 and a single row.
    kernels.matmul_panel(panels[0].contiguous().numpy(), values, found, 0)
    exact = values.astype(np.int64) @ weights.T.astype(np.int64)
    np.testing.assert_array_equal(found, exact.astype(np.float32))


def test_exp_is_accurate_to_the_last_digits():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert max(abs(rowwise.exp(a) / b - 1) for a, b in zip(x, exact, strict=True)) < 3e-7
    assert rowwise.exp(np.float32(-1e30)) < 2e-38


DECODE_AND_PRINT_CACHE_HITS = """
import torch
from nanogpt import checkpoint
from nanogpt.config import ModelConfig
from nanogpt.generate.numba_kernels.decoder import NumbaDecoder
from nanogpt.generate.numba_kernels.kernels import forward, numba
config = ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=4)
model = checkpoint.build_uninitialized(config, 5, "cpu")
for parameter in model.parameters():
    torch.nn.init.ones_(parameter)
NumbaDecoder(model, "int8").prefill(0, [1, 2])
print(sum(forward.stats.cache_hits.values()), numba.config.CACHE_DIR)
"""


def run_with_cache(folder):
    return subprocess.run(
        [sys.executable, "-c", DECODE_AND_PRINT_CACHE_HITS],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(folder)},
    ).stdout.strip()


def test_compiled_kernels_are_cached_for_the_next_process(tmp_path):
    # The printed CACHE_DIR is empty: other users of Numba keep their own cache.
    assert [run_with_cache(tmp_path) for _ in range(2)] == ["0", "1"]
    assert any(Path(tmp_path).rglob("nanogpt/numba-*/**/*.nbc"))


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere"
)
def test_kernels_compile_without_a_writable_cache(tmp_path):
    tmp_path.chmod(0o500)
    assert run_with_cache(tmp_path) == "0"
