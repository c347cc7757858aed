"""Text to numbers and back, exactly.

In: text. Out: token ids; and from ids the same text again, whatever it was. A tokenizer is one `tokenizer.json` in the
format of Hugging Face `tokenizers`, which that library and transformers' `AutoTokenizer` read too.

`char`: each character of the training text is one token; any other character is spelled by its UTF-8 bytes, for which
there are 256 more tokens. The last token ends a document; no text can contain it, because it is an ordinary vocabulary
entry longer than a character and there are no merges that could reach it.
"""

from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import decoders, models

from nanogpt.errors import UserError

END = "<|end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CODE_POINTS = 0x110000


class Tokenizer:
    """A vocabulary with its two directions, around a `tokenizers.Tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        end, first_byte = backend.token_to_id(END), backend.token_to_id(BYTES[0])
        assert end is not None, "the vocabulary has a token that ends a document"
        assert first_byte is not None, "the vocabulary has a token for each byte"
        self.end, self._first_byte = end, first_byte

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Read what `to_json` wrote. Errors: `UserError` for anything else."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"This is not a tokenizer.json: {error}.") from error
        letters = sorted(name for name in backend.get_vocab() if len(name) == 1)
        if backend.to_str() != _of_letters(letters).to_str():
            raise UserError("This tokenizer.json was not made by nanogpt: its tokens are not characters, then the 256 bytes, then the end of a document.")
        return cls(backend)

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self.backend.to_str()

    def encode(self, text: str) -> list[int]:
        """The token ids of any text. Errors: `UserError` for an unpaired surrogate, which is not valid Unicode."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` for bulk: (T,) uint32, by one table look-up per character, some thirty times as fast as `tokenizers`."""
        try:
            points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        except UnicodeEncodeError as error:
            raise UserError(f"Character {error.start} of the text, {text[error.start]!r}, is an unpaired surrogate, which is not valid Unicode.") from error
        ids = self._table[points]
        unknown = ids == self.vocab_size
        if not unknown.any():
            return ids
        spelled = np.array(list("".join(text[i] for i in np.flatnonzero(unknown)).encode()), np.uint32) + self._first_byte
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
        spelled = {name: bytes([byte]) for byte, name in enumerate(BYTES)}
        names = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
        return [spelled.get(name) or name.encode() for name, _ in names]

    def unknown(self, text: str) -> list[tuple[int, str]]:
        """The characters of `text` that have no token of their own, each with its position."""
        table = self._table
        return [(i, letter) for i, letter in enumerate(text) if table[ord(letter)] == self.vocab_size]

    @cached_property
    def _table(self) -> np.ndarray:
        """(CODE_POINTS,) uint32: the token of each character, or `vocab_size` where it has none."""
        table = np.full(CODE_POINTS, self.vocab_size, np.uint32)
        for name, token in self.backend.get_vocab().items():
            if len(name) == 1:
                table[ord(name)] = token
        return table


def _char(chunks: Iterable[str]) -> tokenizers.Tokenizer:
    """Every character that occurs, in code point order; then the bytes; then the end."""
    seen = np.zeros(CODE_POINTS, bool)
    for chunk in chunks:
        seen[np.frombuffer(chunk.encode("utf-32-le"), np.uint32)] = True
    return _of_letters([chr(point) for point in np.flatnonzero(seen)])


def _of_letters(letters: list[str]) -> tokenizers.Tokenizer:
    vocabulary = letters + BYTES + [END]
    model = models.BPE(vocab={name: i for i, name in enumerate(vocabulary)}, merges=[], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


KINDS: dict[str, Callable[[Iterable[str]], tokenizers.Tokenizer]] = {"char": _char}


def train_tokenizer(kind: str, chunks: Iterable[str]) -> Tokenizer:
    """Make the tokenizer of a text, given in pieces that are read once; `kind` is a row of `KINDS`."""
    return Tokenizer(KINDS[kind](chunks))
