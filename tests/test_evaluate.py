"""Losses equal a direct, slow computation; what counting reaches equals counting; verdicts say what the numbers say."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import evaluate as module
from nanogpt.evaluate import Loss, Point, evaluate, loss_by_position, ngram_losses, verdict

TOKENS = np.random.default_rng(0).integers(0, 11, 100).astype(np.uint8)


@torch.no_grad()
def window_nats(model, tokens: np.ndarray, context_length: int) -> list[float]:
    """The loss of each window, one at a time, by the probability of each of its tokens."""
    nats = []
    for start in range(0, len(tokens) - 1, context_length):
        window = torch.from_numpy(tokens[start : start + context_length + 1].astype(np.int64))
        logs = model(window[None, :-1])[0].log_softmax(dim=1)
        nats.append(-sum(logs[i, token].item() for i, token in enumerate(window[1:])))
    return nats


@pytest.mark.parametrize("context_length", [None, 1, 3])
@pytest.mark.parametrize("length", [2, 9, 10, 60])
def test_every_token_but_the_first_is_predicted_once_from_its_window(make_model, place, length, context_length):
    model, tokens = make_model(), TOKENS[:length]
    loss = evaluate(model, tokens, 3 * length, place, context_length)
    nats = sum(window_nats(model, tokens, context_length or 8))
    assert loss.tokens == length - 1
    assert loss.nats == pytest.approx(nats, rel=1e-5)
    assert loss.val_loss == pytest.approx(nats / (length - 1), rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * (length - 1)), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("limit", ["BATCH_TOKENS", "BATCH_LOGITS"])
def test_the_size_of_a_pass_changes_nothing(make_model, place, monkeypatch, rows, limit):
    whole = evaluate(make_model(), TOKENS, 100, place)
    monkeypatch.setattr(module, limit, 8 * rows * {"BATCH_TOKENS": 1, "BATCH_LOGITS": 11}[limit])
    assert evaluate(make_model(), TOKENS, 100, place).nats == pytest.approx(whole.nats, rel=1e-5)


@pytest.mark.parametrize(("limit", "windows"), [(0, [0]), (7, [0]), (8, [0]), (17, [0, 11]), (24, [0, 6, 11]), (40, [0, 3, 6, 8, 11])])
def test_with_a_limit_whole_windows_are_spread_evenly(make_model, place, limit, windows):
    model, nats = make_model(), window_nats(make_model(), TOKENS, 8)
    loss = evaluate(model, TOKENS, 200, place, limit=limit)
    assert loss.tokens == 8 * len(windows)
    assert loss.nats == pytest.approx(sum(nats[window] for window in windows), rel=1e-5)
    assert loss.bytes == 2 * loss.tokens


@pytest.mark.parametrize("limit", [99, 100, 1000])
def test_a_limit_that_holds_all_takes_all(make_model, place, limit):
    assert evaluate(make_model(), TOKENS, 100, place, limit=limit) == evaluate(make_model(), TOKENS, 100, place)


@pytest.mark.parametrize("length", [2, 8, 9])
@pytest.mark.parametrize("limit", [0, 1, 7, 8])
def test_a_limit_never_leaves_nothing(make_model, place, length, limit):
    assert evaluate(make_model(), TOKENS[:length], length, place, limit=limit).tokens >= 1


def test_a_model_that_knows_nothing_pays_the_logarithm_of_the_vocabulary(make_model, place):
    model = make_model(scale=0.0)
    with torch.no_grad():
        model.wte.weight.zero_()
    loss = evaluate(model, TOKENS, 100, place)
    assert loss.val_loss == pytest.approx(math.log(11), rel=1e-6)
    assert Loss(nats=math.log(2) * 30, tokens=5, bytes=10).bits_per_byte == pytest.approx(3)


def test_perplexity_is_per_word_and_nothing_where_words_are_unknown(make_model, place):
    loss = evaluate(make_model(), TOKENS, 100, place, n_words=20)
    assert loss.words == pytest.approx(20 * 99 / 100)
    assert loss.word_perplexity == pytest.approx(math.exp(loss.nats / loss.words))
    assert math.isnan(evaluate(make_model(), TOKENS, 100, place).word_perplexity)
    assert Loss(nats=1e6, tokens=10, bytes=10, words=1).word_perplexity == math.inf


@given(st.lists(st.lists(st.text("ab \n\u3000日")), max_size=4))
def test_words_and_bytes_of_a_text_do_not_depend_on_its_chunks(documents):
    size = module.Size()
    for chunks in documents:
        assert list(size.counting(chunks)) == chunks
    assert size.bytes == sum(len("".join(chunks).encode()) for chunks in documents)
    assert size.words == sum(len("".join(chunks).split()) for chunks in documents)


def witten_bell(train: tuple[int, ...], alphabet: set[int], context: tuple[int, ...], token: int) -> float:
    """The probability of a token after a context, by dictionaries and recursion."""
    n = len(context)
    successors = Counter(train[i + n] for i in range(len(train) - n) if train[i : i + n] == context)
    shorter = witten_bell(train, alphabet, context[1:], token) if context else 1 / len(alphabet)
    c, u = successors.total(), len(successors)
    return (successors[token] + u * shorter) / (c + u) if c else shorter


def slow_losses(train: tuple[int, ...], val: tuple[int, ...]) -> dict[str, float]:
    alphabet = {*train, *val}
    losses = {"uniform": math.log(len(alphabet))}
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        if len(train) >= order and len(val) > order:
            p = [witten_bell(train, alphabet, val[max(0, i - order + 1) : i], val[i]) for i in range(1, len(val))]
            losses[name] = -sum(map(math.log, p)) / len(p)
    return losses


symbols = st.sampled_from([0, 1, 2, 255, 256, 65535])
splits = st.lists(symbols, max_size=40).map(tuple)


@given(splits, st.lists(symbols, min_size=1, max_size=20).map(tuple))
def test_baselines_are_those_of_slow_counting(train, val):
    assert ngram_losses(np.array(train, np.uint16), np.array(val, np.uint16)) == pytest.approx(slow_losses(train, val))


def test_baselines_of_a_large_vocabulary_are_those_of_slow_counting():
    tokens = np.random.default_rng(0).integers(0, 200_000, 3000).astype(np.uint32)
    tokens = np.concatenate([np.arange(2_000_000, dtype=np.uint32), tokens, tokens[:200]])  # three of them as one number just fit into 64 bits
    assert module._windows(tokens[-3:].astype(np.int64), 3, 2_000_000) == sum(int(t) * 2_000_000**i for i, t in enumerate(tokens[:-4:-1]))
    losses = ngram_losses(tokens[2_000_000:-200], tokens[-200:])
    assert losses == pytest.approx(slow_losses(tuple(tokens[2_000_000:-200].tolist()), tuple(tokens[-200:].tolist())))


@given(splits, st.lists(symbols, max_size=2).map(tuple))
def test_probabilities_sum_to_one_after_every_context(train, context):
    alphabet = {*train, *context, 7}
    assert sum(witten_bell(train, alphabet, context, token) for token in alphabet) == pytest.approx(1)


def test_baselines_count_only_so_many_tokens(monkeypatch):
    monkeypatch.setattr(module, "NGRAM_TOKENS", 30)
    assert ngram_losses(TOKENS, TOKENS[50:]) == pytest.approx(slow_losses(tuple(TOKENS[:30]), tuple(TOKENS[50:])))


def test_more_context_helps_where_there_is_something_to_count(story):
    tokens = np.frombuffer(story.read_bytes(), np.uint8)
    losses = [*ngram_losses(tokens[:3500], tokens[3500:]).values()]
    assert losses == sorted(losses, reverse=True)


def history(*losses: tuple[float, float], every: int = 100) -> list[Point]:
    return [Point(every * i, *pair) for i, pair in enumerate(losses, start=1)]


def test_a_run_that_only_learns_its_text_by_heart_is_overfitted():
    judged = verdict(history((3.0, 3.0), (2.0, 2.2), (1.5, 2.0), (1.0, 2.1), (0.5, 2.6)), {"trigram": 1.0})
    assert judged.kind == "overfitted"
    assert judged.sentence.startswith("Overfitted: since step 300 it improves only on the training text (validation 2.000 there, 2.600 at the end).")


@pytest.mark.parametrize("last", [(1.0, 2.019), (1.6, 2.3)])
def test_a_small_rise_or_one_that_training_shares_is_not_overfitting(last):
    assert verdict(history((3.0, 2.6), (1.5, 2.0), last), {}).kind != "overfitted"


def test_a_run_that_still_gets_better_is_undertrained():
    judged = verdict([Point(2**n, 5 - 0.2 * n, 5 - 0.1 * n) for n in range(1, 11)], {"trigram": 4.5})
    assert judged.kind == "undertrained"
    assert judged.sentence == "Undertrained: validation still falls (about 0.10 more for twice the steps). Train about 2 times as long: --resume --steps 2048."


@pytest.mark.parametrize(("trigram", "steps"), [(3.95, 2048), (3.8, 4100), (3.5, 33_000), (0.5, 100_000)])
def test_a_run_behind_mere_counting_is_told_how_long_the_trend_takes_to_catch_up(trigram, steps):
    judged = verdict([Point(512, 4.0, 4.1), Point(1024, 3.9, 4.0)], {"trigram": trigram})
    assert judged.kind == "undertrained"
    assert judged.sentence == (
        f"Undertrained: it is still behind the trigram baseline ({trigram:.3f}). Train about {steps / 1024:.0f} times as long: --resume --steps {steps}."
    )


def test_a_run_that_has_levelled_off_ahead_of_counting_is_healthy():
    levelled = history((3.0, 3.0), (2.0, 2.1), (1.9, 2.01), (1.88, 2.0), (1.87, 2.0), (1.86, 2.0))
    judged = verdict(levelled, {"trigram": 2.4})
    assert judged.kind == "healthy"
    assert judged.sentence.startswith("Healthy: validation has levelled off at 2.000")
    assert judged.asdict() == {"kind": "healthy", "sentence": judged.sentence}
    assert verdict(levelled, {}) == judged


losses = st.floats(0, 1e6)
histories = st.dictionaries(st.integers(1, 10**6), st.tuples(losses, losses), min_size=1, max_size=12).map(
    lambda points: [Point(step, *points[step]) for step in sorted(points)]
)


@given(histories, st.just({}) | st.builds(lambda loss: {"trigram": loss}, losses))
def test_every_history_has_a_verdict(points, baselines):
    judged = verdict(points, baselines)
    assert judged.kind in ("undertrained", "healthy", "overfitted", "diverged")
    assert judged.sentence.lower().startswith(judged.kind)
    if judged.kind == "undertrained":
        steps = int(judged.sentence.rpartition("--steps ")[2].rstrip("."))
        assert 2 * points[-1].step <= steps <= 105 * points[-1].step


def test_one_evaluation_is_judged_without_a_trend():
    assert "inf" not in verdict([Point(10, 2.0, 2.0)], {}).sentence.split()


def test_a_run_that_came_apart_is_not_healthy():
    assert verdict(history((2.0, 2.0), (3.0, 3.0), (4.0, 4.0)), {"trigram": 3.0}).kind != "healthy"


@pytest.mark.parametrize(("length", "context_length"), [(100, None), (97, None), (33, None), (9, None), (100, 20)])
def test_loss_by_position_adds_up_to_the_loss(make_model, place, length, context_length):
    model = make_model(context_length=40)
    tokens = np.random.default_rng(0).integers(0, 11, length).astype(np.uint16)
    whole = evaluate(model, tokens, length, place, context_length)
    buckets = loss_by_position(model, tokens, place, context_length)
    T = min(context_length or 40, length - 1)
    assert [bucket.first for bucket in buckets] == [edge for edge in (0, 16, 32) if edge < T]
    assert [bucket.last for bucket in buckets] == [edge - 1 for edge in (16, 32) if edge < T] + [T - 1]
    assert sum(bucket.tokens for bucket in buckets) == whole.tokens == length - 1
    assert sum(bucket.nats_per_token * bucket.tokens for bucket in buckets) == pytest.approx(whole.nats, rel=1e-5)


def test_loss_by_position_is_that_of_each_position(make_model, place):
    model = make_model(context_length=40)
    tokens = np.random.default_rng(0).integers(0, 11, 81).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))
    each = torch.nn.functional.cross_entropy(model(ids[:-1].view(2, 40)).transpose(1, 2), ids[1:].view(2, 40), reduction="none")
    buckets = loss_by_position(model, tokens, place)
    assert [bucket.first for bucket in buckets] == [0, *(bucket.last + 1 for bucket in buckets[:-1])]
    assert buckets[-1].last == 39
    for bucket in buckets:
        part = each[:, bucket.first : bucket.last + 1]
        assert bucket.nats_per_token == pytest.approx(part.mean().item(), rel=1e-5)
        assert bucket.tokens == part.numel()


@pytest.mark.parametrize(("losses", "kind"), [([3.0, 3.0, 3.0], "diverged"), ([5.0, 4.0, 3.0], "undertrained"), ([3.0, 3.1, 3.2], "overfitted")])
def test_what_is_worse_than_what_it_began_from_is_said(losses, kind):
    history = [Point(100 * i, 4.0 - i, loss) for i, loss in enumerate(losses, start=1)]
    judged = verdict(history, {"bigram": 9.0}, before=2.5)
    assert judged.kind == kind
    assert "behind the model it began from (2.500; 3.000 at its best)" in judged.sentence
    assert verdict(history, {"bigram": 9.0}, before=3.5) == verdict(history, {"bigram": 9.0})
