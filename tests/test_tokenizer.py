"""Tokenizers encode every text exactly, as the `tokenizers` library does, or are refused."""

import json
import math
import tempfile
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from nanogpt.errors import Notice, UserError
from nanogpt.tokenizer import chunking
from nanogpt.tokenizer import trainers as tokenizer_trainers
from nanogpt.tokenizer.lossless import BYTE_TO_UNICODE, BYTES, EOT
from nanogpt.tokenizer.tokenizer import Tokenizer, train_tokenizer
from nanogpt.tokenizer.trainers import TRAINERS

AWKWARD = [
    "",
    EOT,
    "<0x41>",
    "<0x41",
    "▁a ▁",
    "\0",
    "\r\n",
    "\x85\u2028",
    "👩‍👩‍👧",
    "e\u0301é",
    "\ufeff",
    "\ufffd",
    "\U0010ffff",
    "a  b ",
    " .",
]
AWKWARD += [
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<unk>",
    "▁",
    "▁▁",
    "\x1c",
    "\u3000",
    "日本語",
    "don't  stop",
    "\n\n  x\t",
    "Ġthe",
    "Ġ",
    "क\u094dष",
]
BOOK = (
    "The cat doesn't see the dog, the dog sees 12 cats.\n\n"
    "  They see </s> and <|end|> 日本語 été ▁ and the end\r\n"
) * 3
ALPHABETS = [
    "",
    "a",
    "hello world\r\n",
    "".join(map(chr, range(128))),
    "日本語é▁<>|0x41end\U0010ffff",
    *AWKWARD,
]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2(**byte_level: bool) -> Backend:
    """Return a byte-level tokenizer like GPT-2's, in which `<|endoftext|>` is an added token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | byte_level)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    special = AddedToken("<|endoftext|>", special=True, lstrip=True)
    backend.train_from_iterator(
        [BOOK],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=[special],
            initial_alphabet=BYTE_TO_UNICODE,
            show_progress=False,
        ),
    )
    return backend


def llama_3() -> Backend:
    """Return a tokenizer like Llama 3's: `ignore_merges`, and special tokens outside the model."""
    spec = json.loads(gpt2().to_str()) | {"added_tokens": []}
    del spec["model"]["vocab"]["<|endoftext|>"]
    spec["model"]["vocab"] = {name: i for i, name in enumerate(spec["model"]["vocab"])} | {
        "Ġunreachable": 299
    }
    backend = Backend.from_str(
        json.dumps(spec | {"model": spec["model"] | {"ignore_merges": True}})
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    return backend


def llama(spaces: str = "normalizer", **model: object) -> Backend:
    """Return a tokenizer like Llama's, with byte fallback and a merge that produces `</s>`."""
    trainer = Backend(models.BPE())
    trainer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer.train_from_iterator(
        [BOOK.encode("ascii", "ignore").decode()],
        trainers.BpeTrainer(vocab_size=90, show_progress=False),
    )
    trained = json.loads(trainer.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *BYTES, *trained["vocab"], "▁▁", "</", "s>"]
    merges = [tuple(pair) for pair in trained["merges"]] + [
        ("▁", "▁"),
        ("<", "/"),
        ("s", ">"),
        ("</", "s>"),
    ]
    names = list(dict.fromkeys(names))
    backend = Backend(
        models.BPE(
            **{
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": merges,
                "byte_fallback": True,
                "unk_token": "<unk>",
            }
            | model
        )
    )
    if spaces == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first", split=spaces == "split"
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


def gemma() -> Backend:
    """Return a tokenizer like Gemma's, without a space before the first word."""
    backend = llama()
    backend.normalizer = normalizers.Replace(" ", "▁")
    # After the normalizer, the pre-tokenizer finds no spaces.
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return backend


def starcoder() -> Backend:
    """Return a tokenizer like StarCoder's, which splits digits first."""
    backend = gpt2()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


FOREIGN = {"gemma": gemma(), "starcoder": starcoder()}
FOREIGN |= {
    "gpt2": gpt2(),
    "prefix": gpt2(add_prefix_space=True),
    "llama3": llama_3(),
    "llama": llama(),
    "metaspace": llama("whole"),
    "split": llama("split"),
}
TOKENIZERS = [train_tokenizer("char", [text]) for text in ALPHABETS]
TOKENIZERS += [
    train_tokenizer(kind, [text])
    for kind in ("byte", "word", "bpe")
    for text in ("", BOOK, "".join(AWKWARD * 2))
]
NUM_TRAINED = len(TOKENIZERS)
TOKENIZERS += [Tokenizer.from_json(backend.to_str()) for backend in FOREIGN.values()]
texts = (
    st.text()
    | st.text("aehlost<|/>x0 \r\n▁日éĠ")
    | st.lists(st.sampled_from([*AWKWARD, "the ", "cat", " dog"])).map("".join)
)
any_tokenizer = st.sampled_from(TOKENIZERS)
any_char = st.sampled_from(TOKENIZERS[: len(ALPHABETS)])


@pytest.fixture(params=["char", "byte", "word", "bpe", *FOREIGN])
def tokenizer(request):
    if request.param in TRAINERS:
        return train_tokenizer(request.param, ["hello wörld"])
    return Tokenizer.from_json(FOREIGN[request.param].to_str())


@given(any_tokenizer, texts)
def test_text_round_trips_through_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(any_tokenizer, texts)
def test_tokens_equal_those_of_the_tokenizers_library(tokenizer, text):
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    assert tokenizer.backend.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(deadline=None)
@given(st.sampled_from(["char", "byte", "word", "bpe"]), st.lists(texts, max_size=5), texts)
def test_tokenizer_round_trips_through_json(kind, chunks, text):
    tokenizer = train_tokenizer(kind, chunks)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.vocab_size, again.eot_id, again.token_bytes) == (
        tokenizer.vocab_size,
        tokenizer.eot_id,
        tokenizer.token_bytes,
    )
    assert again.encode(text) == tokenizer.encode(text)
    assert again.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_tokenizer_round_trips_through_json(name):
    tokenizer = Tokenizer.from_json(FOREIGN[name].to_str())
    assert Tokenizer.from_json(tokenizer.to_json()).to_json() == tokenizer.to_json()


