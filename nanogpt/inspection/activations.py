"""Surprisal, attention weights, neuron activations and embedding of a model on a text.

All values are computed by the model's own modules. Hooks on their inputs record them.

Shapes: N tokens of the text, T of them in one window, C channels, L layers, H heads, V vocabulary.
"""

import codecs
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.data.batches import MemmapTokens
from nanogpt.device.device import Machine
from nanogpt.errors import UserError
from nanogpt.evaluate import BATCH_LOGITS, BATCH_TOKENS
from nanogpt.inspection.results import (
    AttentionWeights,
    Embedding,
    Excerpt,
    NeuronActivations,
    NeuronStats,
    Surprisal,
)
from nanogpt.model import GPT, MLP, Attention
from nanogpt.ops import attention_probs, causal_mask
from nanogpt.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 20_000  # the results take some kilobytes per token
MAX_ATTENTION_WEIGHTS = 1 << 27  # 4 bytes each
MAX_SEARCH_TOKENS = 16_384  # tokens read to find the excerpts with the highest activations
EXCERPT_RADIUS = 24  # tokens of an excerpt before and after its peak


@torch.inference_mode()
def surprisal(
    model: GPT,
    tokenizer: Tokenizer,
    machine: Machine,
    text: str,
    start_token: int,
    n_alternatives: int = 10,
    n_most: int = 10,
) -> Surprisal:
    """Compute the surprisal of each token of a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        machine: Device and precision.
        text: A text of up to `MAX_TOKENS` tokens.
        start_token: Id of the token that precedes the text.
        n_alternatives: Number of most probable tokens to return for each position.
        n_most: Number of most surprising tokens to return.

    Raises:
        UserError: If the text is empty or too long.
    """
    ids = _encode(tokenizer, text)
    token_ids = np.array([start_token, *ids], np.int64)  # (N + 1,)
    targets = torch.from_numpy(token_ids[1:])
    losses: list[Tensor] = []  # chunks of (N,), in nats
    top_probs: list[Tensor] = []  # chunks of (N, n_alternatives)
    top_ids: list[Tensor] = []
    num_read = 0
    for hidden in _hidden_states(model, token_ids[:-1], machine):
        for x in hidden.split(max(1, BATCH_LOGITS // model.vocab_size)):
            with machine.autocast():
                logits = model.compute_logits(x)
            log_probs = logits.float().log_softmax(dim=1).cpu()  # (n, V)
            chunk_targets = targets[num_read : num_read + len(log_probs), None]
            losses.append(-log_probs.gather(1, chunk_targets)[:, 0])
            num_read += len(log_probs)
            top = log_probs.exp().topk(min(n_alternatives, model.vocab_size))
            top_probs.append(top.values)
            top_ids.append(top.indices)
    bits = torch.cat(losses).double() / math.log(2)  # (N,)
    rows = zip(torch.cat(top_ids).tolist(), torch.cat(top_probs).tolist(), strict=True)
    return Surprisal(
        text=text,
        token_texts=token_texts(tokenizer, ids),
        token_ids=ids,
        bits=bits.tolist(),
        alternatives=[
            [(_token_name(tokenizer, i), p) for i, p in zip(row_ids, row_probs, strict=True)]
            for row_ids, row_probs in rows
        ],
        most_surprising=bits.sort(descending=True, stable=True).indices[:n_most].tolist(),
        window_starts=list(range(0, len(ids), model.config.context_length)),
        start_token=_token_name(tokenizer, start_token),
        uniform_bits=math.log2(model.vocab_size),
    )


@torch.inference_mode()
def attention(
    model: GPT, tokenizer: Tokenizer, machine: Machine, text: str, start: int = 0
) -> AttentionWeights:
    """Compute the attention weights of all heads on one window of a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        machine: Device and precision.
        text: A text of up to `MAX_TOKENS` tokens.
        start: Index of the first token to read. The window ends with the context or the text, or
            where `MAX_ATTENTION_WEIGHTS` is reached.

    Raises:
        UserError: If the text is empty or too long, or `start` is beyond its end.
    """
    ids = _encode(tokenizer, text)
    if not 0 <= start < len(ids):
        raise UserError(
            f"Token {start} does not exist: the text has {len(ids):,} tokens.", {"start": 0}
        )
    config = model.config
    max_tokens = math.isqrt(MAX_ATTENTION_WEIGHTS // (config.n_layer * config.n_head))
    window = ids[start : start + min(config.context_length, max_tokens)]
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    queries_keys: list[tuple[Tensor, Tensor]] = []

    def record(layer: int, inputs: tuple[Any, ...]) -> None:
        x, rotary, *_ = inputs
        q, k, _ = layers[layer].project_qkv(x, rotary)
        queries_keys.append((q.float(), layers[layer].repeat_kv(k).float()))  # (1, H, T, D) each

    with forward_pre_hooks(layers, record), machine.autocast():
        model.forward_hidden(torch.tensor([window], device=machine.device))
    T = len(window)
    mask = causal_mask(torch.arange(T, device=machine.device), T, layers[0].window)
    weights = [
        attention_probs(q, k, mask)[0].cpu().numpy()  # (H, T, T) float32
        for q, k in queries_keys
    ]
    texts = token_texts(tokenizer, ids)[start : start + T]
    return AttentionWeights(texts, np.stack(weights), start, len(ids))


def neurons(
    model: GPT,
    tokenizer: Tokenizer,
    machine: Machine,
    text: str,
    layer: int = 0,
    neuron: int | None = None,
    n_top: int = 20,
) -> NeuronActivations:
    """Compute the activations of an MLP neuron on a text, read in consecutive windows.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        machine: Device and precision.
        text: A text of up to `MAX_TOKENS` tokens.
        layer: Index of the layer.
        neuron: Index of the neuron in the layer; None selects the one with the largest standard
            deviation on this text.
        n_top: Number of neurons to return statistics of.

    Raises:
        UserError: If the text is empty or too long, or the layer or the neuron does not exist.
    """
    _check_neuron(model, layer, neuron)
    ids = _encode(tokenizer, text)
    chunks = _neuron_activations(model, np.array(ids, np.int64), machine, layer)
    acts = np.concatenate(list(chunks))  # (N, hidden)
    std = acts.std(axis=0, dtype=np.float64)
    order = np.argsort(-std, kind="stable")[:n_top].tolist()
    selected = order[0] if neuron is None else neuron
    top_neurons = [
        NeuronStats(i, float(std[i]), np.argsort(-acts[:, i], kind="stable")[:3].tolist())
        for i in order
    ]
    texts = token_texts(tokenizer, ids)
    return NeuronActivations(texts, layer, selected, acts[:, selected].copy(), top_neurons)


def top_activating_excerpts(
    model: GPT,
    tokenizer: Tokenizer,
    machine: Machine,
    tokens: MemmapTokens | np.ndarray,
    layer: int,
    neuron: int,
    n: int = 10,
) -> list[Excerpt]:
    """Find the excerpts of held-out tokens with the highest activations of a neuron.

    Long texts are searched in windows evenly spread over them, `MAX_SEARCH_TOKENS` tokens in all.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        machine: Device and precision.
        tokens: Held-out token ids (M,).
        layer: Index of the layer.
        neuron: Index of the neuron in the layer.
        n: Maximum number of excerpts, at most one per window of the context.

    Returns:
        Excerpts in descending order of their highest activation.

    Raises:
        UserError: If the layer or the neuron does not exist.
    """
    _check_neuron(model, layer, neuron)
    T = min(model.config.context_length, len(tokens))
    starts = np.arange(0, len(tokens) - T + 1, T)
    max_windows = max(1, MAX_SEARCH_TOKENS // T)
    if len(starts) > max_windows:
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).round().astype(int)]
    windows = np.stack([tokens[start : start + T] for start in starts.tolist()]).astype(np.int64)
    chunks = _neuron_activations(model, windows.reshape(-1), machine, layer)
    acts = np.concatenate([chunk[:, neuron] for chunk in chunks]).reshape(-1, T)
    excerpts = []
    for window in np.argsort(-acts.max(axis=1), kind="stable")[:n].tolist():
        peak = int(acts[window].argmax())
        start = max(0, peak - EXCERPT_RADIUS)
        stop = min(T, peak + EXCERPT_RADIUS + 1)
        texts = token_texts(tokenizer, windows[window, start:stop].tolist())
        activations = acts[window, start:stop].tolist()
        excerpts.append(Excerpt(texts, activations, peak - start, int(starts[window]) + peak))
    return excerpts


@torch.inference_mode()
def embedding(
    model: GPT, tokenizer: Tokenizer, unseen_token_ranges: Sequence[Sequence[int]] = ()
) -> Embedding:
    """Project the token embeddings onto their first two principal components (Pearson 1901).

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        unseen_token_ranges: Ranges [start, stop) of token ids to leave out.
    """
    wte = model.embedding_table().float()
    is_seen = np.ones(model.vocab_size, bool)
    for start, stop in unseen_token_ranges:
        is_seen[start:stop] = False
    x = wte.cpu().double().numpy()[is_seen]  # (V, C)
    x -= x.mean(axis=0)
    variances, axes = np.linalg.eigh(x.T @ x)  # in ascending order
    components = x @ axes[:, ::-1][:, :2]  # (V, 2), or (V, 1) if C == 1
    coords = np.zeros((len(x), 2))
    coords[:, : components.shape[1]] = components
    extremes = np.take_along_axis(coords, np.abs(coords).argmax(axis=0)[None], axis=0)
    coords *= np.where(extremes < 0, -1, 1)
    ratios = np.maximum(variances[::-1], 0) / max(variances.sum(), np.finfo(float).tiny)
    ids = np.flatnonzero(is_seen).tolist()
    return Embedding(
        [_token_name(tokenizer, i) for i in ids],
        ids,
        coords.astype(np.float32),
        (float(ratios[0]), float(ratios[1]) if len(ratios) > 1 else 0.0),
    )


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Return the text of each token.

    A character of several tokens belongs to the last of them. An incomplete character at the
    start or the end becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.token_bytes[i]) for i in ids]


