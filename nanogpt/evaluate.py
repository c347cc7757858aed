"""Loss on a whole text: nats per token, bits per byte, word perplexity, and loss by position."""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nanogpt.data.batches import MemmapTokens
from nanogpt.device.device import Machine
from nanogpt.distributed.context import DistContext
from nanogpt.model import GPT

# Limits of one forward pass: larger passes are no faster and take more memory.
BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 26


@dataclass(frozen=True)
class TextSize:
    """The size of a text in UTF-8 bytes and in whitespace-separated words (0: unknown)."""

    bytes: int
    words: int = 0


@dataclass(frozen=True)
class EvalLoss:
    """The cross-entropy of a text.

    Attributes:
        loss_sum: The sum over the predicted tokens, in nats.
        tokens: The number of predicted tokens.
        bytes: The UTF-8 bytes that these tokens stand for.
        words: The words that these tokens stand for (0: unknown).
    """

    loss_sum: float
    tokens: int
    bytes: float
    words: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte, which compares models with different tokenizers."""
        return self.loss_sum / math.log(2) / self.bytes

    @property
    def word_perplexity(self) -> float:
        """Word-level perplexity, exp(nats / words); nan if the words were not counted."""
        if not self.words:
            return math.nan
        loss_per_word = self.loss_sum / self.words
        return math.exp(loss_per_word) if loss_per_word < math.log(sys.float_info.max) else math.inf


@dataclass(frozen=True)
class LossByPosition:
    """The mean loss of the tokens at positions `first` to `last` of their windows.

    The first predicted token of a window has position 0 and one token of context.
    """

    first: int
    last: int
    loss: float
    tokens: int


class TextCounter:
    """Counts the UTF-8 bytes and the whitespace-separated words of texts."""

    def __init__(self) -> None:
        self.bytes = 0
        self.words = 0

    def count(self, chunks: Iterable[str]) -> Iterator[str]:
        """Pass on the chunks of one text and count them; a word may span several chunks."""
        is_in_word = False
        for chunk in chunks:
            self.bytes += len(chunk.encode())
            self.words += len(chunk.split())
            if is_in_word and chunk and not chunk[0].isspace():
                self.words -= 1
            if chunk:
                is_in_word = not chunk[-1].isspace()
            yield chunk


@torch.inference_mode()
def evaluate(
    model: GPT,
    tokens: MemmapTokens | np.ndarray,
    size: TextSize,
    machine: Machine,
    context_length: int | None = None,
    limit: int | None = None,
    ranks: DistContext = DistContext(),
) -> EvalLoss:
    """Compute the loss over all tokens, in non-overlapping windows.

    Every token but the first is predicted once, from the tokens before it in its window. With
    several processes, each evaluates some of the batches.

    Args:
        model: The model.
        tokens: The text, (N,) with N >= 2.
        size: The size of the text.
        machine: The device and precision.
        context_length: The window length, by default that of the model.
        limit: The number of tokens to predict, in full windows spread evenly over the text. The
            same windows are taken every time. None means all.
        ranks: The processes that share the work.

    Returns:
        The loss, equal on all processes.
    """
    T = context_length or model.config.context_length
    starts = np.arange(0, len(tokens) - 1, T)
    num_full = (len(tokens) - 1) // T
    if limit is not None and limit // T < num_full:
        chosen = np.linspace(0, num_full - 1, max(1, limit // T)).round().astype(int)
        starts = starts[chosen]
    batch_size = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.vocab_size) // T)
    batches = _batches(starts, batch_size, len(tokens) - T)
    loss_sum = 0.0
    count = 0.0
    num_rounds = -(-len(batches) // ranks.world_size)
    for i in range(ranks.rank, num_rounds * ranks.world_size, ranks.world_size):
        is_padding = i >= len(batches)
        if is_padding and not ranks.is_fsdp:
            break
        # With FSDP all processes must take part in each forward pass: repeat the last batch.
        idx, targets = _windows(tokens, batches[min(i, len(batches) - 1)], T, machine)
        with machine.autocast():
            batch_loss = model.loss_sum(idx, targets).item()
        if not is_padding:
            loss_sum += batch_loss
            count += targets.numel()
    loss_sum, count = ranks.all_reduce_sum(loss_sum, count)
    fraction = count / len(tokens)
    return EvalLoss(loss_sum, int(count), size.bytes * fraction, size.words * fraction)


@torch.inference_mode()
def loss_by_position(
    model: GPT,
    tokens: MemmapTokens | np.ndarray,
    machine: Machine,
    context_length: int | None = None,
) -> list[LossByPosition]:
    """Compute the loss by position in the window: 0 to 15, 16 to 31, 32 to 63, and so on.

    The windows are those of `evaluate`.

    Args:
        model: The model.
        tokens: The text, (N,) with N >= 2.
        machine: The device and precision.
        context_length: The window length, by default that of the model.
    """
    T = min(context_length or model.config.context_length, len(tokens) - 1)
    loss_sums = torch.zeros(T, dtype=torch.float64)
    counts = torch.zeros(T, dtype=torch.int64)
    starts = np.arange(0, len(tokens) - 1, T)
    for batch in _batches(starts, max(1, BATCH_TOKENS // T), len(tokens) - T):
        idx, targets = _windows(tokens, batch, T, machine)
        with machine.autocast():
            losses = model.token_losses(idx, targets)  # (B, T), or less in the last window
        loss_sums[: losses.shape[1]] += losses.sum(dim=0).cpu().double()
        counts[: losses.shape[1]] += len(losses)
    edges = [0, *(edge for power in range(4, 64) if (edge := 2**power) < T), T]
    buckets = []
    for start, end in pairwise(edges):
        count = int(counts[start:end].sum())
        loss = loss_sums[start:end].sum().item() / count
        buckets.append(LossByPosition(start, end - 1, loss, count))
    return buckets


def _batches(starts: np.ndarray, batch_size: int, first_short: int) -> list[np.ndarray]:
    """Split window starts into batches; a window from `first_short` on is a batch of its own."""
    num_full = int(np.searchsorted(starts, first_short))
    batches = np.split(starts, [*range(batch_size, num_full, batch_size), num_full])
    return [batch for batch in batches if len(batch)]


def _windows(
    tokens: MemmapTokens | np.ndarray, starts: np.ndarray, T: int, machine: Machine
) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of windows, (B, T), or (1, T') for a shorter last one."""
    ids = np.stack([tokens[start : start + T + 1] for start in starts])
    windows = torch.from_numpy(ids.astype(np.int64)).to(machine.device)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]