@settings(deadline=None)
@given(st.lists(texts))
def test_char_tokens_are_in_code_point_order(chunks):
    tokenizer, alphabet = train_tokenizer("char", chunks), sorted(set("".join(chunks)))
    assert tokenizer.encode("".join(alphabet)) == list(range(len(alphabet)))
    assert tokenizer.vocab_size == len(alphabet) + 256 + 1
    assert tokenizer.token_bytes == [
        *map(str.encode, alphabet),
        *(bytes([byte]) for byte in range(256)),
        EOT.encode(),
    ]


@given(any_tokenizer, texts)
@example(TOKENIZERS[0], EOT * 3)
def test_no_text_produces_the_eot_token(tokenizer, text):
    end = tokenizer.token_bytes[tokenizer.eot_id].decode()
    assert tokenizer.eot_id not in tokenizer.encode(end.join([text, text, ""]))
    assert (
        TOKENIZERS.index(tokenizer) >= NUM_TRAINED or tokenizer.eot_id == tokenizer.vocab_size - 1
    )


@given(any_tokenizer, texts)
def test_token_bytes_join_to_the_text(tokenizer, text):
    assert (
        b"".join(tokenizer.token_bytes[token] for token in tokenizer.encode(text)) == text.encode()
    )


@given(any_char, texts)
def test_unknown_chars_have_positions(tokenizer, text):
    alphabet = set(ALPHABETS[TOKENIZERS.index(tokenizer)])
    assert tokenizer.unknown_chars(text) == [
        (i, char) for i, char in enumerate(text) if char not in alphabet
    ]


@pytest.mark.parametrize("kind", ["byte", "word", "bpe"])
def test_unknown_chars_are_empty_for_other_kinds(kind):
    assert train_tokenizer(kind, ["an an"]).unknown_chars("b日") == []


@given(any_tokenizer, st.text(), st.text(), st.characters(categories=["Cs"]))
def test_unpaired_surrogate_error_has_the_position(tokenizer, before, after, half):
    for encode in (tokenizer.encode, lambda text: list(tokenizer.encode_chunks([text]))):
        with pytest.raises(
            UserError,
            match=rf"Character {len(before)} of the text, '\\ud[0-9a-f]{{3}}', is an unpaired",
        ):
            encode(before + half + after)


