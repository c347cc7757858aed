"""How good a model is, in numbers that can be compared: loss over a whole split, bits per byte, n-gram baselines.

In: a model and held-out tokens, or a history of losses. Out: sums that are divided once, baselines, and a verdict in words.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import torch

from nanogpt.data import Tokens
from nanogpt.machine import Machine, Ranks
from nanogpt.model import GPT

NGRAM_TOKENS = 10_000_000  # baselines are counted on at most so many tokens of the training split, which bounds the memory,
NGRAM_SCORED = 2_000_000  # and scored on at most so many of the validation split
BATCH_TOKENS = 8192  # in one forward pass of an evaluation: more is no faster and takes more memory,
BATCH_LOGITS = 1 << 26  # as do more numbers than this, of a large vocabulary


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over some text: the sum, in nats, over `tokens` predicted tokens, which stand for `bytes` bytes of UTF-8 and `words` words (0: unknown)."""

    nats: float
    tokens: int
    bytes: float
    words: float = 0.0

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: fair between tokenizers, as the loss for each of them is not."""
        return self.nats / math.log(2) / self.bytes

    @property
    def word_perplexity(self) -> float:
        """Among how many words, equally likely, the model would be as unsure of each next one: fair too, for texts with spaces between words.

        It is exp(nats / words), where words are what white space separates; nan where they were not counted.
        """
        if not self.words:
            return math.nan
        per_word = self.nats / self.words
        return math.exp(per_word) if per_word < math.log(sys.float_info.max) else math.inf


class Size:
    """Counts the bytes of UTF-8 and the words of text that passes; words are what white space separates, and end where a text ends."""

    def __init__(self) -> None:
        self.bytes = self.words = 0

    def counting(self, chunks: Iterable[str]) -> Iterator[str]:
        """The chunks of one text, as they come."""
        within = False  # a word
        for chunk in chunks:
            self.bytes += len(chunk.encode())
            self.words += len(chunk.split()) - (within and not chunk[:1].isspace() and chunk != "")
            within = not chunk[-1].isspace() if chunk else within
            yield chunk


@torch.inference_mode()
def evaluate(
    model: GPT, tokens: Tokens | np.ndarray, n_bytes: int, machine: Machine, context_length: int | None = None, limit: int | None = None, n_words: int = 0,
    ranks: Ranks = Ranks(),
) -> Loss:  # fmt: skip
    """The loss over all of `tokens` (N,), N >= 2, in non-overlapping windows of `context_length` (the model's own, if not given).

    Every token but the first is predicted once, from those before it in its window. `n_bytes` is the size of the text, `n_words` its words. With
    `limit`, only so many tokens are predicted, in whole windows spread evenly over the split, always the same ones.
    Of many processes each computes a share.
    """
    T = context_length or model.config.context_length
    starts = np.arange(0, len(tokens) - 1, T)
    whole = starts[starts + T < len(tokens)]
    if limit is not None and limit // T < len(whole):
        starts = whole[np.linspace(0, len(whole) - 1, max(1, limit // T)).round().astype(int)]
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.vocab_size) // T)
    nats, count = 0.0, 0.0
    full, short = starts[starts + T < len(tokens)], starts[starts + T >= len(tokens)]
    groups = [*(full[i : i + rows] for i in range(0, len(full), rows)), *short.reshape(-1, 1)]
    for turn in range(ranks.rank, -(-len(groups) // ranks.size) * ranks.size, ranks.size):
        if turn >= len(groups) and not ranks.sharded:  # else the others need this process, too
            break
        group = groups[min(turn, len(groups) - 1)]
        windows = np.stack([tokens[start : start + T + 1] for start in group]).astype(np.int64)
        block = torch.from_numpy(windows).to(machine.device)  # (B, T + 1)
        with machine.autocast():
            of_group = model.nats(block[:, :-1], block[:, 1:]).item()
        if turn < len(groups):
            nats, count = nats + of_group, count + block[:, 1:].numel()
    nats, count = ranks.sum(nats, count)
    share = count / len(tokens)
    return Loss(nats, int(count), n_bytes * share, n_words * share)


def ngram_losses(train: Tokens | np.ndarray, val: Tokens | np.ndarray) -> dict[str, float]:
    """The n-gram baselines: nats per token of `val` (N,) under uniform, unigram, bigram and trigram models of `train` (M,).

    Smoothing is Witten and Bell's (1991; Chen and Goodman 1998, section 2.5): a context seen c times with u different
    successors trusts its own counts with c / (c + u) and the shorter context with the rest. "uniform" spreads evenly
    over the tokens that occur. Counted on the first `NGRAM_TOKENS` of `train`, scored on the first `NGRAM_SCORED` of `val`.
    """
    counted, scored = train[:NGRAM_TOKENS], val[:NGRAM_SCORED]
    occurs = np.zeros(1 + max(int(part.max(initial=0)) for part in (counted, scored)), bool)
    occurs[counted] = occurs[scored] = True
    place, size = (occurs.cumsum() - 1).astype(np.int32), int(occurs.sum())
    text, held_out = place[counted], place[scored]  # numbers below `size`
    losses = {"uniform": math.log(size)}
    p = np.full(len(held_out), 1 / size)  # of every held-out token, under the shorter context
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        if len(text) < order or len(held_out) <= order:
            break
        distinct, counts = _counted(_windows(text, order, size))
        contexts, first = _starts(distinct // size)  # distinct is sorted, so successors lie together
        uses, successors = np.add.reduceat(counts, first), np.diff(np.append(first, len(distinct)))
        seen = _windows(held_out, order, size)
        c, u = _lookup(contexts, uses, seen // size), _lookup(contexts, successors, seen // size)
        own = _lookup(distinct, counts, seen)
        p = p.copy()
        tail = p[order - 1 :]
        p[order - 1 :] = np.where(c > 0, (own + u * tail) / np.maximum(c + u, 1), tail)
        losses[name] = float(-np.log(p[1:]).mean())
    return losses


def _windows(tokens: np.ndarray, order: int, size: int) -> np.ndarray:
    """Each run of `order` tokens as one number in base `size`, which 64 bits hold for up to two million different tokens."""
    number = np.zeros(len(tokens) - order + 1, np.int64)
    for i in range(order):
        number *= size
        number += tokens[i : len(tokens) - order + 1 + i]
    return number


def _counted(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers, sorted, and how often each occurs. Sorts `numbers` in place: ten million take a second at most, and no second copy."""
    numbers.sort()
    distinct, first = _starts(numbers)
    return distinct, np.diff(np.append(first, len(numbers)))


def _starts(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of some sorted numbers, and where each begins."""
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[first], first


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key; 0 where there is none. `keys` is sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


@dataclass(frozen=True)
class Point:
    """One evaluation during a run: the step, the mean training loss since the last one, and the validation loss."""

    step: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Verdict:
    """How a run went: "undertrained", "healthy", "overfitted" or "diverged", and a plain sentence that says why."""

    kind: str
    sentence: str

    def asdict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def verdict(
    history: Sequence[Point], baselines: dict[str, float], kept: float | None = None, minutes: float | None = None, before: float | None = None
) -> Verdict:
    """Judge a run by its evaluations; `kept` is the loss of the best model on the whole split, where that is known; `minutes` is for a run by the clock;
    `before` is the loss of the model that it began from, on the tokens of the evaluations.

    Overfitted or diverged: the last validation loss is at least 1 % above the best, while the training loss went on falling, or rose too.
    Undertrained: by the trend over the second half (the loss as a straight line in the logarithm of the step), doubling the
    steps would win another 1 %, or the best baseline is not beaten yet. Healthy: none of these. Never better than `before`: diverged, or
    undertrained where validation still falls.
    """
    last, best = history[-1], min(history, key=lambda point: point.val_loss)
    behind = before is not None and best.val_loss > before
    worse = f"it is still behind the model it began from ({before:.3f}; {best.val_loss:.3f} at its best)" if behind else ""
    if last.val_loss > 1.01 * best.val_loss:
        where = f"(validation {best.val_loss:.3f} there, {last.val_loss:.3f} at the end). The model saved is that of step {best.step:,}"
        where += f", and {worse}" if behind else ""
        if last.train_loss < best.train_loss:
            cure = "more text, more dropout or a smaller model would help"
            return Verdict("overfitted", f"Overfitted: since step {best.step:,} it improves only on the training text {where}; {cure}.")
        return Verdict("diverged", f"Diverged: since step {best.step:,} it gets worse even on the training text {where}; lower the learning rate.")
    gain, now = _gain_of_doubling(history), best.val_loss if kept is None else kept
    if worse and gain is not None and gain <= 0.01 * last.val_loss:
        return Verdict("diverged", f"Diverged: {worse}; lower the learning rate.")
    if worse:
        return _undertrained(worse, last.step, 2 * last.step, minutes)
    baseline = min(baselines, key=lambda name: baselines[name], default=None)
    if baseline and now > baselines[baseline]:
        steps = max(2 * last.step, _steps_to(baselines[baseline], history))
        return _undertrained(f"it is still behind the {baseline} baseline ({baselines[baseline]:.3f})", last.step, steps, minutes)
    if gain is None:
        return _undertrained("one evaluation shows no trend", last.step, 2 * last.step, minutes)
    if gain > 0.01 * last.val_loss:
        return _undertrained(f"validation still falls (about {min(gain, last.val_loss):.2f} more for twice the steps)", last.step, 2 * last.step, minutes)
    return Verdict("healthy", f"Healthy: validation has levelled off at {now:.3f} without overfitting; a larger model or more text comes next.")


def _undertrained(why: str, done: int, steps: int, minutes: float | None) -> Verdict:
    more = f"--steps {steps}" if minutes is None else f"--minutes {float(f'{minutes * steps / done:.2g}'):g}"
    return Verdict("undertrained", f"Undertrained: {why}. Train about {steps / done:.0f} times as long: --resume {more}.")


def _gain_of_doubling(history: Sequence[Point]) -> float | None:
    """Nats that validation would fall if the steps were doubled, by the trend over the second half of the run; None where there is none."""
    half = [point for point in history if point.step >= history[-1].step / 2]
    points = half if len(half) > 1 else history[-2:]
    if len(points) < 2:
        return None
    slope = np.polyfit([math.log(point.step) for point in points], [point.val_loss for point in points], 1)[0]
    return float(-slope * math.log(2))


def _steps_to(loss: float, history: Sequence[Point]) -> int:
    """Steps until the trend reaches `loss`, at most a hundred times those made, rounded to two digits."""
    gain, last = _gain_of_doubling(history), history[-1]
    doublings = (last.val_loss - loss) / gain if gain and gain > 0 else 1.0
    steps = last.step * 2 ** min(doublings, math.log2(100))
    return int(float(f"{steps:.1e}"))


@dataclass(frozen=True)
class PositionLoss:
    """The mean loss of the tokens from position `first` to `last` of their contexts; the first token of a window has position 0 and one token before it."""

    first: int
    last: int
    nats_per_token: float
    tokens: int


@torch.inference_mode()
def loss_by_position(model: GPT, tokens: Tokens | np.ndarray, machine: Machine, context_length: int | None = None) -> list[PositionLoss]:
    """The loss over all of `tokens` (N,), N >= 2, in the windows of `evaluate`, by position in the window: 0 to 15, 16 to 31, 32 to 63, and so on."""
    T = min(context_length or model.config.context_length, len(tokens) - 1)
    nats, counts = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.int64)
    step = max(1, BATCH_TOKENS // T) * T
    for start in range(0, len(tokens) - 1, step):
        piece = torch.from_numpy(tokens[start : start + step + 1].astype(np.int64)).to(machine.device)
        behind = len(piece) - 1
        whole = behind // T * T  # in windows of T; the last may be shorter
        for first, last, length in ((0, whole, T), (whole, behind, behind - whole)):
            if first == last:
                continue
            idx, targets = (piece[first + shift : last + shift].view(-1, length) for shift in (0, 1))  # (B, T)
            with machine.autocast():
                nats[:length] += model.nats_of_each(idx, targets).sum(dim=0).cpu().double()
            counts[:length] += len(idx)
    edges = [0, *(edge for power in range(4, 64) if (edge := 2**power) < T), T]
    return [PositionLoss(a, b - 1, (nats[a:b].sum() / counts[a:b].sum()).item(), int(counts[a:b].sum())) for a, b in pairwise(edges)]
