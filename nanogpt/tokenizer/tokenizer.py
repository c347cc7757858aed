"""The tokenizer: any text to token ids and exactly back.

A tokenizer is one `tokenizer.json` in the format of Hugging Face `tokenizers`, which that library
and transformers' `AutoTokenizer` read, too. `trainers` trains one on a text, `lossless` converts
those of other programs, and `chunking` divides a text for parallel encoding.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders

from nanogpt.errors import UserError
from nanogpt.tokenizer.chunking import iter_batches, safe_split_pattern
from nanogpt.tokenizer.lossless import BYTE_TO_UNICODE, BYTES, find_eot, make_lossless
from nanogpt.tokenizer.trainers import NUM_CODE_POINTS, SIZED_KINDS, TRAINERS


class Tokenizer:
    """A vocabulary, with lossless encoding and decoding.

    Every text has tokens, and `decode(encode(text)) == text`. The token that ends a document is an
    ordinary entry of the vocabulary that no text produces.

    Args:
        backend: A lossless tokenizer of the `tokenizers` library; see `from_json` for any other.

    Attributes:
        backend: That tokenizer.
        vocab_size: Number of tokens, V; ids are 0 to V - 1.
        eot_id: Id of the token that ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        vocab = backend.get_vocab()
        eot = find_eot(vocab)
        assert eot is not None, "the vocabulary has a token that ends a document"
        self.backend = backend
        self.vocab_size = len(vocab)
        self.eot_id = vocab[eot]
        self._vocab = vocab
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        special = {eot} if self._is_byte_level else {eot, *BYTES}
        # True if each character, or each byte, is one token.
        self._one_token_per_symbol = all(len(name) == 1 or name in special for name in vocab)

    @property
    def kind(self) -> str:
        """Return the kind of tokenizer: "char", "byte", "word" or "bpe".

        A tokenizer of another program has the kind that it resembles: only bpe has merges, and only
        bpe and word have tokens of several characters.
        """
        if self._one_token_per_symbol:
            return "byte" if self._is_byte_level else "char"
        return "bpe" if json.loads(self.to_json())["model"]["merges"] else "word"

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Load a tokenizer from the content of a `tokenizer.json`.

        What changes a text, such as a space before the first word, is removed.

        Args:
            text: The content of the file, of this or of another program.

        Raises:
            UserError: This is not a tokenizer.json, or it cannot encode every text exactly.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"This is not a tokenizer.json: {error}.") from error
        spec = json.loads(backend.to_str())
        lossless = make_lossless(spec)
        if lossless != spec:
            backend = tokenizers.Tokenizer.from_str(json.dumps(lossless))
        tokenizer = cls(backend)
        eot_text = tokenizer.token_bytes[tokenizer.eot_id].decode()
        if tokenizer.eot_id in tokenizer.encode(eot_text):
            raise UserError(
                f"This tokenizer.json cannot be used: a text that contains {eot_text!r} produces "
                "the token that ends a document.",
                {"tokenizer": "bpe"},
            )
        return tokenizer

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return self.backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of any text.

        Raises:
            UserError: The text has an unpaired surrogate, which is not valid Unicode.
        """
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Return the token ids of any text as an array, (T,) uint32.

        Raises:
            UserError: The text has an unpaired surrogate, which is not valid Unicode.
        """
        if self._one_token_per_symbol:
            return self._encode_by_table(text)
        batches = iter_batches([_valid(text)], self._split_pattern)
        return np.concatenate([np.empty(0, np.uint32), *map(self._encode_batch, batches)])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode a text that comes in chunks, in bounded memory.

        The ids are those of the whole text, wherever it is divided. All processors encode, while
        the caller consumes the previous array.

        Args:
            chunks: The text, divided anywhere.

        Yields:
            Token ids, (T,) uint32.

        Raises:
            UserError: The text has an unpaired surrogate, which is not valid Unicode.
        """
        if self._one_token_per_symbol:
            yield from map(self._encode_by_table, chunks)
            return
        with ThreadPoolExecutor(1) as worker:
            pending = None
            for batch in iter_batches(map(_valid, chunks), self._split_pattern):
                future = worker.submit(self._encode_batch, batch)
                if pending is not None:
                    yield pending.result()
                pending = future
            if pending is not None:
                yield pending.result()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some tokens.

        Args:
            ids: Token ids, from 0 to `vocab_size - 1`.

        Returns:
            The text, with U+FFFD for bytes that are not valid UTF-8.

        Raises:
            UserError: An id is out of range.
        """
        ids = list(ids)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise UserError(f"Token id out of range: {token} (limit {self.vocab_size - 1}).")
        return b"".join(self.token_bytes[token] for token in ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Return the UTF-8 bytes of each token, by id; a token may hold a part of a character."""
        names = sorted(self._vocab, key=self._vocab.__getitem__)
        if self._is_byte_level:
            value = {char: byte for byte, char in enumerate(BYTE_TO_UNICODE)}
            return [
                bytes(value[char] for char in name) if value.keys() >= set(name) else name.encode()
                for name in names
            ]
        byte_values = {name: bytes([byte]) for byte, name in enumerate(BYTES)}
        return [byte_values.get(name) or name.encode() for name in names]

    def unknown_chars(self, text: str) -> list[tuple[int, str]]:
        """Return the characters of a text that have no token of their own, with their positions.

        The list is empty unless the kind is "char".
        """
        if not self._one_token_per_symbol or self._is_byte_level:
            return []
        table = self._lookup_table
        return [(i, char) for i, char in enumerate(text) if table[ord(char)] == self.vocab_size]

    def _encode_batch(self, chunks: list[str]) -> np.ndarray:
        encodings = self.backend.encode_batch_fast(chunks, add_special_tokens=False)
        return np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.uint32)

    def _encode_by_table(self, text: str) -> np.ndarray:
        """Encode with one table lookup per symbol, 30 times as fast as the library."""
        if self._is_byte_level:
            return self._lookup_table[np.frombuffer(_encode_text(text, "utf-8"), np.uint8)]
        points = np.frombuffer(_encode_text(text, "utf-32-le"), np.uint32)
        ids = self._lookup_table[points]
        is_unknown = ids == self.vocab_size
        if not is_unknown.any():
            return ids
        unknown_text = "".join(text[i] for i in np.flatnonzero(is_unknown))
        byte_ids = np.array([self._vocab[name] for name in BYTES], np.uint32)
        utf8_lengths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
        num_ids = np.where(is_unknown, utf8_lengths, 1)
        ids = np.repeat(ids, num_ids)
        ids[np.repeat(is_unknown, num_ids)] = byte_ids[list(unknown_text.encode())]
        return ids

    @cached_property
    def _lookup_table(self) -> np.ndarray:
        """Return the token of each byte or code point, uint32; `vocab_size` if it has none."""
        if self._is_byte_level:
            return np.array([self._vocab[char] for char in BYTE_TO_UNICODE], np.uint32)
        table = np.full(NUM_CODE_POINTS, self.vocab_size, np.uint32)
        for name, token in self._vocab.items():
            if len(name) == 1:
                table[ord(name)] = token
        return table

    @cached_property
    def _split_pattern(self) -> re.Pattern[str]:
        token_texts = (token.decode("utf-8", errors="replace") for token in self.token_bytes)
        return safe_split_pattern(token_texts)


def train_tokenizer(
    kind: str, chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None
) -> Tokenizer:
    """Train a tokenizer on a text, or load one from a file.

    A notice says if only a sample of a large text is used.

    Args:
        kind: "char", "byte", "word", "bpe", or the path of a tokenizer.json or its folder.
        chunks: The text, divided anywhere; read once, or not at all for a kind that does not
            depend on it.
        vocab_size: The number of tokens, for word and bpe; by default
            `trainers.default_vocab_size` of the text's size.
        n_bytes: The size of the text, if known.

    Raises:
        UserError: There is no such kind or file, the file cannot be made lossless, or the
            vocabulary size does not suit the kind or the text.
    """
    if vocab_size is not None and kind not in SIZED_KINDS:
        raise UserError(
            f"vocab_size = {vocab_size} does not go with tokenizer = {kind!r}, which has a fixed "
            "vocabulary.",
            f"Leave it out, or set tokenizer to {' or '.join(SIZED_KINDS)}.",
        )
    if kind in TRAINERS:
        return Tokenizer(TRAINERS[kind](chunks, vocab_size, n_bytes))
    return _load(kind)


def _load(name: str) -> Tokenizer:
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        similar = difflib.get_close_matches(name, TRAINERS, n=1)
        hint = f"Did you mean {similar[0]!r}? " if similar else ""
        raise UserError(
            f"There is no tokenizer {name!r}: it is neither a kind nor a file ({path.absolute()}).",
            f"{hint}Kinds: {', '.join(TRAINERS)}.",
        )
    try:
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.absolute()} cannot be read: {error}.") from error
    except UserError as error:
        raise UserError(f"{path.absolute()}: {error.what}", error.fix) from error


def _encode_text(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UserError(
            f"Character {error.start} of the text, {text[error.start]!r}, is an unpaired "
            "surrogate, which is not valid Unicode."
        ) from error


def _valid(text: str) -> str:
    _encode_text(text, "utf-8")
    return text