@given(any_tokenizer, st.data())
def test_any_tokens_can_be_decoded(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert (
        tokenizer.decode(np.array(ids, np.uint16))
        == tokenizer.decode(iter(ids))
        == tokenizer.decode(ids)
    )
    tokenizer.encode(tokenizer.decode(ids))


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_invalid_utf_8_decodes_to_replacement_characters(kind):
    tokenizer = train_tokenizer(kind, ["hello wörld"])
    assert tokenizer.decode(tokenizer.encode("日")[:2] + tokenizer.encode("h")) == "\ufffdh"


def test_encode_array_equals_encode(tokenizer):
    assert tokenizer.encode_array("wörld 日").dtype == np.uint32
    assert tokenizer.encode_array("wörld 日").tolist() == tokenizer.encode("wörld 日")


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_all_of_unicode_round_trips(kind):
    tokenizer = train_tokenizer(kind, ["hello wörld"])
    text = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Chunks


@settings(max_examples=300)
@given(
    any_tokenizer,
    texts | st.lists(st.sampled_from(["ab", " ", "日", "\n", "x" * 9])).map("".join),
    st.data(),
)
def test_encode_chunks_does_not_depend_on_the_chunks(tokenizer, text, data):
    boundaries = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    chunks = [text[a:b] for a, b in zip([0, *boundaries], [*boundaries, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_CHARS", data.draw(st.integers(1, 5)))
        patch.setattr(chunking, "MAX_CHUNK_CHARS", data.draw(st.integers(6, 12)))
        arrays = list(tokenizer.encode_chunks(chunks))
        assert all(ids.dtype == np.uint32 for ids in arrays)
        assert [token for ids in arrays for token in ids.tolist()] == tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(any_tokenizer, texts, st.integers(1, 5))
def test_safe_splits_keep_the_tokens_of_the_library(tokenizer, text, chunk_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_CHARS", chunk_chars)
        assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids


@given(texts | st.text("ab \n"), st.integers(1, 4), st.integers(5, 9), st.integers(1, 7))
def test_batches_join_to_the_text_in_bounded_chunks(text, chunk_chars, max_chunk_chars, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "CHUNK_CHARS", chunk_chars)
        patch.setattr(chunking, "MAX_CHUNK_CHARS", max_chunk_chars)
        texts = [text[i : i + step] for i in range(0, len(text), step)]
        for pattern in (
            chunking.safe_split_pattern([]),
            chunking.safe_split_pattern(["a b", "a\n"]),
        ):
            batches = list(chunking.iter_batches(texts, pattern))
            chunks = [chunk for batch in batches for chunk in batch]
            assert "".join(chunks) == text
            assert all(0 < len(chunk) <= max_chunk_chars for chunk in chunks)
            assert all(sum(map(len, batch)) < 2 * max_chunk_chars for batch in batches)


def test_safe_splits_are_where_no_token_reaches_across():
    def splits(token_texts: list[str], text: str) -> list[int]:
        pattern = chunking.safe_split_pattern(token_texts)
        return [match.start() for match in pattern.finditer(text)]

    assert splits(["b", " b"], "a b\n\n  c\x1c d") == [1, 3]
    assert splits(["x\n"], "a b\n c") == [1]
    assert not chunking.safe_split_pattern(["x\n", "a b"]).search("a b\n c")


def test_white_space_is_that_of_the_library():
    split = pre_tokenizers.Split(Regex(r"\S"), "removed")
    white = {
        char
        for word, _ in split.pre_tokenize_str("".join(map(chr, range(0xD800))))
        for char in word
    }
    assert {" ", "\n"} < white <= {chr(point) for point in range(0xD800) if chr(point).isspace()}


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_text_without_safe_splits_is_encoded(kind):
    tokenizer, text = train_tokenizer(kind, [BOOK]), "see" * 400_000 + " the cat"
    ids = np.concatenate(
        list(tokenizer.encode_chunks(text[i : i + 99_999] for i in range(0, len(text), 99_999)))
    )
    assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


# In other libraries


@pytest.fixture(scope="module")
def in_transformers():
    loaded = []
    for tokenizer in TOKENIZERS:
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/tokenizer.json", "w", encoding="utf-8", newline="") as file:
                file.write(tokenizer.to_json())
            loaded.append(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return loaded


@given(st.integers(0, len(TOKENIZERS) - 1), texts)
@example(4, "hello , wörld ! do n't 日本")
def test_transformers_reads_the_tokenizer_file(in_transformers, number, text):
    ours, theirs = TOKENIZERS[number], in_transformers[number]
    assert len(theirs) == ours.vocab_size
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text


# Trained on a text


def test_byte_tokens_are_byte_values():
    tokenizer = train_tokenizer("byte", iter(["never mind"]))
    assert tokenizer.encode("aé") == list("aé".encode())
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)


def test_word_tokens_are_words_and_characters():
    tokenizer = train_tokenizer("word", ["the cat, the cat; a dog"])
    token_texts = [
        tokenizer.token_bytes[token].decode("latin-1")
        for token in tokenizer.encode("the cat;  dog té")
    ]
    assert token_texts == [
        "the",
        " ",
        "cat",
        ";",
        " ",
        " ",
        "d",
        "o",
        "g",
        " ",
        "t",
        "\xc3",
        "\xa9",
    ]


def test_word_vocabulary_prefers_frequent_units():
    text = "bb bb bb cc cc d " * 2
    assert train_tokenizer("word", [text], 257 + 2).token_bytes[:2] == [b" ", b"b"]
    assert train_tokenizer("word", [text], 257 + 5).token_bytes[:5] == [
        b" ",
        b"b",
        b"c",
        b"d",
        b"bb",
    ]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_vocab_size_is_exact_or_an_error(kind, story):
    text = story.read_text()
    for size in (258, 280):
        assert train_tokenizer(kind, [text], size).vocab_size == size
    with pytest.raises(
        UserError, match=r"The text supports (\d+) tokens .* not vocab_size = 20000"
    ) as caught:
        train_tokenizer(kind, [text], 20_000)
    supported = caught.value.fix["vocab_size"]
    assert f"supports {supported} tokens" in str(caught.value)
    assert train_tokenizer(kind, [text], supported).vocab_size == supported
    assert train_tokenizer(kind, [text]).vocab_size == min(supported, 512)


@pytest.mark.parametrize("size", [1, 100, 257])
@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_vocab_size_below_the_bytes_is_an_error(kind, size):
    with pytest.raises(
        UserError,
        match=rf"A vocabulary of {size} tokens is too small.*\n.*vocab_size=258",
    ):
        train_tokenizer(kind, ["some text"], size)


@pytest.mark.parametrize("kind", ["char", "byte", "some/tokenizer.json"])
def test_vocab_size_of_a_fixed_kind_is_an_error(kind):
    with pytest.raises(UserError, match=f"vocab_size = 500 does not go with tokenizer = {kind!r}"):
        train_tokenizer(kind, ["some text"], 500)


def test_bpe_merges_equal_those_of_the_library():
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        [BOOK],
        trainers.BpeTrainer(
            vocab_size=299, min_frequency=2, initial_alphabet=BYTE_TO_UNICODE, show_progress=False
        ),
    )
    ours = json.loads(train_tokenizer("bpe", [BOOK[:50], BOOK[50:]], 300).to_json())["model"]
    assert ours["merges"] == json.loads(trained.to_str())["model"]["merges"]
    assert ours["merges"]


@pytest.mark.parametrize("n_bytes", [None, 40_000, 20_000])
def test_sample_of_a_large_text_is_even_and_gives_a_notice(monkeypatch, n_bytes):
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BYTES", 10_000)
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BLOCK_CHARS", 100)
    text = "".join(f"{i:049}\n" for i in range(800))
    with pytest.warns(Notice, match=r"a sample of 0\.0 of 0\.0 MB, spread evenly"):
        blocks, total = tokenizer_trainers.sample_blocks(
            "bpe", (text[i : i + 77] for i in range(0, len(text), 77)), n_bytes
        )
    assert total == 40_000
    positions = [text.index(block.decode()) for block in blocks]
    assert len(set(np.diff(positions))) == 1
    assert positions[0] == 0
    assert positions[-1] > 39_000
    assert 5_000 <= sum(map(len, blocks)) <= 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            b"".join(
                tokenizer_trainers.sample_blocks("bpe", [text[:10_000]], n_bytes and 10_000)[0]
            ).decode()
            == text[:10_000]
        )


def test_sample_rounded_up_to_a_block_is_not_halved(monkeypatch):
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BYTES", 10_050)
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BLOCK_CHARS", 100)
    with pytest.warns(Notice, match="a sample"):
        blocks, _ = tokenizer_trainers.sample_blocks("bpe", ["x" * 20_100], 20_100)
    assert sum(map(len, blocks)) == 10_100


@pytest.mark.parametrize("kind", ["byte", "file"])
def test_fixed_tokenizer_does_not_read_the_text(tmp_path, kind):
    (tmp_path / "tokenizer.json").write_text(
        train_tokenizer("byte", []).to_json(), encoding="utf-8"
    )
    chunks = iter(["never read"])
    train_tokenizer(kind if kind == "byte" else str(tmp_path), chunks)
    assert list(chunks) == ["never read"]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_text_outside_the_sample_round_trips(kind, monkeypatch, story):
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BYTES", 1000)
    monkeypatch.setattr(tokenizer_trainers, "SAMPLE_BLOCK_CHARS", 100)
    text = story.read_text() + "Zebras! 日本"
    with pytest.warns(Notice, match=f"vocabulary of {kind} tokens is chosen from a sample"):
        tokenizer = train_tokenizer(kind, [text])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_default_vocab_size_grows_with_the_square_root():
    sizes = [
        tokenizer_trainers.default_vocab_size(n) for n in (0, 1, 10**5, 10**6, 10**8, 2 * 10**9)
    ]
    assert sizes == [512, 512, 512, 1024, 8192, 32768]
    assert all(
        math.log2(tokenizer_trainers.default_vocab_size(n)).is_integer()
        for n in range(10**6, 10**8, 10**6)
    )


# From other programs


def test_foreign_tokenizer_keeps_its_ids():
    plain = "They see the cats, the dogs"
    for name in ("gpt2", "prefix", "llama3", "starcoder", "gemma"):
        ours = Tokenizer.from_json(FOREIGN[name].to_str())
        assert (
            ours.encode(" " + plain)
            == FOREIGN[name]
            .encode(("" if name == "prefix" else " ") + plain, add_special_tokens=False)
            .ids
        )
    # These insert a space before the first word.
    for name in ("llama", "metaspace", "split"):
        ours = Tokenizer.from_json(FOREIGN[name].to_str())
        assert ours.encode(" " + plain) == FOREIGN[name].encode(plain, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("name", "end", "added"),
    [
        ("gpt2", "<|endoftext|>", 0),
        ("llama3", "<|end_of_text|>", 0),
        ("llama", "</s>", 0),
        ("metaspace", "</s>", 0),
    ],
)
def test_eot_has_its_usual_name_or_is_added(name, end, added):
    tokenizer = Tokenizer.from_json(FOREIGN[name].to_str())
    assert tokenizer.token_bytes[tokenizer.eot_id] == end.encode()
    assert tokenizer.vocab_size == FOREIGN[name].get_vocab_size() + added


def test_foreign_tokenizer_without_eot_gets_one():
    tokenizer = Tokenizer.from_json(
        changed(
            gpt2(),
            lambda spec: (
                spec | {"added_tokens": [], "model": without(spec["model"], "<|endoftext|>")}
            ),
        )
    )
    assert (tokenizer.eot_id, tokenizer.token_bytes[-1]) == (tokenizer.vocab_size - 1, EOT.encode())


def without(model: dict, name: str) -> dict:
    vocab = [entry for entry in model["vocab"] if entry != name]
    return model | {
        "vocab": {entry: i for i, entry in enumerate(vocab)},
        "merges": [pair for pair in model["merges"] if name not in (*pair, "".join(pair))],
    }


def changed(backend: Backend, change) -> str:
    return json.dumps(change(json.loads(backend.to_str())))


def part(backend: Backend, **parts: object) -> str:
    return changed(backend, lambda spec: spec | parts)


def in_model(backend: Backend, **parts: object) -> str:
    return changed(backend, lambda spec: spec | {"model": spec["model"] | parts})


def test_tokenizer_file_is_loaded_by_path(tmp_path):
    gpt2().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert (
            train_tokenizer(str(path), iter(["the text"])).decode(
                train_tokenizer(str(path), []).encode("the text")
            )
            == "the text"
        )
    with pytest.raises(UserError, match=r"no tokenizer 'bpee'.*\n.*mean 'bpe'"):
        train_tokenizer("bpee", [])
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(UserError, match=r"notes\.json: This is not a tokenizer\.json"):
        train_tokenizer(str(tmp_path / "notes.json"), [])


@pytest.mark.parametrize(
    "text", ["", "\0", "[]", "{}", '{"model": {}}', TOKENIZERS[2].to_json()[:-1]]
)
def test_invalid_tokenizer_json_is_an_error(text):
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        Tokenizer.from_json(text)


def with_pre_tokenizers(backend: Backend, *steps: dict) -> str:
    return part(backend, pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})


def split_step(pattern: dict, behavior: str) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def gpt2_model() -> dict:
    return json.loads(gpt2().to_str())["model"]


BYTE_LEVEL_STEP = json.loads(gpt2().to_str())["pre_tokenizer"]
ONE_BYTE = models.BPE({"a": 0, BYTES[0]: 1}, [], byte_fallback=True)
LOSSY = {
    "another model": (
        lambda: Backend(models.WordLevel({"a": 0}, unk_token="a")).to_str(),
        "its model is WordLevel",
    ),
    "no bytes": (
        lambda: Backend(models.BPE({"a": 0, EOT: 1}, [])).to_str(),
        "not byte-level, and it lacks byte_fallback",
    ),
    "some bytes": (
        lambda: Backend(ONE_BYTE).to_str(),
        "lacks 255 of the tokens <0x00> to <0xFF>",
    ),
    "bytes without fallback": (
        lambda: llama(byte_fallback=False).to_str(),
        "lacks byte_fallback",
    ),
    "a byte-level character": (
        lambda: changed(gpt2(), lambda spec: spec | {"model": without(spec["model"], "ÿ")}),
        "1 of the 256 bytes .* 0xFF",
    ),
    "byte-level without its decoder": (
        lambda: part(gpt2(), decoder=None),
        "no ByteLevel decoder",
    ),
    "fallback without its decoder": (
        lambda: part(llama(), decoder=None),
        "no ByteFallback decoder",
    ),
    "lower case": (
        lambda: part(gpt2(), normalizer={"type": "Lowercase"}),
        "Lowercase rewrites the text.*\n.*null",
    ),
    "NFC": (
        lambda: part(gpt2(), normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        "NFC rewrites the text",
    ),
    "NFKC": (
        lambda: part(llama(), normalizer={"type": "NFKC"}),
        "NFKC rewrites the text",
    ),
    "spaces dropped": (
        lambda: part(llama(), pre_tokenizer={"type": "Whitespace"}, normalizer=None),
        "do more than split",
    ),
    "spaces removed": (
        lambda: with_pre_tokenizers(
            gpt2(), split_step({"String": " "}, "Removed"), BYTE_LEVEL_STEP
        ),
        "do more than split",
    ),
    "bytes of bytes": (
        lambda: with_pre_tokenizers(gpt2(), BYTE_LEVEL_STEP, BYTE_LEVEL_STEP),
        "do more than split the text and map it to bytes",
    ),
    "words of ▁": (
        lambda: part(llama(), pre_tokenizer=split_step({"Regex": "▁+"}, "Isolated")),
        "split at other characters than spaces",
    ),
    "dropout": (lambda: in_model(gpt2(), dropout=0.1), "dropout"),
    "ends of words": (lambda: in_model(gpt2(), end_of_word_suffix="s"), "suffix"),
    "ids with a gap": (
        lambda: in_model(gpt2(), vocab=gpt2_model()["vocab"] | {"gap": 999}),
        "the ids of its .* tokens are not 0 to",
    ),
    "space and ▁": (
        lambda: in_model(llama(), vocab=llama().get_vocab() | {" ": llama().get_vocab_size()}),
        "differ only in ▁ and a space",
    ),
}


@pytest.mark.parametrize("what", LOSSY)
def test_lossy_tokenizer_error_has_the_reason(what):
    make, message = LOSSY[what]
    with pytest.raises(UserError, match=message):
        Tokenizer.from_json(make())


def test_tokenizer_of_an_earlier_version_loads():
    old = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(["a", "b", *BYTES, EOT])},
            "merges": [],
        },
    }
    assert Tokenizer.from_json(json.dumps(old)).encode("abc") == [0, 1, 2 + ord("c")]


def test_negative_token_is_an_error(tokenizer):
    with pytest.raises((UserError, IndexError)):
        tokenizer.decode([-1])
