"""Encodings are detected and decoded exactly, and errors name the byte and a likely encoding."""

import codecs
import io
from contextlib import contextmanager

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanogpt.data import formats
from nanogpt.data.encoding import BOMS, SIGNATURES
from nanogpt.data.formats import Source
from nanogpt.errors import UserError

FRENCH = (
    "Longtemps, je me suis couché de bonne heure. "
    "Parfois, à peine ma bougie éteinte, mes yeux se fermaient. "
)
RUSSIAN = (
    "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "
)
SAMPLES = {
    "cp1252": FRENCH,
    "cp1251": RUSSIAN,
    "shift_jis": (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
        "何でも薄暗いじめじめした所で泣いていた。"
    ),
    "gb18030": (
        "人类的历史是一部不断发展的历史。"
        "我们在学习语言模型的时候，需要大量的文本数据，然后把它们变成数字。"
    ),
    "euc_kr": "나는 고양이다. 이름은 아직 없다. 어디서 태어났는지 도무지 짐작이 가지 않는다. ",
}
LINES = "a\nb\r\nc\rd\x0be\x0cf\x1cg\x85h\u2028i\u2029j\n\n"


def read(content: bytes, encoding: str | None = None) -> str:
    return "".join(Source("text", lambda: io.BytesIO(content), encoding).iter_text())


def error_message(content: bytes, encoding: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(content, encoding)
    return str(caught.value)


@contextmanager
def read_in_blocks_of(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", size)
        yield


@pytest.fixture
def small_reads():
    with read_in_blocks_of(256):
        yield


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_8_and_utf_16_decode_alike_and_keep_line_ends(bom):
    encoding = BOMS.get(bom, "utf-8")
    assert read(bom + (LINES + "Grüße 日本 👩‍👩‍👧").encode(encoding)) == LINES + "Grüße 日本 👩‍👩‍👧"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-16-le", "utf-16-be", "utf-16", "utf-8-sig", "utf-32", "cp1252", "latin-1"],
)
def test_given_encoding_is_used_and_its_bom_removed(encoding):
    assert read(FRENCH.encode(encoding), encoding) == FRENCH
    if bom := {name: bom for bom, name in BOMS.items()}.get(encoding):
        assert read(bom + FRENCH.encode(encoding), encoding) == FRENCH


@pytest.mark.parametrize("encoding", ["UTF-8", "utf8", "UTF-16LE"])
def test_bom_is_removed_for_every_spelling_of_the_encoding(encoding):
    bom = codecs.BOM_UTF8 if "8" in encoding else codecs.BOM_UTF16_LE
    assert read(bom + "abc".encode(encoding), encoding) == "abc"


@pytest.mark.parametrize("encoding", ["utf-9", "", "french"])
def test_unknown_encoding_is_an_error(encoding):
    assert f"Python has no text encoding {encoding!r}.\nSet the encoding to utf-8" in error_message(
        b"abc", encoding
    )


@pytest.mark.parametrize("encoding", ["base64", "rot13", "undefined", "a\0b"])
def test_codec_that_is_not_for_text_is_an_error(encoding):
    assert repr(encoding) in error_message(b"abc", encoding)


@given(
    st.text(),
    st.integers(3, 9),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "utf-7"]),
)
def test_decoding_does_not_depend_on_block_size(text, size, encoding):
    with read_in_blocks_of(size):
        assert read(text.encode(encoding), encoding) == text.removeprefix(
            "\ufeff" if encoding == "utf-8" else ""
        )


@given(st.text(), st.integers(4, 9), st.sampled_from(sorted(BOMS)))
def test_decoding_after_a_bom_does_not_depend_on_block_size(text, size, bom):
    assume(
        not (bom + text.encode(BOMS[bom])).startswith(b"\xff\xfe\0\0") or BOMS[bom] == "utf-32-le"
    )  # UTF-16 that begins with a zero looks like UTF-32
    with read_in_blocks_of(size):
        assert read(bom + text.encode(BOMS[bom])) == text


