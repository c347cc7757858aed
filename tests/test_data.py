"""A batch is a pure function of seed, step and row: any slice, in any order, on any machine."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt.data import IGNORED, Documents, batch, open_tokens, random_bits, window_starts
from nanogpt.sizes import token_dtype

TOKENS = np.arange(1000, dtype=np.uint16)
MASK = 2**64 - 1
seeds, steps = st.integers(0, 2**31 - 1), st.integers(0, 10**9)


@given(seeds, steps, st.integers(1, 12), st.data())
def test_rows_do_not_know_of_each_other(seed, step, rows, data):
    whole = batch(TOKENS, seed, step, range(rows), rows, 16)
    cuts = sorted(data.draw(st.sets(st.integers(1, rows))) | {0, rows})
    order = data.draw(st.permutations(list(pairwise(cuts))))
    for first, behind in order:
        for part, full in zip(batch(TOKENS, seed, step, range(first, behind), rows, 16), whole, strict=True):
            assert torch.equal(part, full[first:behind])


@given(seeds, steps, st.integers(1, 999))
def test_targets_are_the_inputs_one_token_on(seed, step, context_length):
    inputs, targets, keys = batch(TOKENS, seed, step, range(4), 4, context_length)
    assert inputs.shape == targets.shape == (4, context_length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert keys.shape == (4,)
    assert keys.dtype == torch.int32
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(context_length))
    assert targets.max() < 1000


@given(seeds, steps)
def test_seeds_steps_and_rows_differ(seed, step):
    drawn = [random_bits(s, t, np.arange(50)) for s, t in [(seed, step), (seed + 1, step), (seed, step + 1), (seed + 1, step + 1)]]
    assert len(np.unique(np.concatenate(drawn))) == 200


@given(seeds, st.integers(1, 40), st.integers(0, 1000), st.integers(0, 10**6), st.data())
def test_a_pass_reads_everything_once_and_nothing_twice(seed, context_length, more, turn, data):
    tokens = context_length + 1 + more
    count = max(1, (more + 1) // context_length)
    starts = window_starts(tokens, context_length, seed, np.arange(turn * count, (turn + 1) * count, dtype=np.uint64)).astype(int)
    assert (np.diff(np.sort(starts)) == context_length).all()
    assert starts.min() >= 0
    assert starts.max() + context_length < tokens
    assert tokens - 1 - count * context_length < 2 * context_length  # what a pass leaves out


@pytest.mark.parametrize(("tokens", "context_length"), [(2, 1), (9, 8), (10, 8), (20, 3)])
def test_every_window_is_reached(tokens, context_length):
    starts = window_starts(tokens, context_length, 1, np.arange(2000, dtype=np.uint64))
    assert set(starts.tolist()) == set(range(tokens - context_length))


def test_passes_differ_in_order_and_in_where_they_cut():
    count = (1000 - 10) // 10
    passes = window_starts(1000, 10, 1, np.arange(50 * count, dtype=np.uint64)).reshape(50, count)
    assert len({int(one.min()) for one in passes}) >= 9
    orders = np.array([np.argsort(one) for one in passes])
    assert abs(np.corrcoef(orders) - np.eye(50)).max() < 0.5
    assert abs(np.corrcoef(passes[:, :-1].ravel(), passes[:, 1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("bits", [random_bits(7, 3, np.arange(20_000)), random_bits(7, np.arange(20_000), 0)])
def test_bits_are_even_and_independent(bits):
    table = np.unpackbits(bits.view(np.uint8)).reshape(len(bits), 64).astype(float)
    assert abs(table.mean(axis=0) - 0.5).max() < 0.02
    correlations = np.corrcoef(table.T) - np.eye(64)
    assert abs(correlations).max() < 0.04
    assert abs(np.corrcoef(table[:-1].T, table[1:].T)[:64, 64:]).max() < 0.04


def test_the_key_of_dropout_says_nothing_of_the_place_in_the_text():
    inputs, _, keys = batch(TOKENS, 1, 0, range(20_000), 20_000, 16)
    keys = keys.numpy()
    assert len(np.unique(keys)) > 19_990
    assert abs(np.corrcoef(inputs[:, 0], keys)[0, 1]) < 0.03
    assert abs(keys.mean()) < 5 * 2**31 / np.sqrt(3 * 20_000)


def splitmix64(seed: int, n: int) -> int:
    """The n-th output of the reference generator, in plain integers."""
    z = seed + n * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def test_the_reference_gives_the_published_numbers():
    assert [splitmix64(1234567, n) for n in (1, 2, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(seeds, steps, st.integers(0, 10**9))
def test_the_bits_are_those_of_splitmix64(seed, step, row):
    expected = [splitmix64(splitmix64(seed, step + 1), each + 1) for each in range(row, row + 3)]
    assert random_bits(seed, step, np.arange(row, row + 3)).tolist() == expected


def test_batches_stay_what_they_are_in_every_version():
    inputs, _, keys = batch(TOKENS, 1337, 5, range(2), 2, 4)
    assert (inputs[:, 0].tolist(), keys.tolist()) == ([153, 149], [254123789, -2069863720])


@given(st.integers(1, 2**32))
def test_the_smallest_type_that_holds_every_token(vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype.kind == "u"
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype.itemsize == 1 or np.iinfo(f"u{dtype.itemsize // 2}").max < vocab_size - 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_tokens_come_back_from_their_file(tmp_path, vocab_size, dtype):
    tokens = np.array([0, vocab_size - 1, vocab_size // 2] * 5).astype(dtype)
    tokens.tofile(tmp_path / "tokens.bin")
    opened = open_tokens([tmp_path / "tokens.bin"], vocab_size)
    assert opened.dtype == opened[:].dtype == dtype
    assert opened[:].tolist() == tokens.tolist()
    inputs, targets, _ = batch(opened, 0, 0, range(3), 3, 4)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.data())
def test_shards_are_one_sequence(tmp_path_factory, sizes, data):
    folder, tokens, first = tmp_path_factory.mktemp("shards"), np.arange(sum(sizes), dtype=np.uint8), 0
    for i, size in enumerate(sizes):
        tokens[first : first + size].tofile(folder / f"{i}.bin")
        first += size
    opened = open_tokens([folder / f"{i}.bin" for i in range(len(sizes))], 256)
    start, stop = data.draw(st.integers(-30, 30)), data.draw(st.integers(-30, 30) | st.none())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt.data.MOST_OPEN", 2)
        assert len(opened) == len(tokens)
        assert opened[start:stop].tolist() == tokens[start:stop].tolist()
        assert opened[:].tolist() == tokens.tolist()
        assert opened.begins == [sum(sizes[:i]) for i in range(len(sizes))]


@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=8).filter(lambda sizes: max(sizes) > 1), st.integers(1, 5), st.integers(0, 100))
def test_windows_within_documents_predict_every_token_of_each_once_a_pass(seed, sizes, context_length, turn):
    ends = np.cumsum(sizes)
    tokens = np.arange(1, ends[-1] + 1)
    documents = Documents(ends, context_length)
    assert documents.count == sum(-(-(size - 1) // context_length) for size in sizes)
    x, y, _ = batch(tokens, seed, turn, range(documents.count), documents.count, context_length, documents)
    real = y != IGNORED
    assert torch.equal(y[real], x[real] + 1)
    assert sorted(y[real].tolist()) == sorted(set(tokens.tolist()) - {1, *(ends[:-1] + 1).tolist()})
    for row, targets in zip(x, y, strict=True):  # all that is seen and predicted lies in one document
        seen = {int(token) for token in [*row[row > 0], *targets[targets != IGNORED]]}
        assert len(set(np.searchsorted(ends, list(seen)))) == 1
        assert (targets != IGNORED).tolist() == sorted((targets != IGNORED).tolist(), reverse=True)


def test_rows_within_documents_are_a_pure_function_too():
    documents = Documents(np.array([5, 9, 30, 1000]), 16)
    whole = batch(TOKENS, 3, 7, range(8), 8, 16, documents)
    for part, full in zip(batch(TOKENS, 3, 7, range(2, 5), 8, 16, documents), whole, strict=True):
        assert torch.equal(part, full[2:5])
    assert not torch.equal(whole[0], batch(TOKENS, 3, 8, range(8), 8, 16, documents)[0])
