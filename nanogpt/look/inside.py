"""What happens inside a model while it reads a text: surprise, attention, neurons; and its alphabet as a map.

In: a model, its tokenizer, where it runs, and plain text. Out: the dataclasses of `findings`.
Refuses: an empty text, one of more than `MOST_TOKENS` tokens, and layers and neurons that are not there.

Everything is read off the model's own modules, by hooks on what goes into them; the only other sums are those of the softmax.

N tokens of the text, T of them at a time, L layers, H heads, V vocabulary.
"""

import codecs
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.data import Tokens
from nanogpt.errors import UserError
from nanogpt.evaluate import BATCH_LOGITS, BATCH_TOKENS
from nanogpt.look.findings import Attention, Embedding, Excerpt, Neurons, Surprise, Varying
from nanogpt.machine import Machine
from nanogpt.model import EPSILON, GPT, FeedForward, causal_mask
from nanogpt.model import Attention as Attn
from nanogpt.tokenizer import Tokenizer

MOST_TOKENS = 20_000  # of a text: what is kept of each takes some kilobytes
MOST_WEIGHTS = 1 << 27  # of attention, at four bytes each
EXCITING_TOKENS = 16_384  # that are read in search of what excites a neuron


@torch.inference_mode()
def surprise(model: GPT, tokenizer: Tokenizer, machine: Machine, text: str, start: int, n_alternatives: int = 10, n_most: int = 10) -> Surprise:
    """The surprise at each token of a text that begins after the token `start`."""
    ids, T = _encode(tokenizer, text), model.config.context_length
    line = np.array([start, *ids], np.int64)
    targets = torch.from_numpy(line[1:])
    nats: list[Tensor] = []  # (N,), in parts
    values: list[Tensor] = []  # (N, n)
    places: list[Tensor] = []
    seen = 0
    for x in _streams(model, line[:-1], machine):
        for part in x.split(max(1, BATCH_LOGITS // model.vocab_size)):
            with machine.autocast():
                logits = model.logits(part)
            logs = logits.float().log_softmax(dim=1).cpu()  # (n, V)
            nats.append(-logs.gather(1, targets[seen : seen + len(logs), None])[:, 0])
            seen += len(logs)
            likeliest = logs.exp().topk(min(n_alternatives, model.vocab_size))
            values.append(likeliest.values)
            places.append(likeliest.indices)
    bits = torch.cat(nats).double() / math.log(2)  # (N,)
    names = _names(tokenizer)
    alternatives = [
        [(names(i), p) for i, p in zip(row, probabilities, strict=True)]
        for row, probabilities in zip(torch.cat(places).tolist(), torch.cat(values).tolist(), strict=True)
    ]
    most = bits.sort(descending=True, stable=True).indices[:n_most].tolist()
    windows = list(range(0, len(ids), T))
    return Surprise(text, pieces(tokenizer, ids), ids, bits.tolist(), alternatives, most, windows, names(start), math.log2(model.vocab_size))


@torch.inference_mode()
def attention(model: GPT, tokenizer: Tokenizer, machine: Machine, text: str, first: int = 0) -> Attention:
    """The attention of every layer and head while a text is read from token number `first` on, as far as the context goes (and `MOST_WEIGHTS`)."""
    ids = _encode(tokenizer, text)
    if not 0 <= first < len(ids):
        raise UserError(f"The text has {len(ids):,} tokens: there is none number {first}.", f"Begin at 0 to {len(ids) - 1}.")
    config = model.config
    T = min(config.context_length, math.isqrt(MOST_WEIGHTS // (config.n_layer * config.n_head)))
    part = ids[first : first + T]
    attentions = [part for part in model.modules() if isinstance(part, Attn)]
    qk: list[tuple[Tensor, Tensor]] = []

    def note(layer: int, inputs: tuple[Any, ...]) -> None:
        x, turn, *_ = inputs
        q, k, _ = attentions[layer].heads(x, turn)
        qk.append((q.float(), attentions[layer].share(k).float()))  # (1, H, T, D) each

    with listening(attentions, note), machine.autocast():
        model.trunk(torch.tensor([part], device=machine.device))
    mask = causal_mask(torch.arange(len(part), device=machine.device), len(part), attentions[0].window)
    weights = [attn.weights(q, k, mask)[0].cpu().numpy() for attn, (q, k) in zip(attentions, qk, strict=True)]  # (H, T, T) each, in float32
    return Attention(pieces(tokenizer, ids)[first : first + T], np.stack(weights), first, len(ids))


def neurons(model: GPT, tokenizer: Tokenizer, machine: Machine, text: str, layer: int = 0, neuron: int | None = None, n_strongest: int = 20) -> Neurons:
    """What a neuron does while a text is read, in windows of the context side by side; without a number, the one that varies most."""
    _require_neuron(model, layer, neuron)
    ids = _encode(tokenizer, text)
    acts = np.concatenate(list(_activations(model, np.array(ids, np.int64), machine, layer)))  # (N, hidden)
    spread = acts.std(axis=0, dtype=np.float64)
    order = np.argsort(-spread, kind="stable")[:n_strongest].tolist()
    chosen = order[0] if neuron is None else neuron
    strongest = [Varying(i, float(spread[i]), np.argsort(-acts[:, i], kind="stable")[:3].tolist()) for i in order]
    return Neurons(pieces(tokenizer, ids), layer, chosen, acts[:, chosen].copy(), strongest)


def exciting(
    model: GPT, tokenizer: Tokenizer, machine: Machine, tokens: Tokens | np.ndarray, layer: int, neuron: int, n: int = 10, width: int = 24
) -> list[Excerpt]:
    """The passages of held-out `tokens` (M,) at which a neuron is most active, at most one from a window of the context; the most active first.

    An excerpt has up to `width` tokens on either side. Of a long text `EXCITING_TOKENS` are read, in windows spread evenly over it.
    """
    _require_neuron(model, layer, neuron)
    T = min(model.config.context_length, len(tokens))
    starts = np.arange(0, len(tokens) - T + 1, T)
    most = max(1, EXCITING_TOKENS // T)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
    read = np.concatenate([tokens[start : start + T] for start in starts.tolist()]).astype(np.int64)
    acts = np.concatenate([part[:, neuron] for part in _activations(model, read, machine, layer)]).reshape(-1, T)
    excerpts = []
    for window in np.argsort(-acts.max(axis=1), kind="stable")[:n].tolist():
        peak = int(acts[window].argmax())
        begin, end = max(0, peak - width), min(T, peak + width + 1)
        ids = read[window * T + begin : window * T + end].tolist()
        excerpts.append(Excerpt(pieces(tokenizer, ids), acts[window, begin:end].tolist(), peak - begin, int(starts[window]) + peak))
    return excerpts


@torch.inference_mode()
def embedding(model: GPT, tokenizer: Tokenizer, unused: Sequence[Sequence[int]] = ()) -> Embedding:
    """The tokens in two dimensions, by principal component analysis (Pearson 1901); `unused` are ranges of tokens [first, behind the last] to leave out."""
    wte = model.wte.weight.float()
    if model.config.arch == "modern":  # which reads its embedding at unit size
        wte = F.rms_norm(wte, wte.shape[1:], eps=EPSILON)
    used = np.ones(model.vocab_size, bool)
    for first, behind in unused:
        used[first:behind] = False
    x = wte.cpu().double().numpy()[used]  # (V, C)
    x -= x.mean(axis=0)
    variances, axes = np.linalg.eigh(x.T @ x)  # ascending
    xy = np.zeros((len(x), 2))
    components = x @ axes[:, ::-1][:, :2]  # (V, 2), or (V, 1) of a model that is one channel wide
    xy[:, : components.shape[1]] = components
    xy *= np.where(np.take_along_axis(xy, np.abs(xy).argmax(axis=0)[None], axis=0) < 0, -1, 1)
    shares = np.maximum(variances[::-1], 0) / max(variances.sum(), np.finfo(float).tiny)
    ids = np.flatnonzero(used).tolist()
    names = _names(tokenizer)
    return Embedding([names(i) for i in ids], ids, xy.astype(np.float32), (float(shares[0]), float(shares[1]) if len(shares) > 1 else 0.0))


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token; a character of several tokens belongs to the last of them. What is cut off at the beginning or the end is U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(tokenizer.token_bytes[i]) for i in ids]


@contextmanager
def listening(modules: Sequence[nn.Module], note: Callable[[int, tuple[Any, ...]], None]) -> Iterator[None]:
    """While it lasts, `note` gets the number of each of the modules that runs in this thread, and what goes into it; other threads may use the model too."""
    mine = threading.get_ident()

    def hook(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def heard(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if threading.get_ident() == mine:
                note(number, inputs)

        return heard

    handles = [module.register_forward_pre_hook(hook(number)) for number, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("There is nothing to look at: the text is empty.", 'Name a file with text in it, or give the text itself with --text "...".')
    if len(ids) > MOST_TOKENS:
        fix = "Give it a part of the text. nanogpt eval measures all of it, and nanogpt look --copies searches all of it."
        raise UserError(f"The text has {len(ids):,} tokens; at most {MOST_TOKENS:,} can be looked at.", fix)
    return ids


def _require_neuron(model: GPT, layer: int, neuron: int | None) -> None:
    layers = _second_layers(model)
    if not 0 <= layer < len(layers):
        raise UserError(f"There is no layer {layer}: the model has {len(layers)}.", f"Use --layer 0 to {len(layers) - 1}.")
    width = layers[layer].in_features
    if neuron is not None and not 0 <= neuron < width:
        raise UserError(f"There is no neuron {neuron}: a layer has {width:,}.", f"Use --neuron 0 to {width - 1}.")


def _second_layers(model: GPT) -> list[nn.Linear]:
    """Of each feed-forward the linear layer that reads its neurons."""
    return [part.proj for part in model.modules() if isinstance(part, FeedForward)]


def _names(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What to call a token by itself: its text, or of a part of a character its bytes, such as \\xe6."""
    return lambda i: tokenizer.token_bytes[i].decode("utf-8", errors="backslashreplace")


def _streams(model: GPT, ids: np.ndarray, machine: Machine) -> Iterator[Tensor]:
    """ids (N,) read in windows of the context side by side -> the stream after each of them, (N, C), in parts."""
    T = model.config.context_length
    whole = len(ids) // T * T  # in windows of T; the last may be shorter
    for windows in (ids[:whole].reshape(-1, T), ids[None, whole:]):
        if windows.size:
            for idx in torch.from_numpy(windows).split(max(1, BATCH_TOKENS // T)):
                with machine.autocast():
                    yield model.trunk(idx.to(machine.device)).flatten(0, 1)


@torch.inference_mode()
def _activations(model: GPT, ids: np.ndarray, machine: Machine, layer: int) -> Iterator[np.ndarray]:
    """ids (N,) -> the activations of all neurons of a layer after each of them, (N, hidden) float32, in parts."""
    heard: list[Tensor] = []
    with listening([_second_layers(model)[layer]], lambda _, inputs: heard.append(inputs[0])):
        for _ in _streams(model, ids, machine):
            yield heard.pop().flatten(0, 1).float().cpu().numpy()
