"""Text to numbers and back, exactly.

In: text. Out: token ids; and from ids the same text again, whatever it was. A tokenizer is one `tokenizer.json` in the
format of Hugging Face `tokenizers`, which that library and transformers' `AutoTokenizer` read too.

`kinds` makes a tokenizer of a text, `exact` sees to it that one of another program loses nothing, `cuts` divides the work.
The token that ends a document is an ordinary entry of the vocabulary that no text can reach.
"""

import difflib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders

from nanogpt.errors import UserError
from nanogpt.tokenizer.cuts import barrier, batches
from nanogpt.tokenizer.exact import BYTES, LETTERS, end_of, exact
from nanogpt.tokenizer.kinds import CODE_POINTS, KINDS, SIZED


class Tokenizer:
    """A vocabulary with its two directions, around a `tokenizers.Tokenizer` in one of the forms of `exact`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        vocab = backend.get_vocab()
        self.vocab_size = len(vocab)
        end = end_of(vocab)
        assert end is not None, "the vocabulary has a token that ends a document"
        self.end = vocab[end]
        self._vocab, self._byte_level = vocab, isinstance(backend.decoder, decoders.ByteLevel)
        apart = {end} if self._byte_level else {end, *BYTES}
        self._single = all(len(name) == 1 or name in apart for name in vocab)  # each character, or byte, is a token

    @property
    def kind(self) -> str:
        """The row of `KINDS` that it is one of, or is like: only bpe merges, only word and bpe have tokens of several characters."""
        if self._single:
            return "byte" if self._byte_level else "char"
        return "bpe" if json.loads(self.to_json())["model"]["merges"] else "word"

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read the content of a tokenizer.json; what would lose something of a text is taken off. Errors: `UserError` for what cannot be made exact."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"This is not a tokenizer.json: {error}.") from error
        spec = json.loads(backend.to_str())
        if (lossless := exact(spec)) != spec:
            backend = tokenizers.Tokenizer.from_str(json.dumps(lossless))
        made = cls(backend)
        if made.end in made.encode(made.token_bytes[made.end].decode()):
            raise UserError("This tokenizer.json cannot be used: a text may contain the token that ends a document.", "Try --tokenizer bpe, which makes one.")
        return made

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self.backend.to_str()

    def encode(self, text: str) -> list[int]:
        """The token ids of any text. Errors: `UserError` for an unpaired surrogate, which is not valid Unicode."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` for bulk: (T,) uint32."""
        if self._single:
            return self._look_up(text)
        return np.concatenate([np.empty(0, np.uint32), *map(self._encode, batches([_valid(text)], self._barrier))])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of the text that the chunks make up together, in pieces (T,) uint32: the same ids as of the whole, however it is cut.

        Memory does not grow with the text. Where it takes work, all processors do it, while the caller writes down what is done.
        """
        if self._single:
            yield from map(self._look_up, chunks)
            return
        with ThreadPoolExecutor(1) as worker:
            at_work = None
            for pieces in batches(map(_valid, chunks), self._barrier):
                following = worker.submit(self._encode, pieces)
                if at_work is not None:
                    yield at_work.result()
                at_work = following
            if at_work is not None:
                yield at_work.result()

    def _encode(self, pieces: list[str]) -> np.ndarray:
        encodings = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        return np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.uint32)

    def _look_up(self, text: str) -> np.ndarray:
        """The tokens where each character, or byte, has its own: by one table look-up each, some thirty times as fast as `tokenizers`."""
        if self._byte_level:
            return self._table[np.frombuffer(_utf(text, "utf-8"), np.uint8)]
        points = np.frombuffer(_utf(text, "utf-32-le"), np.uint32)
        ids = self._table[points]
        unknown = ids == self.vocab_size
        if not unknown.any():
            return ids
        first_byte = np.array([self._vocab[name] for name in BYTES], np.uint32)
        spelled = first_byte[list("".join(text[i] for i in np.flatnonzero(unknown)).encode())]
        lengths = np.where(unknown, 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF), 1)  # bytes in UTF-8
        ids = np.repeat(ids, lengths)
        ids[np.repeat(unknown, lengths)] = spelled
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens. Bytes that spell no character come out as U+FFFD. Errors: `UserError` for what is no token."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise UserError(f"There is no token {wrong[0]}: the vocabulary goes from 0 to {self.vocab_size - 1}.")
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each token stands for, by id: what a stream puts together and `decode` joins."""
        names = sorted(self._vocab, key=self._vocab.__getitem__)
        if self._byte_level:
            value = {letter: byte for byte, letter in enumerate(LETTERS)}
            return [bytes(value[letter] for letter in name) if value.keys() >= set(name) else name.encode() for name in names]
        spelled = {name: bytes([byte]) for byte, name in enumerate(BYTES)}
        return [spelled.get(name) or name.encode() for name in names]

    def unknown(self, text: str) -> list[tuple[int, str]]:
        """The characters of `text` without a token of their own, each with its position, where every character has one that occurs; else none."""
        if not self._single or self._byte_level:
            return []
        table = self._table
        return [(i, letter) for i, letter in enumerate(text) if table[ord(letter)] == self.vocab_size]

    @cached_property
    def _table(self) -> np.ndarray:
        """uint32: the token of each byte, (256,), or of each character, (CODE_POINTS,), with `vocab_size` where it has none."""
        if self._byte_level:
            return np.array([self._vocab[letter] for letter in LETTERS], np.uint32)
        table = np.full(CODE_POINTS, self.vocab_size, np.uint32)
        for name, token in self._vocab.items():
            if len(name) == 1:
                table[ord(name)] = token
        return table

    @cached_property
    def _barrier(self):  # type: ignore[no-untyped-def]
        return barrier(token.decode("utf-8", errors="replace") for token in self.token_bytes)


