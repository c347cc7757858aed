"""The compiled decoder is the reference up to rounding, whatever the shape; and what else is in the batch changes no bit of a text."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import checkpoint, generate
from nanogpt.config import ModelConfig, SamplingConfig
from nanogpt.generate.decoder import TorchDecoder
from nanogpt.generate.quantize import dequantized, head_matrix, rounded
from nanogpt.tokenizer import train_tokenizer

pytest.importorskip("numba")
from nanogpt.generate import fast, kernels, vectors
from nanogpt.generate.fast import FastDecoder


def random_model(config, vocab_size, seed):
    model = checkpoint.empty_model(config, vocab_size, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


@st.composite
def models(draw):
    """Models of both architectures; widths on both sides of those of vectors, panels and tiles."""
    arch, kv_heads, groups = draw(st.sampled_from(["classic", "modern"])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    context = draw(st.sampled_from([1, 2, 7, 64, 65, 150]))
    shape = {"arch": arch, "n_layer": draw(st.integers(1, 2)), "n_head": kv_heads * groups, "context_length": context, "dropout": 0.0}
    shape["n_embd"] = shape["n_head"] * draw(st.sampled_from([2, 6, 16, 64, 72]))
    if arch == "modern":
        shape |= {"n_kv_head": kv_heads, "window": draw(st.one_of(st.none(), st.integers(1, 2 * context))), "rope_base": draw(st.sampled_from([50.0, 1e4]))}
    return random_model(ModelConfig(**shape), draw(st.sampled_from([1, 11, 64, 130])), draw(st.integers(0, 99)))


def some_ids(model, n, seed=0):
    return np.random.default_rng(seed).integers(0, model.vocab_size, n).tolist()


def write(decoder, row, prompt, following):
    """The logits after a prompt and after each of the ids that follow."""
    return np.stack([decoder.prefill(row, prompt), *(decoder.decode([row], [token])[0] for token in following)])


@settings(max_examples=40)
@given(models(), st.data())
def test_float32_gives_the_logits_of_the_reference_up_to_rounding(place, model, data):
    context = model.config.context_length
    n = data.draw(st.integers(1, context))
    ids = some_ids(model, min(context, n + 3))
    fast, reference = FastDecoder(model, "float32", rows=2), TorchDecoder(model, place, rows=2)
    for row in (1, 0, 1):  # a row that is begun anew holds nothing of what was there
        expected = write(reference, row, ids[:n], ids[n:])
        np.testing.assert_allclose(write(fast, row, ids[:n], ids[n:]), expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@settings(max_examples=25)
@given(models(), st.sampled_from(["float32", "bfloat16", "int8"]), st.data())
def test_a_text_is_the_same_bit_for_bit_alone_and_among_others_read_at_once_and_token_by_token(model, precision, data):
    context, n_rows = model.config.context_length, data.draw(st.integers(1, 20))  # 1 to some tiles of rows
    texts = [some_ids(model, data.draw(st.integers(1, context)), seed) for seed in range(n_rows)]
    together = FastDecoder(model, precision, rows=n_rows)
    logits = [together.prefill(row, text[:1]) for row, text in enumerate(texts)]
    for at in range(1, context):
        rows = [row for row, text in enumerate(texts) if at < len(text)]
        for row, following in zip(rows, together.decode(rows, [texts[row][at] for row in rows]) if rows else [], strict=True):
            logits[row] = following
    alone = FastDecoder(model, precision)
    for text, expected in zip(texts, logits, strict=True):
        assert np.array_equal(alone.prefill(0, text), expected)


def test_a_prompt_of_many_blocks_is_read_like_a_short_one(place):
    model = random_model(ModelConfig(arch="modern", n_layer=2, n_head=2, n_embd=32, context_length=700, window=300), 11, 0)
    ids = some_ids(model, 700)
    expected = write(TorchDecoder(model, place), 0, ids[:690], ids[690:])
    np.testing.assert_allclose(write(FastDecoder(model, "float32"), 0, ids[:690], ids[690:]), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_rounded_weights_are_those_of_the_dequantized_model(place, arch, precision):
    model = random_model(ModelConfig(arch=arch, n_layer=2, n_head=3, n_embd=48, context_length=20, dropout=0.0), 70, 0)
    ids = some_ids(model, 20)
    expected = write(TorchDecoder(dequantized(model, precision), place), 0, ids[:9], ids[9:])
    found = write(FastDecoder(model, precision), 0, ids[:9], ids[9:])
    close = 1e-5 if precision == "bfloat16" else 1e-3  # a key that lies between two integers may be rounded to either
    np.testing.assert_allclose(found, expected, rtol=0, atol=close * np.abs(expected).max())
    unrounded = write(FastDecoder(model, "float32"), 0, ids[:9], ids[9:])
    assert np.abs(found - unrounded).max() > 2 * close * np.abs(expected).max()


def test_int8_is_off_by_half_a_step_at_most_and_a_row_of_zeros_stays():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-6, 0.0, 1e6, 1.0])[:, None]
    integers, scale = rounded(weight, "int8")
    assert integers.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]
    assert ((integers * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_the_dequantized_model_is_a_copy(make_model):
    model = make_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    other = dequantized(model, "int8")
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not torch.equal(head_matrix(other), head_matrix(model))


def test_several_threads_give_what_one_does(make_model):
    model = make_model(n_embd=384, arch="modern", context_length=20, scale=1.0)
    ids = some_ids(model, 20)
    one, two = (FastDecoder(model, "int8", threads=threads) for threads in (1, 2))
    assert two.threads == 1 or two._stage > fast.WORTH_SHARING  # so that they are used
    assert np.array_equal(write(one, 0, ids[:12], ids[12:]), write(two, 0, ids[:12], ids[12:]))


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("off", [1.0, 1.5])
def test_a_text_that_is_drafted_is_the_one_that_is_made_token_by_token(make_model, precision, off):
    """Across the edge of the context, with biases and without temperature; with `off`, drafts are drawn by another temperature, and so are often wrong."""
    letters = train_tokenizer("char", ["abcdefghi\n"])
    model, drafted, wrong = make_model(letters.vocab_size, context_length=24, scale=1.0), [], []

    class Off(FastDecoder):
        def draft(self, row, token, chances, temperature, added):
            drafted.append(len(chances))
            return super().draft(row, token, chances, temperature * off, added)

        def take_back(self, row, n):
            wrong.append(n)
            super().take_back(row, n)

    wanted = [
        generate.Request([1, 2], SamplingConfig(max_tokens=90, temperature=1.0), 5),
        generate.Request([3], SamplingConfig(max_tokens=41, temperature=0, logit_bias={4: 1.0}), 6),
        generate.Request([3], SamplingConfig(max_tokens=60, allowed=tuple(letters.encode("abc")), stop=("abc", "cba")), 7, n_top=2),
        generate.Request([3], SamplingConfig(max_tokens=30, top_k=3), 8),
    ]
    decoder = Off(model, precision)
    one_by_one = Off(model, precision)
    one_by_one.ahead = 1
    for request in wanted:
        texts = []
        for each in (decoder, one_by_one):
            engine = generate.Engine(each, letters)
            engine.add(request)
            texts.append([(p.token, p.text, p.logprob, p.top, p.finish) for pieces in iter(engine.step, []) for p in pieces])
        assert texts[0] == texts[1]
    assert max(drafted) > 5
    assert len(wrong) > len(wanted) if off != 1.0 else len(wrong) <= len(wanted)  # else only where a text ends


def test_misuse_is_noticed(make_model):
    decoder = FastDecoder(make_model(), "float32")
    decoder.prefill(0, [1] * 8)
    with pytest.raises(AssertionError, match="more tokens"):
        decoder.decode([0], [1])
    with pytest.raises(AssertionError, match="no token"):
        decoder.prefill(0, [11])


@pytest.mark.parametrize("K", [1, 384, 5001, 100_000])
def test_integers_are_as_large_as_a_sum_of_products_allows(K):
    for x in (np.ones(K, np.float32), np.random.default_rng(K).standard_normal(K, np.float32), np.zeros(K, np.float32)):
        numbers = np.zeros(K, np.int16)
        scale = vectors.settle(x, numbers)
        assert np.abs(numbers.astype(np.int64)).sum() * 127 < 2**31
        assert np.abs(numbers * np.float64(scale) - x).max() <= 0.501 * scale
        assert np.abs(numbers).max() > 100 or not x.any()


def test_products_of_integers_are_exact_at_their_largest():
    K = 4096
    numbers, weights = np.zeros((9, K), np.int16), np.full((64, K), -127, np.int8)
    for row in numbers:
        vectors.settle(np.ones(K, np.float32), row)
    panel = fast.panels(torch.from_numpy(weights), torch.ones(64), None)[0][0].contiguous().numpy()
    found = np.zeros((9, 64), np.float32)
    kernels.product(panel, numbers, found, 0)  # a tile of rows, and one row
    np.testing.assert_array_equal(found, (numbers.astype(np.int64) @ weights.T.astype(np.int64)).astype(np.float32))


def test_exp_is_good_to_the_last_digits():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert max(abs(vectors.exp(a) / b - 1) for a, b in zip(x, exact, strict=True)) < 3e-7
    assert vectors.exp(np.float32(-1e30)) < 2e-38


ELSEWHERE = """
import torch
from nanogpt import checkpoint
from nanogpt.config import ModelConfig
from nanogpt.generate.fast import FastDecoder
from nanogpt.generate.kernels import numba, read
model = checkpoint.empty_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, context_length=4), 5, "cpu")
for parameter in model.parameters():
    torch.nn.init.ones_(parameter)
FastDecoder(model, "int8").prefill(0, [1, 2])
print(sum(read.stats.cache_hits.values()), numba.config.CACHE_DIR)
"""


def output_of(code, **environment):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ | environment).stdout


def test_what_was_compiled_is_found_again_by_the_next_process(tmp_path):
    first, second = (output_of(ELSEWHERE, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
    assert (first.strip(), second.strip()) == ("0", "1")  # and other users of Numba keep their own cache
    assert any(Path(tmp_path).rglob("nanogpt/numba-*/**/*.nbc"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_where_nothing_can_be_kept_it_compiles_all_the_same(tmp_path):
    tmp_path.chmod(0o500)
    assert output_of(ELSEWHERE, XDG_CACHE_HOME=str(tmp_path)).strip() == "0"
