"""Tests of sampling, decoders, the engine, streaming detokenization and prompts."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import gpt2_like, qwen3_like
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nanogpt.config import SamplingConfig
from nanogpt.errors import Notice, UserError
from nanogpt.generate import sampling
from nanogpt.generate.decoder import create_decoder
from nanogpt.generate.detokenizer import StreamingDetokenizer
from nanogpt.generate.engine import Engine
from nanogpt.generate.prompts import encode_prompt, unseen_spans
from nanogpt.generate.quantize import fake_quantize, make_linear, quantize
from nanogpt.generate.sequence import Request
from nanogpt.generate.torch_decoder import TorchDecoder, strip_modules
from nanogpt.tokenizer.tokenizer import train_tokenizer

# 8 characters, 256 bytes and the end-of-text token.
TOKENIZER = train_tokenizer("char", ["abcdefgh"])
V = TOKENIZER.vocab_size


def reference_probs(logits, settings, occurred=()):
    """Return sampling probabilities (V,), each filter as its paper has it, token by token."""
    x = np.array(logits, np.float64)
    for token in occurred:
        penalty = settings.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token, value in settings.logit_bias.items():
        x[token] += value
    if settings.allowed_token_ids is not None:
        x[[token for token in range(len(x)) if token not in settings.allowed_token_ids]] = -np.inf
    x /= settings.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    for token in order[settings.top_k or len(x) :]:
        x[token] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if settings.top_p < 1:
        cumulative = 0.0
        for token in order:
            is_outside = cumulative >= settings.top_p
            cumulative += p[token]
            if is_outside:
                p[token] = 0.0
        p /= p.sum()
    p[p < settings.min_p * p.max()] = 0.0
    return p / p.sum()


some_settings = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.sampled_from([1.0, 0.9, 0.53, 0.01]),
    min_p=st.sampled_from([0.0, 0.07, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 6), st.sampled_from([-1.5, 0.25, 3.0]), max_size=2),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 6), min_size=1).map(tuple),
)
# Quarters, so that ties occur.
some_rows = arrays.arrays(np.float32, (4, 7), elements=st.integers(-12, 12).map(lambda n: n / 4))


@given(
    some_rows,
    st.lists(some_settings, min_size=4, max_size=4),
    st.lists(st.sets(st.integers(0, 6)), min_size=4, max_size=4),
)
def test_sampler_processes_each_row_by_its_own_settings(logits, settings, occurred):
    seen = np.array([[token in row for token in range(7)] for row in occurred])
    found = sampling.softmax(sampling.Sampler(settings, 7).process_logits(logits, seen))
    for row, expected in enumerate(map(reference_probs, logits, settings, occurred)):
        if not np.array_equal(found[row] > 0, expected > 0):
            # Rounding decides about a token exactly at a limit: move the limits past it.
            s = settings[row]
            limits = {"top_p": min(1.0, s.top_p + 1e-6), "min_p": s.min_p * (1 - 1e-6)}
            nearby = SamplingConfig(**s.model_dump() | limits)
            expected = reference_probs(logits[row], nearby, occurred[row])
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_top_k_and_top_p_keep_the_first_of_equal_logits():
    logits = np.array([[2, 1, 1, 1, -1], [0, 0, 0, 0, 0]], np.float32)
    assert np.isfinite(sampling.top_k(logits, np.array([2, 5]))).tolist() == [
        [True, True, False, False, False],
        [True] * 5,
    ]
    assert np.isfinite(sampling.top_p(logits, np.array([1e-9, 0.41]))).tolist() == [
        [True, False, False, False, False],
        [True, True, True, False, False],
    ]


@given(
    arrays.arrays(np.float32, (3, 9), elements=st.floats(-9, 9, width=32)),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3),
)
def test_sample_from_logits_inverts_the_cdf(logits, uniforms):
    cdf = sampling.softmax(logits.astype(np.float64)).cumsum(axis=1)
    for row, token in enumerate(sampling.sample_from_logits(logits, np.array(uniforms))):
        assert (cdf[row, token - 1] if token else 0.0) <= uniforms[row] + 1e-6
        assert uniforms[row] <= cdf[row, token] + 1e-6


def test_sample_from_logits_never_returns_impossible_tokens_at_the_ends():
    logits = np.array([[-np.inf, 0, -np.inf, 1, -np.inf]], np.float32)
    assert sampling.sample_from_logits(logits, np.array([0.0])) == [1]
    assert sampling.sample_from_logits(logits, np.array([1 - 2.0**-53])) == [3]


def test_uniform_hash_is_uniform_and_independent_of_order_and_other_seeds():
    seeds = (0, 1, 2, 2**63 - 1)
    u = np.array([sampling.uniform_hash(seed, np.arange(1000)) for seed in seeds])
    assert ((u >= 0) & (u < 1)).all()
    np.testing.assert_allclose(np.sort(u.flatten()), np.linspace(0, 1, u.size), atol=0.03)
    assert (abs(np.corrcoef(u) - np.eye(4)) < 0.1).all()
    assert abs(np.corrcoef(u[:, 1:].flatten(), u[:, :-1].flatten())[0, 1]) < 0.05
    assert sampling.uniform_hash(1, np.array([700, 3])).tolist() == u[1, [700, 3]].tolist()


def test_zero_temperature_is_greedy():
    logits = np.array([[0, 3, 1], [5, 0, 0]], np.float32)
    settings = [SamplingConfig(temperature=0), SamplingConfig(temperature=1e-9, top_p=0.2)]
    assert sampling.Sampler(settings, 3)(logits, [0.999, 0.999]).tolist() == [1, 0]


def make_engine(model, machine, num_slots=1, unseen_tokens=(), **options):
    return Engine(TorchDecoder(model, machine, num_slots, **options), TOKENIZER, unseen_tokens)


def drain(engine, sequences):
    """Run the engine to its end; return the outputs of each sequence."""
    outputs = {sequence: [] for sequence in sequences}
    while engine.has_work:
        for output in engine.step():
            outputs[output.sequence].append(output)
    return [outputs[sequence] for sequence in sequences]


def generate_alone(model, machine, request, **options):
    engine = make_engine(model, machine, **options)
    return drain(engine, [engine.add(request)])[0]


def token_ids(outputs):
    return [output.token_id for output in outputs]


def generate_uncached(model, request):
    """Return the tokens of a request, with a forward pass over the whole window for each."""
    ids, start, context = list(request.prompt), 0, model.config.context_length
    sampler = sampling.Sampler([request.settings], model.vocab_size)
    for i in range(request.settings.max_tokens):
        if len(ids) - start > context:
            start = len(ids) - max(1, context // 2)
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start:]]))[:, -1].numpy()
        ids.append(int(sampler(logits, sampling.uniform_hash(request.seed, np.array([i])))[0]))
    return ids[len(request.prompt) :]


# Without the end-of-text token, sequences reach their full length.
NO_EOT = [(TOKENIZER.eot_id, TOKENIZER.eot_id + 1)]


@pytest.fixture
def model_of(make_model):
    return lambda **settings: make_model(**{"vocab_size": V, **settings})


@pytest.mark.parametrize(
    "shape",
    [{}, {"arch": "qwen3"}, {"arch": "qwen3", "n_head": 4, "n_kv_head": 2, "sliding_window": 3}],
)
@pytest.mark.parametrize("context_length", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(10)) * 2])
def test_cached_decoding_equals_uncached_past_the_window(
    model_of, machine, context_length, prompt, shape
):
    model = model_of(context_length=context_length, **shape)
    allowed = tuple(range(50))
    settings = SamplingConfig(max_tokens=40, temperature=1.0, allowed_token_ids=allowed)
    request = Request(prompt, settings, seed=3)
    found = token_ids(generate_alone(model, machine, request))
    assert found == generate_uncached(model, request)


REQUESTS = [
    Request(prompt, SamplingConfig(max_tokens=count, temperature=temperature, **more), seed)
    for seed, (prompt, count, temperature, more) in enumerate(
        [
            ([1], 30, 1.0, {}),
            ([2, 3, 4], 11, 0.7, {"top_k": 5}),
            (list(range(9)), 5, 1.3, {"top_p": 0.8}),
            ([1], 30, 1.0, {"min_p": 0.1}),
            ([7] * 5, 1, 0.0, {}),
            ([1, 2], 19, 0.0, {"repetition_penalty": 1.5}),
            ([5, 6], 0, 1.0, {}),
            ([8], 23, 1.0, {"logit_bias": {4: 2.0}}),
        ]
    )
]


@pytest.mark.parametrize("shape", [{}, {"arch": "qwen3", "n_head": 4, "n_kv_head": 2}])
@pytest.mark.parametrize("num_slots", [1, 3, 8])
@pytest.mark.parametrize("deterministic", [True, False])
def test_engine_results_do_not_depend_on_the_batch(
    model_of, machine, num_slots, deterministic, shape
):
    model = model_of(**shape)
    expected = [
        generate_alone(model, machine, request, unseen_tokens=NO_EOT) for request in REQUESTS
    ]
    engine = make_engine(model, machine, num_slots, NO_EOT, deterministic=deterministic)
    sequences = [engine.add(request) for request in REQUESTS[:3]]
    outputs = {}
    for step in range(150):
        if step in (2, 3, 9, 20, 21):
            sequences.append(engine.add(REQUESTS[len(sequences)]))
        for output in engine.step():
            outputs.setdefault(output.sequence, []).append(output)
    assert not engine.has_work
    for sequence, alone in zip(sequences, expected, strict=True):
        assert token_ids(outputs[sequence]) == token_ids(alone)
        found = [output.logprob for output in outputs[sequence]]
        logprobs = [output.logprob for output in alone]
        assert found == logprobs if deterministic else found == pytest.approx(logprobs, abs=1e-4)


def test_engine_results_of_a_shared_prompt_equal_those_alone(model_of, machine):
    model = model_of()
    requests = [Request([1, 2, 3], SamplingConfig(max_tokens=12), seed) for seed in range(4)]
    engine = make_engine(model, machine, num_slots=3, unseen_tokens=NO_EOT)
    found = drain(engine, [engine.add(request) for request in requests])
    assert [token_ids(outputs) for outputs in found] == [
        token_ids(generate_alone(model, machine, request, unseen_tokens=NO_EOT))
        for request in requests
    ]


def test_torch_decoder_keeps_the_slots_between_those_decoded(model_of, machine):
    model = model_of()
    decoder, reference = (TorchDecoder(model, machine, 4) for _ in range(2))
    for each in (decoder, reference):
        for slot, ids in enumerate(([1, 2], [3], [4, 5, 6], [7] * 8)):
            each.prefill(slot, ids)
    for _ in range(3):
        decoder.decode([0, 2], [9, 9])
    np.testing.assert_allclose(decoder.decode([1], [5]), reference.decode([1], [5]), atol=1e-5)
    with pytest.raises(AssertionError, match="context"):
        decoder.decode([3], [1])


@pytest.mark.parametrize("shape", [{}, {"arch": "qwen3"}])
def test_strip_modules_gives_equal_logits_and_leaves_the_model_alone(model_of, shape):
    model = model_of(**shape)
    stripped, idx = strip_modules(model), torch.tensor([[1, 2, 3]])
    assert torch.equal(stripped(idx), model(idx))
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight.mul_(2)  # shared by both
    assert torch.equal(stripped(idx), model(idx))
    assert isinstance(model.blocks[0].ln_1, torch.nn.Module)


@pytest.mark.parametrize("shape", [{}, {"arch": "qwen3"}])
def test_strip_modules_in_bfloat16_equals_autocast(model_of, shape):
    model, idx = model_of(**shape), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = model(idx)
            assert torch.equal(strip_modules(model, "bfloat16")(idx), autocast)
        assert not torch.equal(exact, autocast.float())


@pytest.mark.parametrize("width", [16, 48, 1, 10, 170])
@pytest.mark.parametrize("has_bias", [True, False])
def test_int8_linear_multiplies_by_the_quantized_weights_row_by_row(width, has_bias):
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(37, width, generator=generator)
    x = torch.randn(2, 3, width, generator=generator).bfloat16().float()
    bias = torch.randn(37, generator=generator) if has_bias else None
    linear = make_linear(weight, bias, "int8")
    q_weight, scale = quantize(weight, "int8")
    exact = torch.nn.functional.linear(x, q_weight * scale[:, None], bias)
    assert linear(x).dtype == torch.float32
    assert (linear(x) - exact).abs().max() < 0.005 * exact.abs().max()
    assert torch.equal(linear(x)[1:, 2:], linear(x[1:, 2:]))


@pytest.mark.parametrize("shape", [{}, {"arch": "qwen3"}])
def test_create_decoder_without_numba_uses_int8_weights(model_of, machine, monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "numba", None)
    model, ids = model_of(**shape), [1, 2, 3]
    exact, found = (
        create_decoder(model, machine, dtype).prefill(0, ids) for dtype in ("float32", "auto")
    )
    quantized = fake_quantize(model, "int8")
    expected = quantized(torch.tensor([ids]))[0, -1].detach().numpy()
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    assert not np.array_equal(found, exact)
    stripped = TorchDecoder(strip_modules(model, "int8"), machine).prefill(0, ids)
    assert np.array_equal(found, stripped)
    # A model loaded with dtype int8 is quantized twice.
    twice = create_decoder(quantized, machine, "int8").prefill(0, ids)
    np.testing.assert_allclose(twice, stripped, rtol=0, atol=0.01 * np.abs(stripped).max())


def test_torch_decoder_repeats_an_interrupted_prefill(model_of, machine, monkeypatch):
    model = model_of()
    decoder = TorchDecoder(model, machine, num_slots=1)
    first = decoder.prefill(0, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(model, "last_token_logits", lambda idx, cache: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.prefill(0, [4, 5, 6])
    decoder.cache.k.zero_()
    assert np.array_equal(decoder.prefill(0, [1, 2, 3]), first)
    assert decoder.cache.k.any()


def test_logprobs_are_those_of_the_model_without_unseen_tokens(model_of, machine):
    model = model_of(scale=1.0)
    unseen = [*NO_EOT, (0, 3)]
    settings = SamplingConfig(max_tokens=6, temperature=0.3, top_k=2, repetition_penalty=2.0)
    request = Request([5, 6], settings, seed=0, num_logprobs=4)
    outputs = generate_alone(model, machine, request, unseen_tokens=unseen)
    ids = [5, 6, *token_ids(outputs)]
    logits = model(torch.tensor([ids]))[0].detach()
    logits[:, [0, 1, 2, TOKENIZER.eot_id]] = -torch.inf
    expected = logits.log_softmax(dim=1)
    for i, output in enumerate(outputs, start=1):
        assert output.logprob == pytest.approx(float(expected[i, ids[i + 1]]), abs=1e-5)
        values, tokens = expected[i].topk(4)
        assert [token for token, _ in output.top_logprobs] == tokens.tolist()
        found = [value for _, value in output.top_logprobs]
        assert found == pytest.approx(values.tolist(), abs=1e-5)


def test_top_logprobs_leave_out_unseen_tokens(model_of, machine):
    request = Request([5], SamplingConfig(max_tokens=1), 0, num_logprobs=9)
    output, *_ = generate_alone(model_of(), machine, request, unseen_tokens=[(0, V - 2)])
    assert {token for token, _ in output.top_logprobs} == {V - 2, V - 1}


def test_engine_samples_tokens_with_their_probabilities(model_of, machine):
    model = model_of(scale=1.0)
    engine = make_engine(model, machine, num_slots=50, unseen_tokens=[(0, V - 8)])
    settings = SamplingConfig(max_tokens=1, temperature=0.5)
    outputs = drain(engine, [engine.add(Request([3], settings, seed)) for seed in range(3000)])
    counts = Counter(first.token_id for first, *_ in outputs)
    expected = (model(torch.tensor([[3]]))[0, 0, V - 8 :] / 0.5).softmax(dim=0).tolist()
    frequencies = [counts[token] / 3000 for token in range(V - 8, V)]
    assert frequencies == pytest.approx(expected, abs=0.03)


def test_engine_repeats_tokens_only_with_the_same_seed(model_of, machine):
    model = model_of(scale=1.0)
    first, repeated, other = (
        token_ids(generate_alone(model, machine, Request([1], SamplingConfig(max_tokens=30), seed)))
        for seed in (7, 7, 8)
    )
    assert first == repeated != other


def test_engine_never_samples_unseen_tokens(model_of, machine):
    request = Request([1], SamplingConfig(max_tokens=200, temperature=9.0), 0)
    unseen = [(0, 4), (5, V - 1)]
    outputs = generate_alone(model_of(scale=0.1), machine, request, unseen_tokens=unseen)
    assert set(token_ids(outputs)) == {4, V - 1}


def test_engine_samples_only_allowed_tokens_and_rejects_wrong_ones(model_of, machine):
    model = model_of(scale=0.1)
    settings = SamplingConfig(max_tokens=100, temperature=9.0, allowed_token_ids=(3, 7, 9))
    outputs = generate_alone(model, machine, Request([1], settings, 0), unseen_tokens=[(9, 10)])
    assert set(token_ids(outputs)) == {3, 7}
    engine = make_engine(model, machine, unseen_tokens=[(9, 12)])
    with pytest.raises(UserError, match="None of the 2 allowed"):
        engine.add(Request([1], SamplingConfig(allowed_token_ids=(9, 11)), 0))
    for wrong in ({"allowed_token_ids": (3, V)}, {"logit_bias": {-1: 2.0}}):
        with pytest.raises(UserError, match="Token id out of range"):
            engine.add(Request([1], SamplingConfig(**wrong), 0))
    with pytest.raises(UserError, match=f"Token id out of range: {V} "):
        engine.add(Request([1, V], SamplingConfig(), 0))
    assert not engine.has_work


def test_engine_evicts_cancelled_sequences_and_reuses_their_slots(model_of, machine):
    engine = make_engine(model_of(), machine, num_slots=2, unseen_tokens=NO_EOT)
    first, second, third, fourth = (
        engine.add(Request([1], SamplingConfig(max_tokens=5), seed)) for seed in range(4)
    )
    assert {output.sequence for output in engine.step()} == {first, second}
    first.cancel()
    fourth.cancel()
    outputs = engine.step()
    assert [(step.sequence, step.token_id, step.finish_reason) for step in outputs[:2]] == [
        (first, None, "cancelled"),
        (fourth, None, "cancelled"),
    ]
    assert {output.sequence for output in outputs[2:]} == {second, third}
    assert (third.slot, third.num_generated, second.num_generated) == (0, 1, 2)
    rest = drain(engine, [second, third])
    assert [outputs[-1].finish_reason for outputs in rest] == ["length", "length"]


def test_engine_reports_finish_reasons(model_of, machine):
    model = model_of(scale=0.1)
    engine = make_engine(model, machine, num_slots=4)
    overrides = [
        {"max_tokens": 0},
        {"max_tokens": 3},
        {"stop": ("a", "b"), "max_tokens": 99},
        {"allowed_token_ids": (TOKENIZER.eot_id,)},
    ]
    defaults = {"allowed_token_ids": tuple(TOKENIZER.encode("abc"))}
    settings = [SamplingConfig(**defaults | override) for override in overrides]
    outputs = drain(engine, [engine.add(Request([1], each, 5)) for each in settings])
    reasons = [steps[-1].finish_reason for steps in outputs]
    assert reasons == ["length", "length", "stop", "stop"]
    lengths = [(len(steps), steps[-1].token_id is None) for steps in outputs[:2]]
    assert lengths == [(1, True), (3, False)]
    assert token_ids(outputs[3]) == [TOKENIZER.eot_id]
    assert set("".join(step.text for step in outputs[2])) <= {"c"}
    assert "".join(step.text for step in outputs[3]) == ""


def test_engine_flushes_pending_text_at_the_last_token(model_of, machine):
    a = TOKENIZER.encode("a")
    settings = SamplingConfig(max_tokens=4, allowed_token_ids=tuple(a), stop=("aaaaaa",))
    outputs = generate_alone(model_of(), machine, Request(a, settings, 0))
    assert [(step.text, step.finish_reason) for step in outputs] == [
        *[("", None)] * 3,
        ("aaaa", "length"),
    ]


def test_engine_leaves_the_global_generator_alone(model_of, machine):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_alone(model_of(), machine, Request([1], SamplingConfig(max_tokens=5), 0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("shape", "peer"),
    [({}, gpt2_like), ({"arch": "qwen3", "n_head": 4, "n_kv_head": 2}, qwen3_like)],
)
def test_greedy_decoding_equals_transformers(model_of, machine, shape, peer):
    model = model_of(context_length=32, **shape)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    expected = peer(model).generate(
        prompt,
        max_new_tokens=27,
        do_sample=False,
        attention_mask=torch.ones_like(prompt),
        eos_token_id=V,
        pad_token_id=V,
    )
    request = Request(prompt[0].tolist(), SamplingConfig(max_tokens=27, temperature=0), 0)
    found = token_ids(generate_alone(model, machine, request))
    assert found == expected[0, 5:].tolist()[: len(found)]


CHARS = train_tokenizer("char", ["abcde \n"])


def detokenize(tokenizer, ids, stop=()):
    """Return the chunks of text that are not empty."""
    detokenizer, chunks = StreamingDetokenizer(tokenizer, stop), []
    for token in ids:
        chunks.append(detokenizer.add(token))
        if detokenizer.finished:
            break
    else:
        chunks.append(detokenizer.flush())
    return [chunk for chunk in chunks if chunk]


def stream(text, stop=()):
    return detokenize(CHARS, CHARS.encode(text), stop)


def test_detokenizer_never_splits_a_character():
    assert stream("a🙂日b") == ["a", "🙂", "日", "b"]
    assert detokenize(CHARS, CHARS.encode("a🙂")[:-1]) == ["a", "\ufffd"]


def test_detokenizer_ends_at_the_end_of_text_token():
    ids = [*CHARS.encode("ab"), CHARS.eot_id, *CHARS.encode("cd")]
    assert "".join(detokenize(CHARS, ids)) == "ab"


def test_detokenizer_holds_back_and_drops_stop_strings_across_tokens():
    assert stream("abcde", ["cd"]) == ["a", "b"]
    assert "".join(stream("abcabd", ["abd", "zz"])) == "abc"
    assert "".join(stream("ababc", ["abc"])) == "ab"
    assert "".join(stream("abc", ["cd"])) == "abc"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_detokenizer_ends_at_the_first_completed_stop_string(text, stop):
    completed = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
    read = text[:completed]
    end = min((read.find(s) for s in stop if s in read), default=len(read))
    assert "".join(stream(text, stop)) == read[:end]


SUBWORDS = [
    train_tokenizer(kind, ["abcab cab bca abc 🙂日 " * 9]) for kind in ("byte", "word", "bpe")
]
any_tokenizer = st.sampled_from([CHARS, *SUBWORDS])


@given(
    any_tokenizer,
    st.text("abc🙂日é ", max_size=30),
    st.lists(st.text("abc🙂日 ", min_size=1, max_size=4), max_size=3),
)
def test_detokenizer_stop_strings_do_not_depend_on_the_tokenizer(tokenizer, text, stop):
    found = detokenize(tokenizer, tokenizer.encode(text), stop)
    assert "".join(found) == "".join(stream(text, stop))


@given(any_tokenizer, st.text("abc🙂日é "))
def test_detokenizer_chunks_are_whole_characters_for_every_tokenizer(tokenizer, text):
    chunks = detokenize(tokenizer, tokenizer.encode(text))
    assert "".join(chunks) == text
    assert "\ufffd" not in "".join(chunks)
    assert all(chunks)


def ranges(tokens):
    return [(token, token + 1) for token in tokens]


@pytest.mark.parametrize("tokenizer", SUBWORDS, ids=["byte", "word", "bpe"])
def test_encode_prompt_knows_characters_whose_bytes_occurred(tokenizer):
    single_bytes = {i for i, spelled in enumerate(tokenizer.token_bytes) if len(spelled) == 1}
    seen = set(tokenizer.encode("abc 日本é")) | single_bytes
    unseen = ranges(set(range(tokenizer.vocab_size)) - seen)
    assert tokenizer.decode(encode_prompt(tokenizer, "abc 日 漢", unseen, 100)) == "abc 日 漢"


@given(st.sampled_from(SUBWORDS), st.text("abc 🙂日éñ"), st.randoms())
def test_unseen_spans_are_the_whole_characters_of_unseen_tokens(tokenizer, text, rng):
    ids = tokenizer.encode(text)
    unseen = {token for token in ids if rng.random() < 0.3}
    byte_is_unseen = [token in unseen for token in ids for _ in tokenizer.token_bytes[token]]
    offsets = [len(text[:i].encode()) for i in range(len(text) + 1)]
    expected = {
        i: text[i] for i in range(len(text)) if any(byte_is_unseen[offsets[i] : offsets[i + 1]])
    }
    spans = unseen_spans(tokenizer, text, ids, ranges(unseen))
    assert {start + i: char for start, span in spans for i, char in enumerate(span)} == expected
    assert all(start + len(span) not in expected for start, span in spans)


def test_encode_prompt_names_unseen_characters_and_can_refuse_them():
    tokenizer = SUBWORDS[0]
    unseen = ranges(set(range(tokenizer.vocab_size)) - set(b"abc "))
    with pytest.warns(Notice, match=r"had no '日' \(U\+65E5\) at position 4, 'ñq' at position 8\."):
        ids = encode_prompt(tokenizer, "abc 日bcañq", unseen, 100)
    assert tokenizer.decode(ids) == "abc 日bcañq"
    with pytest.raises(UserError, match="had no 'ñq' at position 0"):
        encode_prompt(tokenizer, "ñq", unseen, 100, error_on_unknown=True)


def test_encode_prompt_names_unknown_characters_and_can_refuse_them():
    with pytest.warns(Notice, match=r"'日' \(U\+65E5\) at position 1"):
        ids = encode_prompt(CHARS, "a日", [], 100)
    assert CHARS.decode(ids) == "a日"
    with pytest.raises(UserError, match=r"U\+65E5"):
        encode_prompt(CHARS, "a日", [], 100, error_on_unknown=True)


def test_encode_prompt_warns_of_a_prompt_beyond_the_context():
    with pytest.warns(Notice, match=r"20 tokens \(limit 10.*last 5"):
        encode_prompt(CHARS, "ab" * 10, [], 10)


def test_encode_prompt_without_a_prompt_starts_after_a_document_or_a_line():
    assert encode_prompt(CHARS, None, [], 10) == [CHARS.eot_id]
    unseen = [(CHARS.eot_id, CHARS.eot_id + 1)]
    assert CHARS.decode(encode_prompt(CHARS, None, unseen, 10)) == "\n"
    with pytest.warns(Notice, match="empty"):
        encode_prompt(CHARS, "", [], 10)