def train_tokenizer(kind: str, chunks: Iterable[str], vocab_size: int | None = None, n_bytes: int | None = None) -> Tokenizer:
    """Make the tokenizer of a text, given in pieces that are read once, or not at all where it does not depend on them; `kind` is a row of `KINDS`, or the
    path of a tokenizer.json.

    `vocab_size` is for word and bpe, and otherwise suggested by the size of the text (`kinds.suggested_size`); `n_bytes` is that size, as far as it is known
    beforehand. Of a huge text a sample is taken, which a `Notice` says.
    Errors: `UserError` for a kind that there is not, a size that does not go with the kind or the text, and a file that is missing or cannot be made exact.
    """
    if vocab_size is not None and kind not in SIZED:
        raise UserError(f"--vocab-size {vocab_size} does not go with --tokenizer {kind}, whose vocabulary has the size that it has.",
                        f"Leave it out, or use --tokenizer {' or --tokenizer '.join(SIZED)}.")  # fmt: skip
    if kind in KINDS:
        return Tokenizer(KINDS[kind](chunks, vocab_size, n_bytes))
    return _from_file(kind)


def _from_file(name: str) -> Tokenizer:
    path = Path(name).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        near = difflib.get_close_matches(name, KINDS, n=1)
        fix = f"Did you mean {near[0]!r}? " if near else ""
        raise UserError(f"There is no tokenizer {name!r}, neither a kind nor a file ({path.absolute()}).", f"{fix}Kinds: {', '.join(KINDS)}.")
    try:
        return Tokenizer.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path.absolute()} cannot be read: {error}.") from error
    except UserError as error:
        raise UserError(f"{path.absolute()}: {error}") from error


def _utf(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        raise UserError(f"Character {error.start} of the text, {text[error.start]!r}, is an unpaired surrogate, which is not valid Unicode.") from error


def _valid(text: str) -> str:
    _utf(text, "utf-8")
    return text
