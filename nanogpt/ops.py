"""Tensor operations that bound memory or randomness: the model calls them, and any other could.

They are seeded dropout, activation recomputation, and attention and cross-entropy in chunks.

Shapes: B batch, T queries, S keys, H heads, D channels per head, C channels, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def dropout(x: Tensor, rate: float, seeds: Tensor | None) -> Tensor:
    """Zero a fraction `rate` of the elements and scale up the others.

    The random bits come from a counter-based generator (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"). A mask depends only on the row's seed and the element's index
    in the row. It is thus equal on every device and in every split of the batch, and no generator
    state needs saving.

    Args:
        x: The activations, (B, ...).
        rate: The fraction to zero, which is rounded to a multiple of 1/256.
        seeds: One seed per row, (B,) int32. Without seeds nothing is dropped.

    Returns:
        A tensor of the shape and type of `x`, or `x` itself if nothing is dropped.
    """
    threshold = round(rate * 256)
    if seeds is None or threshold == 0:
        return x
    counter = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view(x.shape[1:])
    seeds = seeds.view(-1, *(1,) * counter.dim())  # (B, 1, ...)
    bits = _hash_int32(seeds + counter)  # (B, ...), the sum wraps at 32 bits
    is_dropped = (bits & 0xFF) < threshold
    return torch.where(is_dropped, 0.0, x * (256 / (256 - threshold))).type_as(x)


def split_dropout_seeds(seeds: Tensor, num_blocks: int) -> Tensor:
    """Derive the seeds of three dropout sites in each block: (B,) int32 -> (num_blocks, 3, B)."""
    sites = torch.arange(1, 3 * num_blocks + 1, dtype=torch.int32, device=seeds.device)
    return _hash_int32(seeds + _hash_int32(sites.view(num_blocks, 3, 1)))


def _hash_int32(x: Tensor) -> Tensor:
    """Hash int32 values with lowbias32 (Ellis and Wellons)."""
    # torch's shift copies the sign bit, so each mask makes the shift a logical one.
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def recompute(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call a function, keep only its inputs, and recompute it in the backward pass.

    This is activation checkpointing (Chen et al. 2016, section 3).
    """
    # Without gradients nothing is kept. PyTorch's function would still import the compiler, which
    # takes a second and 100 MB.
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def causal_mask(positions: Tensor, S: int, window: int | None = None) -> Tensor:
    """Return the additive attention mask of queries at these positions.

    Args:
        positions: The position of each query, (..., T).
        S: The number of keys, which are at positions 0 to S - 1.
        window: The number of keys each query attends to, its own included. None means all.

    Returns:
        A float32 mask (..., T, S): 0 where a query attends to a key, else -inf.
    """
    distance = positions.unsqueeze(-1) - torch.arange(S, device=positions.device)  # (..., T, S)
    is_masked = distance < 0
    if window is not None:
        is_masked = is_masked | (distance >= window)
    mask = torch.zeros(is_masked.shape, device=positions.device)
    return mask.masked_fill_(is_masked, -math.inf)


def attention_probs(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention probabilities (B, H, T, S) of q (B, H, T, D) and k (B, H, S, D)."""
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    masked_scores = scores if mask is None else scores.float() + mask
    return masked_scores.softmax(dim=3).type_as(scores)


def chunked_attention(
    attend: Attend,
    qkv: tuple[Tensor, Tensor, Tensor],
    window: int | None,
    chunk_size: int,
    seeds: Tensor | None,
) -> Tensor:
    """Compute causal attention in chunks of queries, so that memory is linear in the length.

    Each chunk is recomputed in the backward pass, so that one chunk's mask and probabilities are
    alive at a time. With a window, a chunk reads only the keys that one of its queries can see.

    Args:
        attend: Attention of q, k and v through a mask (T, S), with dropout seeds (B,) or None.
        qkv: Queries (B, H, T, D), the last of the S tokens, and keys and values (B, H, S, D).
        window: The number of keys each query attends to, or None for all.
        chunk_size: The number of queries and keys whose product bounds the scores of a chunk.
        seeds: Dropout seeds (B,), or None for no dropout.

    Returns:
        The attention output, (B, H, T, D).
    """
    q, k, v = qkv
    T = q.shape[2]
    S = k.shape[2]
    if window is None:
        chunk_size = max(1, chunk_size**2 // S)
    starts = range(0, T, chunk_size)
    chunk_seeds: list[Tensor | None] = [None] * len(starts)
    if seeds is not None:
        numbers = torch.arange(len(starts), dtype=torch.int32, device=seeds.device)
        chunk_seeds = list(_hash_int32(seeds + numbers.unsqueeze(1)).unbind())

    def attend_chunk(q: Tensor, k: Tensor, v: Tensor, offset: int, seed: Tensor | None) -> Tensor:
        positions = torch.arange(offset, offset + q.shape[2], device=q.device)
        return attend(q, k, v, causal_mask(positions, k.shape[2], window), seed)

    # Chunks of one size in one preallocated output keep a CPU's allocator from fragmenting.
    y = torch.empty_like(q)
    for start, seed in zip(starts, chunk_seeds, strict=True):
        q_chunk = q[:, :, start : start + chunk_size]  # (B, H, chunk, D)
        position = S - T + start
        end = position + q_chunk.shape[2]
        first_key, end_key = (0, S) if window is None else (max(0, position - window + 1), end)
        k_chunk = k[:, :, first_key:end_key]
        v_chunk = v[:, :, first_key:end_key]
        y[:, :, start : start + chunk_size] = recompute(
            attend_chunk, q_chunk, k_chunk, v_chunk, position - first_key, seed
        )
    return y


def chunked_cross_entropy(
    compute_logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    chunk_size: int,
    reduction: str,
) -> Tensor:
    """Compute the cross-entropy, in nats, while only `chunk_size` rows of logits are alive.

    The logits of a chunk are recomputed in the backward pass. A target of -100 has no loss.

    Args:
        compute_logits: The function from hidden states (N, C) to logits (N, V).
        hidden: The hidden states, (N, C).
        targets: The token to predict after each of them, (N,).
        chunk_size: The number of rows in a chunk.
        reduction: "sum" for the sum, or "none" for the loss of each target.

    Returns:
        The sum, a float32 scalar, or the losses, (N,) float32.
    """

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(compute_logits(hidden).float(), targets, reduction=reduction)

    if len(hidden) <= chunk_size:
        return chunk_loss(hidden, targets)
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [recompute(chunk_loss, *chunk) for chunk in chunks]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)
