"""Estimate what preparing a corpus takes: tokens, shards, disk space and hours."""

import math
from dataclasses import dataclass

from nanogpt.sizes import shard_bytes, token_dtype

# Rates in bytes of text per second, measured by `benchmarks/prepare.py rates` on the standard
# library's source with the CPU of the README. Other scripts and languages differ.
# A process reads the text once to scan it, and once to choose a vocabulary.
READ_RATE = 380e6
VOCAB_RATE = {"char": 185e6, "byte": math.inf, "word": READ_RATE, "bpe": READ_RATE}
# Seconds to train a tokenizer on its sample of the text.
TOKENIZER_TRAINING_SECONDS = {"word": 35.0, "bpe": 35.0}
# A rate per core.
ENCODE_RATE = {"char": 80e6, "byte": 90e6, "word": 2.6e6, "bpe": 2.6e6}
BYTES_PER_TOKEN = {"char": 1.0, "byte": 1.0, "word": 1.7}
# Pairs of a vocabulary size and the bytes per token.
BPE_BYTES_PER_TOKEN = ((1024, 2.6), (32_768, 4.1))
# Preparation encodes with at most this many processes on a machine.
CORES_PER_MACHINE = 8


@dataclass(frozen=True)
class CorpusCost:
    """The cost of preparing a corpus.

    Each machine first reads the full text, and then encodes its part of the shards.

    Attributes:
        text_bytes: Size of the text.
        tokens: Number of tokens.
        bytes_per_token: Bytes of text per token.
        shards: Number of shards.
        shard_bytes: Bytes of a shard of tokens.
        disk_bytes: Bytes of all shards.
        machines: Number of machines that share the work.
        reading_hours: Hours that each machine reads.
        encoding_hours: Hours that each machine encodes.
    """

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
        """Hours from start to end."""
        return self.reading_hours + self.encoding_hours


def estimate_corpus(
    text_bytes: int, tokenizer: str, vocab_size: int, machines: int = 1
) -> CorpusCost:
    """Estimate what preparing a corpus takes.

    Args:
        text_bytes: Size of the text.
        tokenizer: Kind of the tokenizer; a path counts as bpe.
        vocab_size: Number of different tokens.
        machines: Number of machines that share the work.
    """
    kind = tokenizer if tokenizer in ENCODE_RATE else "bpe"
    bytes_per_token = BYTES_PER_TOKEN.get(kind) or _bpe_bytes_per_token(vocab_size)
    tokens = max(1, round(text_bytes / bytes_per_token))
    shards = -(-text_bytes // shard_bytes(text_bytes))
    token_bytes = token_dtype(vocab_size).itemsize
    reading_seconds = text_bytes * (1 / READ_RATE + 1 / VOCAB_RATE[kind])
    reading_seconds += TOKENIZER_TRAINING_SECONDS.get(kind, 0.0)
    max_fraction = -(-shards // machines) / shards
    encoding_seconds = max_fraction * text_bytes / (CORES_PER_MACHINE * ENCODE_RATE[kind])
    return CorpusCost(
        text_bytes=text_bytes,
        tokens=tokens,
        bytes_per_token=bytes_per_token,
        shards=shards,
        shard_bytes=-(-tokens // shards) * token_bytes,
        disk_bytes=tokens * token_bytes,
        machines=machines,
        reading_hours=reading_seconds / 3600,
        encoding_hours=encoding_seconds / 3600,
    )


def _bpe_bytes_per_token(vocab_size: int) -> float:
    """Interpolate the bytes per token, which grow linearly with log2 of the vocabulary size."""
    (small_vocab, small_bytes), (large_vocab, large_bytes) = BPE_BYTES_PER_TOKEN
    doublings = math.log2(vocab_size / small_vocab) / math.log2(large_vocab / small_vocab)
    return small_bytes + (large_bytes - small_bytes) * doublings
