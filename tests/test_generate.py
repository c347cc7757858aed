"""Sampling draws what it should, a cache and other texts change nothing, and a stream is whole characters that end where they should."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_model import gpt2_like, qwen3_like

from nanogpt import generate
from nanogpt.config import SamplingConfig
from nanogpt.errors import Notice, UserError
from nanogpt.generate import filters
from nanogpt.generate.quantize import product, rounded
from nanogpt.tokenizer import train_tokenizer

LETTERS = train_tokenizer("char", ["abcdefgh"])  # 8 letters, 256 bytes, the end of a document
V = LETTERS.vocab_size


def naive(logits, settings, occurred=()):
    """The probabilities (V,) that a token is drawn with, one step after the other as the papers have it."""
    x = np.array(logits, np.float64)
    for token in occurred:
        x[token] = x[token] / settings.repetition_penalty if x[token] > 0 else x[token] * settings.repetition_penalty
    for token, value in settings.logit_bias.items():
        x[token] += value
    if settings.allowed is not None:
        x[[token for token in range(len(x)) if token not in settings.allowed]] = -np.inf
    x /= settings.temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    for token in order[settings.top_k or len(x) :]:
        x[token] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if settings.top_p < 1:
        reached = 0.0
        for token in order:
            outside, reached = reached >= settings.top_p, reached + p[token]
            if outside:
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
    allowed=st.none() | st.lists(st.integers(0, 6), min_size=1).map(tuple),
)
some_rows = arrays.arrays(np.float32, (4, 7), elements=st.integers(-12, 12).map(lambda quarter: quarter / 4))  # with ties


@given(some_rows, st.lists(some_settings, min_size=4, max_size=4), st.lists(st.sets(st.integers(0, 6)), min_size=4, max_size=4))
def test_a_batch_is_filtered_as_each_row_by_its_own_settings(logits, settings, occurred):
    seen = np.array([[token in row for token in range(7)] for row in occurred])
    got = filters.softmax(filters.Sampler(settings, 7).filtered(logits, seen))
    for row, expected in enumerate(map(naive, logits, settings, occurred)):
        if not np.array_equal(got[row] > 0, expected > 0):  # a limit that rounding decides: what differs must lie on it
            near = SamplingConfig(**settings[row].model_dump() | {"top_p": min(1.0, settings[row].top_p + 1e-6), "min_p": settings[row].min_p * (1 - 1e-6)})
            expected = naive(logits[row], near, occurred[row])
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_of_equals_the_first_ones_stay():
    logits = np.array([[2, 1, 1, 1, -1], [0, 0, 0, 0, 0]], np.float32)
    assert np.isfinite(filters.top_k(logits, np.array([2, 5]))).tolist() == [[True, True, False, False, False], [True] * 5]
    assert np.isfinite(filters.top_p(logits, np.array([1e-9, 0.41]))).tolist() == [[True, False, False, False, False], [True, True, True, False, False]]


@given(arrays.arrays(np.float32, (3, 9), elements=st.floats(-9, 9, width=32)), st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3))
def test_a_chance_picks_the_token_on_whose_share_it_falls(logits, chances):
    reached = filters.softmax(logits.astype(np.float64)).cumsum(axis=1)
    for row, token in enumerate(filters.draw(logits, np.array(chances))):
        assert (reached[row, token - 1] if token else 0.0) <= chances[row] + 1e-6
        assert chances[row] <= reached[row, token] + 1e-6


def test_what_cannot_be_is_never_drawn_at_the_ends_of_chance():
    logits = np.array([[-np.inf, 0, -np.inf, 1, -np.inf]], np.float32)
    assert filters.draw(logits, np.array([0.0])) == [1]
    assert filters.draw(logits, np.array([1 - 2.0**-53])) == [3]


def test_chances_are_uniform_independent_of_order_and_of_their_own_seed():
    drawn = np.array([filters.uniforms(seed, np.arange(1000)) for seed in (0, 1, 2, 2**63 - 1)])
    assert ((drawn >= 0) & (drawn < 1)).all()
    np.testing.assert_allclose(np.sort(drawn.flatten()), np.linspace(0, 1, drawn.size), atol=0.03)
    assert (abs(np.corrcoef(drawn) - np.eye(4)) < 0.1).all()
    assert abs(np.corrcoef(drawn[:, 1:].flatten(), drawn[:, :-1].flatten())[0, 1]) < 0.05
    assert filters.uniforms(1, np.array([700, 3])).tolist() == drawn[1, [700, 3]].tolist()


def test_zero_temperature_takes_the_likeliest():
    logits = np.array([[0, 3, 1], [5, 0, 0]], np.float32)
    settings = [SamplingConfig(temperature=0), SamplingConfig(temperature=1e-9, top_p=0.2)]
    assert filters.Sampler(settings, 3)(logits, [0.999, 0.999]).tolist() == [1, 0]


def engine_of(model, place, rows=1, unused=(), **how):
    return generate.Engine(generate.TorchDecoder(model, place, rows, **how), LETTERS, unused)


def finish(engine, texts):
    """The pieces of each text, in the order of `texts`, until all are done."""
    pieces = {text: [] for text in texts}
    while engine.busy:
        for piece in engine.step():
            pieces[piece.of].append(piece)
    return [pieces[text] for text in texts]


def alone(model, place, request, **how):
    engine = engine_of(model, place, **how)
    return finish(engine, [engine.add(request)])[0]


def tokens(pieces):
    return [piece.token for piece in pieces]


def uncached(model, request):
    """The tokens of a request, reading the window anew for each."""
    ids, start, context = list(request.prompt), 0, model.config.context_length
    sampler = filters.Sampler([request.settings], model.vocab_size)
    for place in range(request.settings.max_tokens):
        if len(ids) - start > context:
            start = len(ids) - max(1, context // 2)
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start:]]))[:, -1].numpy()
        ids.append(int(sampler(logits, filters.uniforms(request.seed, np.array([place])))[0]))
    return ids[len(request.prompt) :]


BARE = [(LETTERS.end, LETTERS.end + 1)]  # without what ends a document, texts go on to their full length


@pytest.fixture
def model_of(make_model):
    return lambda **settings: make_model(**{"vocab_size": V, **settings})


@pytest.mark.parametrize("shape", [{}, {"arch": "modern"}, {"arch": "modern", "n_head": 4, "n_kv_head": 2, "window": 3}])
@pytest.mark.parametrize("context_length", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(10)) * 2])
def test_cached_equals_uncached_also_past_the_window(model_of, place, context_length, prompt, shape):
    model = model_of(context_length=context_length, **shape)
    request = generate.Request(prompt, SamplingConfig(max_tokens=40, temperature=1.0, allowed=tuple(range(50))), seed=3)
    assert tokens(alone(model, place, request)) == uncached(model, request)


REQUESTS = [
    generate.Request(prompt, SamplingConfig(max_tokens=count, temperature=temperature, **more), seed)
    for seed, (prompt, count, temperature, more) in enumerate(
        [
            ([1], 30, 1.0, {}), ([2, 3, 4], 11, 0.7, {"top_k": 5}), (list(range(9)), 5, 1.3, {"top_p": 0.8}), ([1], 30, 1.0, {"min_p": 0.1}),
            ([7] * 5, 1, 0.0, {}), ([1, 2], 19, 0.0, {"repetition_penalty": 1.5}), ([5, 6], 0, 1.0, {}), ([8], 23, 1.0, {"logit_bias": {4: 2.0}}),
        ]
    )
]  # fmt: skip


@pytest.mark.parametrize("shape", [{}, {"arch": "modern", "n_head": 4, "n_kv_head": 2}])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_text_among_others_that_join_and_leave_is_the_text_alone(model_of, place, rows, deterministic, shape):
    model = model_of(**shape)
    expected = [alone(model, place, request, unused=BARE) for request in REQUESTS]
    engine = engine_of(model, place, rows, BARE, deterministic=deterministic)
    texts, pieces = [engine.add(request) for request in REQUESTS[:3]], {}
    for at in range(150):
        if at in (2, 3, 9, 20, 21):  # some come later
            texts.append(engine.add(REQUESTS[len(texts)]))
        for piece in engine.step():
            pieces.setdefault(piece.of, []).append(piece)
    assert not engine.busy
    for text, right in zip(texts, expected, strict=True):
        assert tokens(pieces[text]) == tokens(right)
        got, logprobs = ([piece.logprob for piece in some] for some in (pieces[text], right))
        assert got == logprobs if deterministic else got == pytest.approx(logprobs, abs=1e-4)


def test_texts_of_one_prompt_are_like_texts_of_their_own(model_of, place):
    model = model_of()
    requests = [generate.Request([1, 2, 3], SamplingConfig(max_tokens=12), seed) for seed in range(4)]
    engine = engine_of(model, place, rows=3, unused=BARE)
    found = finish(engine, [engine.add(request) for request in requests])
    assert [tokens(pieces) for pieces in found] == [tokens(alone(model, place, request, unused=BARE)) for request in requests]


def test_rows_that_are_not_asked_for_keep_what_they_hold(model_of, place):
    model = model_of()
    decoder, other = (generate.TorchDecoder(model, place, 4) for _ in range(2))
    for each in (decoder, other):
        for row, ids in enumerate(([1, 2], [3], [4, 5, 6], [7] * 8)):
            each.prefill(row, ids)
    for _ in range(3):
        decoder.decode([0, 2], [9, 9])
    np.testing.assert_allclose(decoder.decode([1], [5]), other.decode([1], [5]), atol=1e-5)
    with pytest.raises(AssertionError, match="context"):
        decoder.decode([3], [1])


@pytest.mark.parametrize("shape", [{}, {"arch": "modern"}])
def test_a_network_without_modules_is_the_same_and_leaves_the_other_alone(model_of, shape):
    model = model_of(**shape)
    bare, idx = generate.bare(model), torch.tensor([[1, 2, 3]])
    assert torch.equal(bare(idx), model(idx))
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight.mul_(2)  # which both have
    assert torch.equal(bare(idx), model(idx))
    assert isinstance(model.blocks[0].ln_1, torch.nn.Module)


@pytest.mark.parametrize("shape", [{}, {"arch": "modern"}])
def test_weights_cast_once_give_what_casting_them_each_time_does(model_of, shape):
    model, idx = model_of(**shape), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        exact = model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(idx)
            assert torch.equal(generate.bare(model, "bfloat16")(idx), cast)
        assert not torch.equal(exact, cast.float())


@pytest.mark.parametrize("width", [16, 48, 1, 10, 170])
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_of_int8_is_that_of_the_rounded_weights_and_of_each_row_alone(width, biased):
    generator = torch.Generator().manual_seed(width)
    weight, x = torch.randn(37, width, generator=generator), torch.randn(2, 3, width, generator=generator).bfloat16().float()
    bias = torch.randn(37, generator=generator) if biased else None
    multiply = product(weight, bias, "int8")
    numbers, scale = rounded(weight, "int8")
    exact = torch.nn.functional.linear(x, numbers * scale[:, None], bias)
    assert multiply(x).dtype == torch.float32
    assert (multiply(x) - exact).abs().max() < 0.005 * exact.abs().max()
    assert torch.equal(multiply(x)[1:, 2:], multiply(x[1:, 2:]))


@pytest.mark.parametrize("shape", [{}, {"arch": "modern"}])
def test_without_numba_a_text_is_written_with_weights_in_int8(model_of, place, monkeypatch, shape):
    monkeypatch.setitem(sys.modules, "numba", None)
    model, ids = model_of(**shape), [1, 2, 3]
    exact, given = (generate.open_decoder(model, place, dtype).prefill(0, ids) for dtype in ("float32", "auto"))
    expected = generate.dequantized(model, "int8")(torch.tensor([ids]))[0, -1].detach().numpy()
    assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()
    assert not np.array_equal(given, exact)
    written = generate.TorchDecoder(generate.bare(model, "int8"), place).prefill(0, ids)
    assert np.array_equal(given, written)
    rounded_twice = generate.open_decoder(generate.dequantized(model, "int8"), place, "int8").prefill(0, ids)  # what --dtype int8 does
    np.testing.assert_allclose(rounded_twice, written, rtol=0, atol=0.01 * np.abs(written).max())


def test_a_prompt_whose_reading_was_interrupted_is_read_again(model_of, place, monkeypatch):
    decoder = generate.TorchDecoder(model_of(), place, rows=1)
    first = decoder.prefill(0, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_read", lambda ids, row: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.prefill(0, [4, 5, 6])
    decoder.cache.k.zero_()
    assert np.array_equal(decoder.prefill(0, [1, 2, 3]), first)
    assert decoder.cache.k.any()


def test_log_probabilities_are_the_model_s_own(model_of, place):
    model = model_of(scale=1.0)
    unused = [*BARE, (0, 3)]
    request = generate.Request([5, 6], SamplingConfig(max_tokens=6, temperature=0.3, top_k=2, repetition_penalty=2.0), seed=0, n_top=4)
    pieces = alone(model, place, request, unused=unused)
    ids = [5, 6, *tokens(pieces)]
    logits = model(torch.tensor([ids]))[0].detach()
    logits[:, [0, 1, 2, LETTERS.end]] = -torch.inf
    right = logits.log_softmax(dim=1)
    for at, piece in enumerate(pieces, start=1):
        assert piece.logprob == pytest.approx(float(right[at, ids[at + 1]]), abs=1e-5)
        values, places = right[at].topk(4)
        assert [token for token, _ in piece.top] == places.tolist()
        assert [value for _, value in piece.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_what_cannot_be_drawn_is_no_alternative(model_of, place):
    piece, *_ = alone(model_of(), place, generate.Request([5], SamplingConfig(max_tokens=1), 0, n_top=9), unused=[(0, V - 2)])
    assert {token for token, _ in piece.top} == {V - 2, V - 1}


def test_tokens_are_drawn_with_their_probabilities(model_of, place):
    model = model_of(scale=1.0)
    engine = engine_of(model, place, rows=50, unused=[(0, V - 8)])
    drawn = finish(engine, [engine.add(generate.Request([3], SamplingConfig(max_tokens=1, temperature=0.5), seed)) for seed in range(3000)])
    found = Counter(pieces[0].token for pieces in drawn)
    right = (model(torch.tensor([[3]]))[0, 0, V - 8 :] / 0.5).softmax(dim=0).tolist()
    assert [found[token] / 3000 for token in range(V - 8, V)] == pytest.approx(right, abs=0.03)


def test_same_seed_same_tokens_and_other_seed_others(model_of, place):
    model = model_of(scale=1.0)
    first, again, other = (tokens(alone(model, place, generate.Request([1], SamplingConfig(max_tokens=30), seed))) for seed in (7, 7, 8))
    assert first == again != other


def test_unused_tokens_are_never_drawn(model_of, place):
    request = generate.Request([1], SamplingConfig(max_tokens=200, temperature=9.0), 0)
    assert set(tokens(alone(model_of(scale=0.1), place, request, unused=[(0, 4), (5, V - 1)]))) == {4, V - 1}


def test_only_allowed_tokens_are_drawn_and_there_must_be_one(model_of, place):
    model = model_of(scale=0.1)
    request = generate.Request([1], SamplingConfig(max_tokens=100, temperature=9.0, allowed=(3, 7, 9)), 0)
    assert set(tokens(alone(model, place, request, unused=[(9, 10)]))) == {3, 7}
    engine = engine_of(model, place, unused=[(9, 12)])
    with pytest.raises(UserError, match="None of the 2 allowed"):
        engine.add(generate.Request([1], SamplingConfig(allowed=(9, 11)), 0))
    for wrong in ({"allowed": (3, V)}, {"logit_bias": {-1: 2.0}}):
        with pytest.raises(UserError, match="There is no token"):
            engine.add(generate.Request([1], SamplingConfig(**wrong), 0))
    with pytest.raises(UserError, match=f"There is no token {V}"):
        engine.add(generate.Request([1, V], SamplingConfig(), 0))
    assert not engine.busy


def test_a_text_that_is_cancelled_leaves_at_the_next_step_and_another_takes_its_row(model_of, place):
    engine = engine_of(model_of(), place, rows=2, unused=BARE)
    first, second, third, fourth = (engine.add(generate.Request([1], SamplingConfig(max_tokens=5), seed)) for seed in range(4))
    assert {piece.of for piece in engine.step()} == {first, second}
    first.cancel()
    fourth.cancel()
    pieces = engine.step()
    assert [(piece.of, piece.token, piece.finish) for piece in pieces[:2]] == [(first, None, "cancelled"), (fourth, None, "cancelled")]
    assert {piece.of for piece in pieces[2:]} == {second, third}
    assert (third.row, third.made, second.made) == (0, 1, 2)
    assert [some[-1].finish for some in finish(engine, [second, third])] == ["length", "length"]


def test_a_text_tells_how_it_ended(model_of, place):
    model = model_of(scale=0.1)
    letters = tuple(LETTERS.encode("abc"))
    engine = engine_of(model, place, rows=4)
    wants = [{"max_tokens": 0}, {"max_tokens": 3}, {"stop": ("a", "b"), "max_tokens": 99}, {"allowed": (LETTERS.end,)}]
    pieces = finish(engine, [engine.add(generate.Request([1], SamplingConfig(**{"allowed": letters} | want), 5)) for want in wants])
    assert [some[-1].finish for some in pieces] == ["length", "length", "stop", "stop"]
    assert [(len(some), some[-1].token is None) for some in pieces[:2]] == [(1, True), (3, False)]
    assert tokens(pieces[3]) == [LETTERS.end]
    assert set("".join(piece.text for piece in pieces[2])) <= {"c"}
    assert "".join(piece.text for piece in pieces[3]) == ""


def test_what_was_held_back_comes_when_the_tokens_are_used_up(model_of, place):
    a = LETTERS.encode("a")
    pieces = alone(model_of(), place, generate.Request(a, SamplingConfig(max_tokens=4, allowed=tuple(a), stop=("aaaaaa",)), 0))
    assert [(piece.text, piece.finish) for piece in pieces] == [("", None)] * 3 + [("aaaa", "length")]


def test_the_caller_s_own_random_numbers_are_left_alone(model_of, place):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    alone(model_of(), place, generate.Request([1], SamplingConfig(max_tokens=5), 0))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("shape", "peer"), [({}, gpt2_like), ({"arch": "modern", "n_head": 4, "n_kv_head": 2}, qwen3_like)])
def test_greedy_text_is_that_of_transformers(model_of, place, shape, peer):
    model = model_of(context_length=32, **shape)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    right = peer(model).generate(prompt, max_new_tokens=27, do_sample=False, attention_mask=torch.ones_like(prompt), eos_token_id=V, pad_token_id=V)
    request = generate.Request(prompt[0].tolist(), SamplingConfig(max_tokens=27, temperature=0), 0)
    assert tokens(alone(model, place, request, unused=[])) == right[0, 5:].tolist()[: len(tokens(alone(model, place, request)))]


TOKENIZER = train_tokenizer("char", ["abcde \n"])


def spell(tokenizer, ids, stop=()):
    """The pieces that are not empty."""
    spelling, pieces = generate.Spelling(tokenizer, stop), []
    for token in ids:
        pieces.append(spelling.add(token))
        if spelling.ended:
            break
    else:
        pieces.append(spelling.rest())
    return [piece for piece in pieces if piece]


def stream(string, stop=()):
    return spell(TOKENIZER, TOKENIZER.encode(string), stop)


def test_a_piece_never_splits_a_character():
    assert stream("a🙂日b") == ["a", "🙂", "日", "b"]
    assert list(spell(TOKENIZER, TOKENIZER.encode("a🙂")[:-1])) == ["a", "\ufffd"]


def test_text_ends_with_its_document():
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.end, *TOKENIZER.encode("cd")]
    assert "".join(spell(TOKENIZER, ids)) == "ab"


def test_stop_strings_across_tokens_are_held_back_and_left_out():
    assert stream("abcde", ["cd"]) == ["a", "b"]
    assert "".join(stream("abcabd", ["abd", "zz"])) == "abc"
    assert "".join(stream("ababc", ["abc"])) == "ab"
    assert "".join(stream("abc", ["cd"])) == "abc"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(string, stop):
    complete = min((string.find(s) + len(s) for s in stop if s in string), default=len(string))  # the string that is complete first wins
    read = string[:complete]
    assert "".join(stream(string, stop)) == read[: min((read.find(s) for s in stop if s in read), default=len(read))]


SUBWORDS = [train_tokenizer(kind, ["abcab cab bca abc 🙂日 " * 9]) for kind in ("byte", "word", "bpe")]
any_tokenizer = st.sampled_from([TOKENIZER, *SUBWORDS])


@given(any_tokenizer, st.text("abc🙂日é ", max_size=30), st.lists(st.text("abc🙂日 ", min_size=1, max_size=4), max_size=3))
def test_whatever_the_tokens_the_first_string_that_is_complete_ends_the_text(tokenizer, string, stop):
    assert "".join(spell(tokenizer, tokenizer.encode(string), stop)) == "".join(stream(string, stop))


@given(any_tokenizer, st.text("abc🙂日é "))
def test_pieces_are_whole_characters_whatever_the_tokens(tokenizer, string):
    pieces = list(spell(tokenizer, tokenizer.encode(string)))
    assert "".join(pieces) == string
    assert "\ufffd" not in "".join(pieces)
    assert all(pieces)


def ranges(tokens):
    return [(token, token + 1) for token in tokens]


@pytest.mark.parametrize("tokenizer", SUBWORDS, ids=["byte", "word", "bpe"])
def test_nothing_is_unknown_whose_bytes_occurred(tokenizer):
    learned = set(tokenizer.encode("abc 日本é")) | {token for token in range(tokenizer.vocab_size) if len(tokenizer.token_bytes[token]) == 1}
    unused = ranges(set(range(tokenizer.vocab_size)) - learned)
    assert tokenizer.decode(generate.encode_prompt(tokenizer, "abc 日 漢", unused, 100)) == "abc 日 漢"


@given(st.sampled_from(SUBWORDS), st.text("abc 🙂日éñ"), st.randoms())
def test_what_is_spelled_by_tokens_that_never_occurred_is_found_in_whole_characters(tokenizer, string, chance):
    ids = tokenizer.encode(string)
    new = {token for token in ids if chance.random() < 0.3}
    of_bytes = [token in new for token in ids for _ in tokenizer.token_bytes[token]]
    ends = [len(string[:at].encode()) for at in range(len(string) + 1)]
    expected = {at: string[at] for at in range(len(string)) if any(of_bytes[ends[at] : ends[at + 1]])}
    found = generate.text._unlearned(tokenizer, string, ids, ranges(new))
    assert {at + i: letter for at, part in found for i, letter in enumerate(part)} == expected
    assert all(at + len(part) not in expected for at, part in found)


def test_what_never_occurred_is_named_and_strict_refuses_it():
    tokenizer = SUBWORDS[0]
    unused = ranges(set(range(tokenizer.vocab_size)) - set(b"abc "))
    with pytest.warns(Notice, match=r"had no '日' \(U\+65E5\) at position 4, 'ñq' at position 8\."):
        ids = generate.encode_prompt(tokenizer, "abc 日bcañq", unused, 100)
    assert tokenizer.decode(ids) == "abc 日bcañq"
    with pytest.raises(UserError, match="had no 'ñq' at position 0"):
        generate.encode_prompt(tokenizer, "ñq", unused, 100, strict=True)


def test_unknown_characters_are_named_and_strict_refuses_them():
    with pytest.warns(Notice, match=r"'日' \(U\+65E5\) at position 1"):
        ids = generate.encode_prompt(TOKENIZER, "a日", [], 100)
    assert TOKENIZER.decode(ids) == "a日"
    with pytest.raises(UserError, match=r"U\+65E5"):
        generate.encode_prompt(TOKENIZER, "a日", [], 100, strict=True)


def test_a_long_prompt_says_what_counts():
    with pytest.warns(Notice, match="20 tokens.*looks back on 10.*last 5"):
        generate.encode_prompt(TOKENIZER, "ab" * 10, [], 10)


def test_without_a_prompt_text_begins_after_the_end_of_another_or_a_line_end():
    assert generate.encode_prompt(TOKENIZER, None, [], 10) == [TOKENIZER.end]
    assert TOKENIZER.decode(generate.encode_prompt(TOKENIZER, None, [(TOKENIZER.end, TOKENIZER.end + 1)], 10)) == "\n"
    with pytest.warns(Notice, match="empty"):
        generate.encode_prompt(TOKENIZER, "", [], 10)