@contextmanager
def forward_pre_hooks(
    modules: Sequence[nn.Module], callback: Callable[[int, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Call `callback` with the index and the inputs of each module that runs in this thread.

    Calls from other threads, which may use the model at the same time, are ignored.
    """
    thread_id = threading.get_ident()

    def make_hook(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if threading.get_ident() == thread_id:
                callback(index, inputs)

        return hook

    handles = [module.register_forward_pre_hook(make_hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the token ids of a text that is neither empty nor too long."""
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("There is nothing to inspect: the text is empty.", "Pass a text.")
    if len(ids) > MAX_TOKENS:
        raise UserError(
            f"The text is too long: {len(ids):,} tokens (limit {MAX_TOKENS:,}).",
            "Inspect a part of it. Evaluation and the memorization check have no limit.",
        )
    return ids


def _check_neuron(model: GPT, layer: int, neuron: int | None) -> None:
    """Raise a `UserError` if the layer or the neuron does not exist."""
    layers = _down_projections(model)
    if not 0 <= layer < len(layers):
        last = len(layers) - 1
        raise UserError(
            f"There is no layer {layer}: the model has layers 0 to {last}.", {"layer": last}
        )
    last = layers[layer].in_features - 1
    if neuron is not None and not 0 <= neuron <= last:
        raise UserError(
            f"There is no neuron {neuron}: a layer has neurons 0 to {last:,}.", {"neuron": last}
        )


def _down_projections(model: GPT) -> list[nn.Linear]:
    """Return the second linear layer of each MLP, whose inputs are the neurons."""
    return [module.down_proj for module in model.modules() if isinstance(module, MLP)]


def _token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return the text of a token, in which incomplete characters are escaped, such as \xe6."""
    return tokenizer.token_bytes[token_id].decode("utf-8", errors="backslashreplace")


def _hidden_states(model: GPT, ids: np.ndarray, machine: Machine) -> Iterator[Tensor]:
    """Yield the final hidden states of ids (N,), read in consecutive windows, in chunks (n, C)."""
    T = model.config.context_length
    num_full = len(ids) // T * T  # tokens in windows of full length
    for windows in (ids[:num_full].reshape(-1, T), ids[None, num_full:]):
        if windows.size:
            for idx in torch.from_numpy(windows).split(max(1, BATCH_TOKENS // T)):
                with machine.autocast():
                    yield model.forward_hidden(idx.to(machine.device)).flatten(0, 1)


@torch.inference_mode()
def _neuron_activations(
    model: GPT, ids: np.ndarray, machine: Machine, layer: int
) -> Iterator[np.ndarray]:
    """Yield the activations of a layer on ids (N,), in chunks (n, hidden) of float32."""
    recorded: list[Tensor] = []
    with forward_pre_hooks(
        [_down_projections(model)[layer]], lambda _, inputs: recorded.append(inputs[0])
    ):
        for _ in _hidden_states(model, ids, machine):
            yield recorded.pop().flatten(0, 1).float().cpu().numpy()
