"""What it takes to prepare a text: tokens, shards, room on the disk, hours.

In: the size of a text, the kind of its tokens, and how many machines share the work. Out: a `Corpus`.
"""

import math
from dataclasses import dataclass

from nanogpt.sizes import token_dtype, unit_bytes

# What `benchmarks/prepare.py rates` measured on the standard library's source, a core of the README's machine at a time: bytes of text a second that a process
# reads to know it, and again to choose its tokens by, and that a core encodes; and bytes of text in a token. Prose in other scripts is another matter.
READING = 380e6
CHOOSING = {"char": 185e6, "byte": math.inf, "word": READING, "bpe": READING}
CHOOSING_SECONDS = {"word": 35.0, "bpe": 35.0}  # for the sample that words and parts of words are chosen by
ENCODING = {"char": 80e6, "byte": 90e6, "word": 2.6e6, "bpe": 2.6e6}
BYTES_PER_TOKEN = {"char": 1.0, "byte": 1.0, "word": 1.7}
BPE = ((1024, 2.6), (32_768, 4.1))  # the same by the size of the vocabulary
CORES = 8  # of each machine, which encode at a time: processes that prepare use no more


@dataclass(frozen=True)
class Corpus:
    """What comes of a text when it is prepared. Sizes are in bytes; hours are those of each machine, which first reads all of the text, and then
    encodes its part."""

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
        reading_hours=(text_bytes * (1 / READING + 1 / CHOOSING[kind]) + CHOOSING_SECONDS.get(kind, 0.0)) / 3600,
        encoding_hours=-(-shards // machines) / shards * text_bytes / (CORES * ENCODING[kind]) / 3600,
    )


def _bpe_bytes(vocab_size: int) -> float:
    """Bytes of text in a token of bpe, which grow by about as much with each doubling of the vocabulary."""
    (small, few), (large, many) = BPE
    return few + (many - few) * math.log2(vocab_size / small) / math.log2(large / small)
