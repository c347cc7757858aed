"""Losses and n-gram baselines equal slow computations, and diagnoses follow from the losses."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import baselines
from nanogpt import evaluate as evaluate_module
from nanogpt.baselines import ngram_losses
from nanogpt.diagnosis import EvalPoint, diagnose
from nanogpt.evaluate import EvalLoss, TextCounter, TextSize, evaluate, loss_by_position

TOKENS = np.random.default_rng(0).integers(0, 11, 100).astype(np.uint8)


@torch.no_grad()
def window_losses(model, tokens: np.ndarray, context_length: int) -> list[float]:
    """The loss of each window, one at a time, by the probability of each of its tokens."""
    nats = []
    for start in range(0, len(tokens) - 1, context_length):
        window = torch.from_numpy(tokens[start : start + context_length + 1].astype(np.int64))
        logs = model(window[None, :-1])[0].log_softmax(dim=1)
        nats.append(-sum(logs[i, token].item() for i, token in enumerate(window[1:])))
    return nats


@pytest.mark.parametrize("context_length", [None, 1, 3])
@pytest.mark.parametrize("length", [2, 9, 10, 60])
def test_evaluate_predicts_every_token_but_the_first_once_from_its_window(
    make_model, machine, length, context_length
):
    model, tokens = make_model(), TOKENS[:length]
    loss = evaluate(model, tokens, TextSize(3 * length), machine, context_length)
    nats = sum(window_losses(model, tokens, context_length or 8))
    assert loss.tokens == length - 1
    assert loss.loss_sum == pytest.approx(nats, rel=1e-5)
    assert loss.loss == pytest.approx(nats / (length - 1), rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * (length - 1)), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("limit", ["BATCH_TOKENS", "BATCH_LOGITS"])
def test_evaluate_does_not_depend_on_the_batch_size(make_model, machine, monkeypatch, rows, limit):
    whole = evaluate(make_model(), TOKENS, TextSize(100), machine)
    monkeypatch.setattr(
        evaluate_module, limit, 8 * rows * {"BATCH_TOKENS": 1, "BATCH_LOGITS": 11}[limit]
    )
    assert evaluate(make_model(), TOKENS, TextSize(100), machine).loss_sum == pytest.approx(
        whole.loss_sum, rel=1e-5
    )


@pytest.mark.parametrize(
    ("limit", "windows"),
    [(0, [0]), (7, [0]), (8, [0]), (17, [0, 11]), (24, [0, 6, 11]), (40, [0, 3, 6, 8, 11])],
)
def test_evaluate_with_a_limit_spreads_full_windows_evenly(make_model, machine, limit, windows):
    model, nats = make_model(), window_losses(make_model(), TOKENS, 8)
    loss = evaluate(model, TOKENS, TextSize(200), machine, limit=limit)
    assert loss.tokens == 8 * len(windows)
    assert loss.loss_sum == pytest.approx(sum(nats[window] for window in windows), rel=1e-5)
    assert loss.bytes == 2 * loss.tokens


@pytest.mark.parametrize("limit", [99, 100, 1000])
def test_evaluate_with_a_large_limit_takes_all_tokens(make_model, machine, limit):
    assert evaluate(make_model(), TOKENS, TextSize(100), machine, limit=limit) == evaluate(
        make_model(), TOKENS, TextSize(100), machine
    )


@pytest.mark.parametrize("length", [2, 8, 9])
@pytest.mark.parametrize("limit", [0, 1, 7, 8])
def test_evaluate_with_a_small_limit_predicts_a_token(make_model, machine, length, limit):
    assert (
        evaluate(make_model(), TOKENS[:length], TextSize(length), machine, limit=limit).tokens >= 1
    )


def test_evaluate_of_a_uniform_model_is_the_log_of_the_vocabulary_size(make_model, machine):
    model = make_model(scale=0.0)
    with torch.no_grad():
        model.wte.weight.zero_()
    loss = evaluate(model, TOKENS, TextSize(100), machine)
    assert loss.loss == pytest.approx(math.log(11), rel=1e-6)
    assert EvalLoss(loss_sum=math.log(2) * 30, tokens=5, bytes=10).bits_per_byte == pytest.approx(3)


def test_word_perplexity_is_per_word_and_nan_without_words(make_model, machine):
    loss = evaluate(make_model(), TOKENS, TextSize(100, 20), machine)
    assert loss.words == pytest.approx(20 * 99 / 100)
    assert loss.word_perplexity == pytest.approx(math.exp(loss.loss_sum / loss.words))
    assert math.isnan(evaluate(make_model(), TOKENS, TextSize(100), machine).word_perplexity)
    assert EvalLoss(loss_sum=1e6, tokens=10, bytes=10, words=1).word_perplexity == math.inf


@given(st.lists(st.lists(st.text("ab \n\u3000日")), max_size=4))
def test_text_counter_does_not_depend_on_the_chunks(documents):
    size = TextCounter()
    for chunks in documents:
        assert list(size.count(chunks)) == chunks
    assert size.bytes == sum(len("".join(chunks).encode()) for chunks in documents)
    assert size.words == sum(len("".join(chunks).split()) for chunks in documents)


def witten_bell(
    train: tuple[int, ...], alphabet: set[int], context: tuple[int, ...], token: int
) -> float:
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
            p = [
                witten_bell(train, alphabet, val[max(0, i - order + 1) : i], val[i])
                for i in range(1, len(val))
            ]
            losses[name] = -sum(map(math.log, p)) / len(p)
    return losses


symbols = st.sampled_from([0, 1, 2, 255, 256, 65535])
splits = st.lists(symbols, max_size=40).map(tuple)


@given(splits, st.lists(symbols, min_size=1, max_size=20).map(tuple))
def test_ngram_losses_equal_slow_counting(train, val):
    assert ngram_losses(np.array(train, np.uint16), np.array(val, np.uint16)) == pytest.approx(
        slow_losses(train, val)
    )


def test_ngram_losses_of_a_large_vocabulary_equal_slow_counting():
    tokens = np.random.default_rng(0).integers(0, 200_000, 3000).astype(np.uint32)
    tokens = np.concatenate(
        [np.arange(2_000_000, dtype=np.uint32), tokens, tokens[:200]]
    )  # three of them as one number just fit into 64 bits
    assert baselines.encode_ngrams(tokens[-3:].astype(np.int64), 3, 2_000_000) == sum(
        int(t) * 2_000_000**i for i, t in enumerate(tokens[:-4:-1])
    )
    losses = ngram_losses(tokens[2_000_000:-200], tokens[-200:])
    assert losses == pytest.approx(
        slow_losses(tuple(tokens[2_000_000:-200].tolist()), tuple(tokens[-200:].tolist()))
    )


@given(splits, st.lists(symbols, max_size=2).map(tuple))
def test_witten_bell_probabilities_sum_to_one(train, context):
    alphabet = {*train, *context, 7}
    assert sum(witten_bell(train, alphabet, context, token) for token in alphabet) == pytest.approx(
        1
    )


def test_ngram_losses_count_a_limited_number_of_tokens(monkeypatch):
    monkeypatch.setattr(baselines, "NGRAM_TOKENS", 30)
    assert ngram_losses(TOKENS, TOKENS[50:]) == pytest.approx(
        slow_losses(tuple(TOKENS[:30]), tuple(TOKENS[50:]))
    )


def test_ngram_losses_fall_with_the_order(story):
    tokens = np.frombuffer(story.read_bytes(), np.uint8)
    losses = [*ngram_losses(tokens[:3500], tokens[3500:]).values()]
    assert losses == sorted(losses, reverse=True)


def history(*losses: tuple[float, float], every: int = 100) -> list[EvalPoint]:
    return [EvalPoint(every * i, *pair) for i, pair in enumerate(losses, start=1)]


def test_diagnose_overfitted_if_only_the_training_loss_falls():
    judged = diagnose(
        history((3.0, 3.0), (2.0, 2.2), (1.5, 2.0), (1.0, 2.1), (0.5, 2.6)), {"trigram": 1.0}
    )
    assert judged.kind == "overfitted"
    assert judged.summary.startswith(
        "Overfitted: since step 300 only the training loss improves "
        "(validation 2.000 there, 2.600 at the end). The saved model is that of step 300."
    )


@pytest.mark.parametrize("last", [(1.0, 2.019), (1.6, 2.3)])
def test_diagnose_small_or_shared_rise_is_not_overfitted(last):
    assert diagnose(history((3.0, 2.6), (1.5, 2.0), last), {}).kind != "overfitted"


def test_diagnose_undertrained_if_validation_still_falls():
    judged = diagnose(
        [EvalPoint(2**n, 5 - 0.2 * n, 5 - 0.1 * n) for n in range(1, 11)], {"trigram": 4.5}
    )
    assert judged.kind == "undertrained"
    assert (
        judged.summary
        == "Undertrained: validation still falls (about 0.10 more for twice the steps). "
        "Resume with steps = 2048, about 2 times as long."
    )


@pytest.mark.parametrize(
    ("trigram", "steps"), [(3.95, 2048), (3.8, 4100), (3.5, 33_000), (0.5, 100_000)]
)
def test_diagnose_undertrained_extrapolates_to_the_baseline(trigram, steps):
    judged = diagnose([EvalPoint(512, 4.0, 4.1), EvalPoint(1024, 3.9, 4.0)], {"trigram": trigram})
    assert judged.kind == "undertrained"
    assert judged.summary == (
        f"Undertrained: it is still worse than the trigram baseline ({trigram:.3f}). "
        f"Resume with steps = {steps}, about {steps / 1024:.0f} times as long."
    )


def test_diagnose_healthy_if_levelled_off_below_the_baselines():
    levelled = history((3.0, 3.0), (2.0, 2.1), (1.9, 2.01), (1.88, 2.0), (1.87, 2.0), (1.86, 2.0))
    judged = diagnose(levelled, {"trigram": 2.4})
    assert judged.kind == "healthy"
    assert judged.summary.startswith("Healthy: validation has levelled off at 2.000")
    assert judged.asdict() == {"kind": "healthy", "summary": judged.summary}
    assert diagnose(levelled, {}) == judged


losses = st.floats(0, 1e6)
histories = st.dictionaries(
    st.integers(1, 10**6), st.tuples(losses, losses), min_size=1, max_size=12
).map(lambda points: [EvalPoint(step, *points[step]) for step in sorted(points)])


@given(histories, st.just({}) | st.builds(lambda loss: {"trigram": loss}, losses))
def test_diagnose_accepts_every_history(points, baselines):
    judged = diagnose(points, baselines)
    assert judged.kind in ("undertrained", "healthy", "overfitted", "diverged")
    assert judged.summary.lower().startswith(judged.kind)
    if judged.kind == "undertrained":
        steps = int(judged.summary.rpartition("steps = ")[2].partition(",")[0])
        assert 2 * points[-1].step <= steps <= 105 * points[-1].step


def test_diagnose_one_evaluation():
    assert "inf" not in diagnose([EvalPoint(10, 2.0, 2.0)], {}).summary.split()


def test_diagnose_rising_losses_are_not_healthy():
    assert diagnose(history((2.0, 2.0), (3.0, 3.0), (4.0, 4.0)), {"trigram": 3.0}).kind != "healthy"


@pytest.mark.parametrize(
    ("length", "context_length"), [(100, None), (97, None), (33, None), (9, None), (100, 20)]
)
def test_loss_by_position_adds_up_to_the_loss(make_model, machine, length, context_length):
    model = make_model(context_length=40)
    tokens = np.random.default_rng(0).integers(0, 11, length).astype(np.uint16)
    whole = evaluate(model, tokens, TextSize(length), machine, context_length)
    buckets = loss_by_position(model, tokens, machine, context_length)
    T = min(context_length or 40, length - 1)
    assert [bucket.first for bucket in buckets] == [edge for edge in (0, 16, 32) if edge < T]
    assert [bucket.last for bucket in buckets] == [edge - 1 for edge in (16, 32) if edge < T] + [
        T - 1
    ]
    assert sum(bucket.tokens for bucket in buckets) == whole.tokens == length - 1
    assert sum(bucket.loss * bucket.tokens for bucket in buckets) == pytest.approx(
        whole.loss_sum, rel=1e-5
    )


def test_loss_by_position_equals_direct_means(make_model, machine):
    model = make_model(context_length=40)
    tokens = np.random.default_rng(0).integers(0, 11, 81).astype(np.uint16)
    ids = torch.from_numpy(tokens.astype(np.int64))
    each = torch.nn.functional.cross_entropy(
        model(ids[:-1].view(2, 40)).transpose(1, 2), ids[1:].view(2, 40), reduction="none"
    )
    buckets = loss_by_position(model, tokens, machine)
    assert [bucket.first for bucket in buckets] == [
        0,
        *(bucket.last + 1 for bucket in buckets[:-1]),
    ]
    assert buckets[-1].last == 39
    for bucket in buckets:
        part = each[:, bucket.first : bucket.last + 1]
        assert bucket.loss == pytest.approx(part.mean().item(), rel=1e-5)
        assert bucket.tokens == part.numel()


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ([3.0, 3.0, 3.0], "diverged"),
        ([5.0, 4.0, 3.0], "undertrained"),
        ([3.0, 3.1, 3.2], "overfitted"),
    ],
)
def test_diagnose_reports_a_run_worse_than_its_initial_checkpoint(losses, kind):
    history = [EvalPoint(100 * i, 4.0 - i, loss) for i, loss in enumerate(losses, start=1)]
    judged = diagnose(history, {"bigram": 9.0}, initial_loss=2.5)
    assert judged.kind == kind
    assert "still worse than its initial checkpoint (2.500; 3.000 at best)" in judged.summary
    assert diagnose(history, {"bigram": 9.0}, initial_loss=3.5) == diagnose(
        history, {"bigram": 9.0}
    )
