"""A batch is a pure function of seed, step and row, whatever slice of it is computed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data.batches import (
    IGNORE_INDEX,
    DocumentWindows,
    MemmapTokens,
    sample_batch,
    window_starts,
)
from nanogpt.sizes import token_dtype
from nanogpt.splitmix import random_bits

TOKENS = np.arange(1000, dtype=np.uint16)
MASK = 2**64 - 1
seeds, steps = st.integers(0, 2**31 - 1), st.integers(0, 10**9)


@given(seeds, steps, st.integers(1, 12), st.data())
def test_batch_rows_are_independent_of_the_slice(seed, step, rows, data):
    batch = sample_batch(TOKENS, seed, step, range(rows), rows, 16)
    boundaries = sorted(data.draw(st.sets(st.integers(1, rows))) | {0, rows})
    for start, stop in data.draw(st.permutations(list(pairwise(boundaries)))):
        part = sample_batch(TOKENS, seed, step, range(start, stop), rows, 16)
        for part_tensor, batch_tensor in zip(part, batch, strict=True):
            assert torch.equal(part_tensor, batch_tensor[start:stop])


@given(seeds, steps, st.integers(1, 999))
def test_batch_targets_are_the_next_tokens(seed, step, context_length):
    inputs, targets, dropout_seeds = sample_batch(TOKENS, seed, step, range(4), 4, context_length)
    assert inputs.shape == targets.shape == (4, context_length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert dropout_seeds.shape == (4,)
    assert dropout_seeds.dtype == torch.int32
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context_length))
    assert targets.max() < 1000


@given(seeds, steps)
def test_random_bits_differ_by_seed_and_counter(seed, step):
    bits = [
        random_bits(s, t, np.arange(50))
        for s, t in [(seed, step), (seed + 1, step), (seed, step + 1), (seed + 1, step + 1)]
    ]
    assert len(np.unique(np.concatenate(bits))) == 200


@given(seeds, st.integers(1, 40), st.integers(0, 1000), st.integers(0, 10**6), st.data())
def test_epoch_reads_every_window_once(seed, context_length, more, epoch, data):
    tokens = context_length + 1 + more
    count = max(1, (more + 1) // context_length)
    starts = window_starts(
        tokens, context_length, seed, np.arange(epoch * count, (epoch + 1) * count, dtype=np.uint64)
    ).astype(int)
    assert (np.diff(np.sort(starts)) == context_length).all()
    assert starts.min() >= 0
    assert starts.max() + context_length < tokens
    num_skipped = tokens - 1 - count * context_length
    assert num_skipped < 2 * context_length


@pytest.mark.parametrize(("tokens", "context_length"), [(2, 1), (9, 8), (10, 8), (20, 3)])
def test_every_window_offset_is_reached(tokens, context_length):
    starts = window_starts(tokens, context_length, 1, np.arange(2000, dtype=np.uint64))
    assert set(starts.tolist()) == set(range(tokens - context_length))


def test_epochs_differ_in_order_and_offset():
    count = (1000 - 10) // 10
    epochs = window_starts(1000, 10, 1, np.arange(50 * count, dtype=np.uint64)).reshape(50, count)
    assert len({int(epoch.min()) for epoch in epochs}) >= 9
    orders = np.array([np.argsort(epoch) for epoch in epochs])
    assert abs(np.corrcoef(orders) - np.eye(50)).max() < 0.5
    assert abs(np.corrcoef(epochs[:, :-1].ravel(), epochs[:, 1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize(
    "bits", [random_bits(7, 3, np.arange(20_000)), random_bits(7, np.arange(20_000), 0)]
)
def test_random_bits_are_uniform_and_independent(bits):
    table = np.unpackbits(bits.view(np.uint8)).reshape(len(bits), 64).astype(float)
    assert abs(table.mean(axis=0) - 0.5).max() < 0.02
    correlations = np.corrcoef(table.T) - np.eye(64)
    assert abs(correlations).max() < 0.04
    assert abs(np.corrcoef(table[:-1].T, table[1:].T)[:64, 64:]).max() < 0.04


def test_dropout_seeds_are_independent_of_the_window():
    inputs, _, dropout_seeds = sample_batch(TOKENS, 1, 0, range(20_000), 20_000, 16)
    seeds = dropout_seeds.numpy()
    assert len(np.unique(seeds)) > 19_990
    assert abs(np.corrcoef(inputs[:, 0], seeds)[0, 1]) < 0.03
    assert abs(seeds.mean()) < 5 * 2**31 / np.sqrt(3 * 20_000)


def splitmix64(seed: int, n: int) -> int:
    """Return the n-th output of the reference generator, in Python integers."""
    z = seed + n * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_reference_splitmix64_gives_the_published_numbers():
    assert [splitmix64(1234567, n) for n in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(seeds, steps, st.integers(0, 10**9))
def test_random_bits_equal_splitmix64(seed, step, row):
    expected = [splitmix64(splitmix64(seed, step + 1), each + 1) for each in range(row, row + 3)]
    assert random_bits(seed, step, np.arange(row, row + 3)).tolist() == expected


def test_batch_is_stable_across_versions():
    inputs, _, dropout_seeds = sample_batch(TOKENS, 1337, 5, range(2), 2, 4)
    assert inputs[:, 0].tolist() == [153, 149]
    assert dropout_seeds.tolist() == [254123789, -2069863720]


@given(st.integers(1, 2**32))
def test_token_dtype_is_the_smallest_that_fits(vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype.kind == "u"
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype.itemsize == 1 or np.iinfo(f"u{dtype.itemsize // 2}").max < vocab_size - 1


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_tokens_round_trip_through_a_file(tmp_path, vocab_size, dtype):
    tokens = np.array([0, vocab_size - 1, vocab_size // 2] * 5).astype(dtype)
    tokens.tofile(tmp_path / "tokens.bin")
    opened = MemmapTokens([tmp_path / "tokens.bin"], vocab_size)
    assert opened.dtype == opened[:].dtype == dtype
    assert opened[:].tolist() == tokens.tolist()
    inputs, targets, _ = sample_batch(opened, 0, 0, range(3), 3, 4)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_shards_form_one_sequence(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(sum(sizes), dtype=np.uint8)
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tokens[offset : offset + size].tofile(folder / f"{i}.bin")
    start, stop = data.draw(st.integers(-30, 30)), data.draw(st.integers(-30, 30) | st.none())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt.data.batches.MAX_OPEN_SHARDS", 2)
        opened = MemmapTokens([folder / f"{i}.bin" for i in range(len(sizes))], 256)
        assert len(opened) == len(tokens)
        assert opened[start:stop].tolist() == tokens[start:stop].tolist()
        assert opened[:].tolist() == tokens.tolist()
        assert opened.shard_offsets == [*offsets, len(tokens)]


@given(
    seeds,
    st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda sizes: max(sizes) > 1),
    st.integers(1, 5),
    st.integers(0, 100),
)
def test_document_windows_predict_every_token_once_per_epoch(seed, sizes, context_length, epoch):
    ends = np.cumsum(sizes)
    tokens = np.arange(1, ends[-1] + 1)
    documents = DocumentWindows(ends, context_length)
    assert documents.windows_per_epoch == sum(-(-(size - 1) // context_length) for size in sizes)
    count = documents.windows_per_epoch
    x, y, _ = sample_batch(tokens, seed, epoch, range(count), count, context_length, documents)
    is_target = y != IGNORE_INDEX
    assert torch.equal(y[is_target], x[is_target] + 1)
    assert sorted(y[is_target].tolist()) == sorted(
        set(tokens.tolist()) - {1, *(ends[:-1] + 1).tolist()}
    )
    # All inputs and targets of a row are in one document.
    for row, targets in zip(x, y, strict=True):
        seen = {int(token) for token in [*row[row > 0], *targets[targets != IGNORE_INDEX]]}
        assert len(set(np.searchsorted(ends, list(seen)))) == 1
        assert (targets != IGNORE_INDEX).tolist() == sorted(
            (targets != IGNORE_INDEX).tolist(), reverse=True
        )


def test_document_windows_are_independent_of_the_slice():
    documents = DocumentWindows(np.array([5, 9, 30, 1000]), 16)
    batch = sample_batch(TOKENS, 3, 7, range(8), 8, 16, documents)
    part = sample_batch(TOKENS, 3, 7, range(2, 5), 8, 16, documents)
    for part_tensor, batch_tensor in zip(part, batch, strict=True):
        assert torch.equal(part_tensor, batch_tensor[2:5])
    next_batch = sample_batch(TOKENS, 3, 8, range(8), 8, 16, documents)
    assert not torch.equal(batch[0], next_batch[0])
