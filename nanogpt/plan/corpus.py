"""What it takes to prepare a text: tokens, shards, room on the disk, hours.

In: the size of a text, the kind of its tokens, and how many machines share the work. Out: a `Corpus`.
"""

import math
from dataclasses import dataclass

from nanogpt.sizes import token_dtype, unit_bytes

# Measured by `benchmarks/prepare.py` on the two cores of the README's machine: bytes of text a second that a process reads to know it, reads again to choose
# its tokens by (none for bytes), and encodes; and bytes of text in a token.
READING = 1e8
CHOOSING = {"char": 1e8, "byte": math.inf, "word": 1e8, "bpe": 1e8}
ENCODING = {"char": 1e7, "byte": 1e7, "word": 1e7, "bpe": 5e6}
BYTES_PER_TOKEN = {"char": 1.0, "byte": 1.0, "word": 3.0}
BPE = ((1024, 2.4), (32_768, 4.0))  # the same by the size of the vocabulary


@dataclass(frozen=True)
class Corpus:
    """What comes of a text when it is prepared. Sizes are in bytes; `hours` are those of each machine, which first reads all of the text."""

    text_bytes: int
    tokens: int
    bytes_per_token: float
    shards: int
    shard_bytes: int
    disk_bytes: int
    machines: int
    reading_hours: float
    encoding_hours: float

    @property
    def hours(self) -> float:
        """From the first machine's beginning to the last one's end."""
        return self.reading_hours + self.encoding_hours


def corpus_of(text_bytes: int, tokenizer: str, vocab_size: int, machines: int = 1) -> Corpus:
    """The corpus of a text of so many bytes; of a tokenizer that is another program's, as if it were bpe of the size."""
    kind = tokenizer if tokenizer in ENCODING else "bpe"
    per_token = BYTES_PER_TOKEN.get(kind) or _bpe_bytes(vocab_size)
    tokens = max(1, round(text_bytes / per_token))
    shards = -(-text_bytes // unit_bytes(text_bytes))
    size = token_dtype(vocab_size).itemsize
    return Corpus(
        text_bytes=text_bytes,
        tokens=tokens,
        bytes_per_token=per_token,
        shards=shards,
        shard_bytes=-(-tokens // shards) * size,
        disk_bytes=tokens * size,
        machines=machines,
        reading_hours=text_bytes * (1 / READING + 1 / CHOOSING[kind]) / 3600,
        encoding_hours=-(-shards // machines) / shards * text_bytes / ENCODING[kind] / 3600,
    )


def _bpe_bytes(vocab_size: int) -> float:
    """Bytes of text in a token of bpe, which grow by about as much with each doubling of the vocabulary."""
    (small, few), (large, many) = BPE
    return few + (many - few) * math.log2(vocab_size / small) / math.log2(large / small)
