"""Sampling draws what it should, a cache changes nothing, and a stream is whole characters that end where they should."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import generate
from nanogpt.config import SamplingConfig
from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer import train_tokenizer

LOGITS = torch.tensor([2.0, 1.0, 1.0, 1.0, -1.0])


def kept(logits):
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_top_k_cuts_ties_by_index():
    assert kept(generate.top_k(LOGITS, 2)) == [0, 1]
    assert kept(generate.top_k(LOGITS, 99)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_smallest_nucleus():
    p = LOGITS.softmax(0)
    assert kept(generate.top_p(LOGITS, 1e-9)) == [0]
    assert kept(generate.top_p(LOGITS, float(p[0]) + 1e-4)) == [0, 1]
    assert kept(generate.top_p(LOGITS, 1.0)) == [0, 1, 2, 3, 4]


def test_min_p_is_relative_to_the_likeliest():
    assert kept(generate.min_p(LOGITS, 0.3)) == [0, 1, 2, 3]
    assert kept(generate.min_p(LOGITS, 1.0)) == [0]


def test_tokens_are_drawn_with_their_probabilities():
    generator, settings = torch.Generator().manual_seed(0), SamplingConfig(temperature=0.5)
    drawn = torch.tensor([generate.pick(LOGITS, settings, generator) for _ in range(4000)]).bincount(minlength=5) / 4000
    torch.testing.assert_close(drawn, (LOGITS / 0.5).softmax(0), atol=0.03, rtol=0)


def test_zero_temperature_takes_the_likeliest():
    assert generate.pick(LOGITS, SamplingConfig(temperature=0), torch.Generator()) == 0


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("context_length", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(10)) * 2])
def test_cached_equals_uncached_also_past_the_window(make_model, place, seed, context_length, prompt, arch):
    model, settings = make_model(context_length=context_length, arch=arch), SamplingConfig(max_tokens=40, temperature=1.0)
    cached = list(generate.tokens(model, prompt, settings, seed, place))
    assert cached == list(generate.tokens(model, prompt, settings, seed, place, cached=False))
    assert len(cached) == 40


def test_same_seed_same_tokens_and_other_seed_others(make_model, place):
    model, settings = make_model(scale=1.0), SamplingConfig(max_tokens=30)
    first, again, other = (list(generate.tokens(model, [1], settings, seed, place)) for seed in (7, 7, 8))
    assert first == again != other


def test_unused_tokens_are_never_drawn(make_model, place):
    drawn = generate.tokens(make_model(scale=0.1), [1], SamplingConfig(max_tokens=200, temperature=9.0), 0, place, unused=[(0, 4), (5, 10)])
    assert set(drawn) == {4, 10}


def test_the_caller_s_own_random_numbers_are_left_alone(make_model, place):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(generate.tokens(make_model(), [1], SamplingConfig(max_tokens=5), 0, place))
    assert torch.equal(torch.rand(3), expected)


TOKENIZER = train_tokenizer("char", ["abcde \n"])


def stream(string, stop=()):
    return list(generate.text(TOKENIZER, TOKENIZER.encode(string), stop))


def test_a_piece_never_splits_a_character():
    assert stream("a🙂日b") == ["a", "🙂", "日", "b"]
    assert list(generate.text(TOKENIZER, TOKENIZER.encode("a🙂")[:-1])) == ["a", "\ufffd"]


def test_text_ends_with_its_document():
    ids = [*TOKENIZER.encode("ab"), TOKENIZER.end, *TOKENIZER.encode("cd")]
    assert "".join(generate.text(TOKENIZER, ids)) == "ab"


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
    assert "".join(generate.text(tokenizer, tokenizer.encode(string), stop)) == "".join(stream(string, stop))


@given(any_tokenizer, st.text("abc🙂日é "))
def test_pieces_are_whole_characters_whatever_the_tokens(tokenizer, string):
    pieces = list(generate.text(tokenizer, tokenizer.encode(string)))
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
    found = generate._unlearned(tokenizer, string, ids, ranges(new))
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