def python_result(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return (
            f"text is not UTF-8: byte 0x{content[error.start]:02x} "
            f"at offset {error.start}, line {line} ({error.reason})."
        )


def nanogpt_result(content: bytes) -> str:
    try:
        return read(content)
    except UserError as error:
        return str(error).partition("\n")[0]


@given(st.binary(max_size=40), st.integers(1, 9))
def test_utf_8_decodes_and_fails_like_python(content, size):
    content = b"x" * size + content
    with read_in_blocks_of(size):
        assert nanogpt_result(content) == python_result(content)


@pytest.mark.parametrize("before", [0, 1, 200, 256, 2000])
@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "euc_kr"])
def test_decode_error_names_the_byte_line_and_likely_encoding(small_reads, encoding, before):
    content = b"\n" * before + (SAMPLES[encoding] * 4).encode(encoding)
    at = next(i for i, byte in enumerate(content) if byte > 0x7F)
    message = error_message(content)
    assert (
        f"text is not UTF-8: byte 0x{content[at]:02x} at offset {at:,}, line {before + 1:,} ("
        in message
    )
    assert message.endswith(f"Set encoding={encoding!r}.")
    assert read(content, encoding) == "\n" * before + SAMPLES[encoding] * 4


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (RUSSIAN, "cp1251"),
        (SAMPLES["gb18030"], "gb18030"),
        ("word—“quoted", "cp1252"),
        ("blåøjet", "cp1252"),
    ],
)
def test_likely_encoding_is_found_for_more_languages(text, encoding):
    assert error_message(text.encode(encoding)).endswith(f"Set encoding={encoding!r}.")


def test_truncated_utf_8_error_names_the_last_byte(small_reads):
    assert "byte 0xe2 at offset 1,001, line 2 (unexpected end of data)" in error_message(
        b"x" * 1000 + "\n€".encode()[:-1]
    )


def test_truncated_utf_8_suggests_no_other_encoding():
    assert "encoding=" not in error_message((FRENCH + "€").encode()[:-1])


def test_failed_encoding_is_not_suggested():
    assert "encoding='cp1252'" not in error_message(b"abc \x81", "cp1252")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_bom_is_recognized(encoding):
    assert error_message(FRENCH.encode(encoding)).endswith(
        f"It may be UTF-16 without a byte order mark.\nSet encoding={encoding!r}."
    )
    assert read(FRENCH.encode(encoding), encoding) == FRENCH


def test_russian_utf_16_without_bom_is_recognized():
    assert "encoding='utf-16-le'" in error_message(RUSSIAN.encode("utf-16-le"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_encoding_that_needs_a_bom_fails_without_one(encoding):
    error_message(FRENCH.encode(f"{encoding}-le"), encoding)


def test_utf_32_bom_is_not_taken_for_utf_16():
    assert read(FRENCH.encode("utf-32")) == FRENCH


def test_decode_error_counts_lines_in_characters():
    assert "line 1 (" in error_message(
        codecs.BOM_UTF16_LE + "\u010a".encode("utf-16-le") + b"\0\xd8a\0"
    )


@pytest.mark.parametrize("head", SIGNATURES)
def test_binary_formats_are_named(head):
    message = error_message(head + b"\0\1\2" * 100)
    kind, advice = SIGNATURES[head]
    assert message == f"text is {kind}, not plain text.\n{advice}"
    assert "encoding=" not in message


def test_zero_bytes_are_text_only_with_a_given_encoding():
    assert "text is a binary file (it has zero bytes), not plain text." in error_message(
        b"a\0b\1\2\3\4\5"
    )
    assert read(b"a\0b", "utf-8") == "a\0b"


def test_empty_file_is_an_empty_text():
    assert read(b"") == read(codecs.BOM_UTF8) == ""
