"""Text becomes numbers and the same text again, whatever it was, here and in the libraries that read our file."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer

from nanogpt.errors import UserError
from nanogpt.tokenizer import BYTES, END, Tokenizer, train_tokenizer

AWKWARD = ["", END, "<0x41>", "<0x41", "▁a ▁", "\0", "\r\n", "\x85\u2028", "👩‍👩‍👧", "e\u0301é", "\ufeff", "\ufffd", "\U0010ffff", "a  b ", " ."]
ALPHABETS = ["", "a", "hello world\r\n", "".join(map(chr, range(128))), "日本語é▁<>|0x41end\U0010ffff", *AWKWARD]
TOKENIZERS = [train_tokenizer("char", [text]) for text in ALPHABETS]
texts = st.text() | st.text("aehlo<|>x0 \r\n▁日é") | st.lists(st.sampled_from(AWKWARD)).map("".join)
any_tokenizer = st.sampled_from(TOKENIZERS)


@pytest.fixture
def tokenizer():
    return train_tokenizer("char", ["hello wörld"])


@given(any_tokenizer, texts)
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(any_tokenizer, texts)
def test_tokens_are_those_of_the_tokenizers_library(tokenizer, text):
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    assert tokenizer.backend.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.lists(texts), texts)
def test_a_tokenizer_is_its_json(chunks, text):
    tokenizer = train_tokenizer("char", chunks)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.vocab_size, again.end, again.token_bytes) == (tokenizer.vocab_size, tokenizer.end, tokenizer.token_bytes)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_json() == tokenizer.to_json()


@settings(deadline=None)
@given(st.lists(texts))
def test_each_character_of_the_training_text_is_one_token_in_code_point_order(chunks):
    tokenizer, alphabet = train_tokenizer("char", chunks), sorted(set("".join(chunks)))
    assert tokenizer.encode("".join(alphabet)) == list(range(len(alphabet)))
    assert tokenizer.vocab_size == len(alphabet) + 256 + 1
    assert tokenizer.token_bytes == [*map(str.encode, alphabet), *(bytes([byte]) for byte in range(256)), END.encode()]


@given(any_tokenizer, texts)
@example(TOKENIZERS[0], END * 3)
def test_no_text_contains_the_end_of_a_document(tokenizer, text):
    assert tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.end not in tokenizer.encode(END.join([text, text]))


@given(any_tokenizer, texts)
def test_a_token_stands_for_as_many_bytes_as_the_text_has(tokenizer, text):
    assert b"".join(tokenizer.token_bytes[token] for token in tokenizer.encode(text)) == text.encode()


@given(any_tokenizer, texts)
def test_unknown_characters_are_named_with_their_positions(tokenizer, text):
    alphabet = set(ALPHABETS[TOKENIZERS.index(tokenizer)])
    assert tokenizer.unknown(text) == [(i, letter) for i, letter in enumerate(text) if letter not in alphabet]


@given(any_tokenizer, st.text(), st.text(), st.characters(categories=["Cs"]))
def test_an_unpaired_surrogate_is_refused_with_its_place(tokenizer, before, after, half):
    with pytest.raises(UserError, match=rf"Character {len(before)} of the text, '\\ud[0-9a-f]{{3}}', is an unpaired surrogate"):
        tokenizer.encode(before + half + after)


@given(any_tokenizer, st.data())
def test_any_tokens_have_a_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert tokenizer.decode(np.array(ids, np.uint16)) == tokenizer.decode(iter(ids)) == tokenizer.decode(ids)
    tokenizer.encode(tokenizer.decode(ids))


def test_bytes_that_spell_no_character_come_out_as_replacements(tokenizer):
    assert tokenizer.decode(tokenizer.encode("日")[:2] + tokenizer.encode("h")) == "\ufffdh"


def test_bulk_and_single_encoding_agree(tokenizer):
    assert tokenizer.encode_array("wörld 日").dtype == np.uint32
    assert tokenizer.encode_array("wörld 日").tolist() == tokenizer.encode("wörld 日")


def test_every_character_of_unicode_comes_back(tokenizer):
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_transformers_reads_the_same_file(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*AWKWARD, "hello , wörld ! do n't 日本"]:
        assert theirs.encode(text) == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


def foreign(*vocabulary: str) -> str:
    return Backend(models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=[])).to_str()


@pytest.mark.parametrize("text", ["", "\0", "[]", "{}", '{"model": {}}', TOKENIZERS[2].to_json()[:-1]])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.from_json(text)


@pytest.mark.parametrize("text", [foreign("a", "b"), foreign("a", END), foreign(*BYTES)])
def test_the_tokenizer_of_another_program_is_refused(text):
    with pytest.raises(UserError, match="not made by nanogpt"):
        Tokenizer.from_json(text)


def changed(**parts: object) -> str:
    return json.dumps(json.loads(TOKENIZERS[2].to_json()) | parts)


@pytest.mark.parametrize("text", [foreign(BYTES[0], END, "a"), changed(normalizer={"type": "Lowercase"}), changed(pre_tokenizer={"type": "Whitespace"})])
def test_a_tokenizer_that_would_encode_differently_is_refused(text):
    with pytest.raises(UserError):
        Tokenizer.from_json(text)


def test_negative_tokens_are_no_tokens(tokenizer):
    with pytest.raises((UserError, IndexError)):
        tokenizer.decode([-1])
