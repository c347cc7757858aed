"""`Inspector`: all inspections of one model on one text.

All values are computed by the model's own modules. Hooks on their inputs record them.

Shapes: N tokens of the text, T of them in one window, C channels, L layers, H heads, V vocabulary.
"""

import codecs
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.data.batches import MemmapTokens
from nanogpt.device.device import Machine
from nanogpt.errors import UserError
from nanogpt.evaluate import BATCH_LOGITS, BATCH_TOKENS
from nanogpt.inspection import results
from nanogpt.inspection.fingerprint_index import FingerprintIndex
from nanogpt.inspection.memorization import Memorization, attach_sources, measure_memorization
from nanogpt.model import GPT, MLP, Attention
from nanogpt.ops import attention_probs, causal_mask
from nanogpt.tokenizer.tokenizer import Tokenizer

MAX_TOKENS = 20_000  # the results take some kilobytes per token
MAX_ATTENTION_WEIGHTS = 1 << 27  # 4 bytes each
MAX_SEARCH_TOKENS = 16_384  # tokens read to find the excerpts with the highest activations
EXCERPT_RADIUS = 24  # tokens of an excerpt before and after its peak
NUM_MOST_SURPRISING = 10  # tokens listed
NUM_TOP_NEURONS = 20  # neurons with statistics
MAX_SOURCE_BYTES = 50_000_000  # training text up to this size is reread to name its files


@dataclass(frozen=True)
class Inspector:
    """Inspections of a model on a text; each method computes one.

    Attributes:
        text: The text, of up to `MAX_TOKENS` tokens except for `memorization`.
        model: The model.
        tokenizer: Its tokenizer.
        machine: Device and precision.
        start_token: Id of the token that precedes the text.
        unseen_token_ranges: Ranges [start, stop) of token ids that were not in the training text.
        load_index: Opens the index of the training text. Raises `UserError` if that is gone.
        load_held_out: Opens the validation split. Raises `UserError` if that is gone.
        read_sources: Reads name and text of each document of the run.
    """

    text: str
    model: GPT
    tokenizer: Tokenizer
    machine: Machine
    start_token: int
    unseen_token_ranges: Sequence[Sequence[int]]
    load_index: Callable[[], FingerprintIndex]
    load_held_out: Callable[[], MemmapTokens | np.ndarray]
    read_sources: Callable[[], Iterable[tuple[str, str]]]

    @torch.inference_mode()
    def surprisal(self, n_alternatives: int = 10) -> results.Surprisal:
        """Compute the surprisal of each token of the text.

        Args:
            n_alternatives: Number of most probable tokens to return for each position.

        Raises:
            UserError: If the text is empty or too long.
        """
        ids = self._encode_text()
        vocab_size = self.model.vocab_size
        token_ids = np.array([self.start_token, *ids], np.int64)  # (N + 1,)
        targets = torch.from_numpy(token_ids[1:])
        losses: list[Tensor] = []  # chunks of (N,), in nats
        top_probs: list[Tensor] = []  # chunks of (N, n_alternatives)
        top_ids: list[Tensor] = []
        num_read = 0
        for hidden in self._hidden_states(token_ids[:-1]):
            for x in hidden.split(max(1, BATCH_LOGITS // vocab_size)):
                with self.machine.autocast():
                    logits = self.model.compute_logits(x)
                log_probs = logits.float().log_softmax(dim=1).cpu()  # (n, V)
                chunk_targets = targets[num_read : num_read + len(log_probs), None]
                losses.append(-log_probs.gather(1, chunk_targets)[:, 0])
                num_read += len(log_probs)
                top = log_probs.exp().topk(min(n_alternatives, vocab_size))
                top_probs.append(top.values)
                top_ids.append(top.indices)
        bits = torch.cat(losses).double() / math.log(2)  # (N,)
        most_surprising = bits.sort(descending=True, stable=True).indices[:NUM_MOST_SURPRISING]
        rows = zip(torch.cat(top_ids).tolist(), torch.cat(top_probs).tolist(), strict=True)
        return results.Surprisal(
            text=self.text,
            token_texts=token_texts(self.tokenizer, ids),
            token_ids=ids,
            bits=bits.tolist(),
            alternatives=[
                list(zip(map(self._token_name, row_ids), row_probs, strict=True))
                for row_ids, row_probs in rows
            ],
            most_surprising=most_surprising.tolist(),
            window_starts=list(range(0, len(ids), self.model.config.context_length)),
            start_token=self._token_name(self.start_token),
            uniform_bits=math.log2(vocab_size),
        )

    @torch.inference_mode()
    def attention(self, start: int = 0) -> results.AttentionWeights:
        """Compute the attention weights of all heads on one window of the text.

        Args:
            start: Index of the first token to read. The window ends with the context or the text,
                or where `MAX_ATTENTION_WEIGHTS` is reached.

        Raises:
            UserError: If the text is empty or too long, or `start` is beyond its end.
        """
        ids = self._encode_text()
        if not 0 <= start < len(ids):
            raise UserError(
                f"Token {start} does not exist: the text has {len(ids):,} tokens.", {"start": 0}
            )
        config, device = self.model.config, self.machine.device
        max_tokens = math.isqrt(MAX_ATTENTION_WEIGHTS // (config.n_layer * config.n_head))
        window = ids[start : start + min(config.context_length, max_tokens)]
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        queries_keys: list[tuple[Tensor, Tensor]] = []

        def record(layer: int, inputs: tuple[Any, ...]) -> None:
            x, rotary, *_ = inputs
            q, k, _ = layers[layer].project_qkv(x, rotary)
            queries_keys.append((q.float(), layers[layer].repeat_kv(k).float()))  # (1, H, T, D)

        with forward_pre_hooks(layers, record), self.machine.autocast():
            self.model.forward_hidden(torch.tensor([window], device=device))
        T = len(window)
        mask = causal_mask(torch.arange(T, device=device), T, layers[0].window)
        weights = [attention_probs(q, k, mask)[0].cpu().numpy() for q, k in queries_keys]
        texts = token_texts(self.tokenizer, ids)[start : start + T]
        return results.AttentionWeights(texts, np.stack(weights), start, len(ids))

    def neurons(
        self, layer: int = 0, neuron: int | None = None, n_excerpts: int = 0
    ) -> results.NeuronActivations:
        """Compute the activations of an MLP neuron on the text, read in consecutive windows.

        Args:
            layer: Index of the layer.
            neuron: Index of the neuron in the layer; None selects the one with the largest
                standard deviation on this text.
            n_excerpts: Maximum number of excerpts of the validation split to add, if that is
                available.

        Raises:
            UserError: If the text is empty or too long, or the layer or the neuron does not exist.
        """
        down_proj = self._down_projection(layer, neuron)
        ids = self._encode_text()
        acts = np.concatenate(list(self._neuron_activations(ids, down_proj)))  # (N, hidden)
        std = acts.std(axis=0, dtype=np.float64)
        order = np.argsort(-std, kind="stable")[:NUM_TOP_NEURONS].tolist()
        selected = order[0] if neuron is None else neuron
        top_neurons = [
            results.NeuronStats(
                i, float(std[i]), np.argsort(-acts[:, i], kind="stable")[:3].tolist()
            )
            for i in order
        ]
        excerpts: list[results.Excerpt] = []
        if n_excerpts:
            with suppress(UserError):
                excerpts = self.top_activating_excerpts(layer, selected, n_excerpts)
        texts = token_texts(self.tokenizer, ids)
        return results.NeuronActivations(
            texts, layer, selected, acts[:, selected].copy(), top_neurons, excerpts
        )

    def top_activating_excerpts(
        self, layer: int, neuron: int, n: int = 10
    ) -> list[results.Excerpt]:
        """Find the excerpts of the validation split with the highest activations of a neuron.

        Long splits are searched in windows evenly spread over them, `MAX_SEARCH_TOKENS` tokens in
        all.

        Args:
            layer: Index of the layer.
            neuron: Index of the neuron in the layer.
            n: Maximum number of excerpts, at most one per window of the context.

        Returns:
            Excerpts in descending order of their highest activation.

        Raises:
            UserError: If the validation split is gone, or the layer or neuron does not exist.
        """
        tokens = self.load_held_out()
        down_proj = self._down_projection(layer, neuron)
        T = min(self.model.config.context_length, len(tokens))
        starts = np.arange(0, len(tokens) - T + 1, T)
        max_windows = max(1, MAX_SEARCH_TOKENS // T)
        if len(starts) > max_windows:
            starts = starts[np.linspace(0, len(starts) - 1, max_windows).round().astype(int)]
        windows = np.stack([tokens[start : start + T] for start in starts.tolist()])
        chunks = self._neuron_activations(windows.reshape(-1), down_proj)
        acts = np.concatenate([chunk[:, neuron] for chunk in chunks]).reshape(-1, T)
        excerpts = []
        for window in np.argsort(-acts.max(axis=1), kind="stable")[:n].tolist():
            peak = int(acts[window].argmax())
            part = slice(max(0, peak - EXCERPT_RADIUS), peak + EXCERPT_RADIUS + 1)
            texts = token_texts(self.tokenizer, windows[window, part].tolist())
            activations = acts[window, part].tolist()
            position = int(starts[window]) + peak
            excerpts.append(results.Excerpt(texts, activations, peak - part.start, position))
        return excerpts

    @torch.inference_mode()
    def embedding(self) -> results.Embedding:
        """Project the token embeddings onto their first two principal components (Pearson 1901).

        The text is not used.
        """
        is_seen = np.ones(self.model.vocab_size, bool)
        for start, stop in self.unseen_token_ranges:
            is_seen[start:stop] = False
        x = self.model.embedding_table().float().cpu().double().numpy()[is_seen]  # (V, C)
        x -= x.mean(axis=0)
        variances, axes = np.linalg.eigh(x.T @ x)  # in ascending order
        components = x @ axes[:, ::-1][:, :2]  # (V, 2), or (V, 1) if C == 1
        coords = np.zeros((len(x), 2))
        coords[:, : components.shape[1]] = components
        extremes = np.take_along_axis(coords, np.abs(coords).argmax(axis=0)[None], axis=0)
        coords *= np.where(extremes < 0, -1, 1)
        ratios = np.maximum(variances[::-1], 0) / max(variances.sum(), np.finfo(float).tiny)
        ids = np.flatnonzero(is_seen).tolist()
        return results.Embedding(
            [self._token_name(i) for i in ids],
            ids,
            coords.astype(np.float32),
            (float(ratios[0]), float(ratios[1]) if len(ratios) > 1 else 0.0),
        )

    def memorization(self) -> Memorization:
        """Find the passages of the text that occur verbatim in the training text.

        Raises:
            UserError: If the training text is gone.
        """
        result = measure_memorization(self.load_index(), self.text)
        # The prepared tokens may outlive the source files, whose names are optional.
        with suppress(UserError, OSError):
            if result.passages and result.indexed_bytes <= MAX_SOURCE_BYTES:
                return attach_sources(result, self.read_sources())
        return result

    def _encode_text(self) -> list[int]:
        """Return the token ids of the text, unless it is empty or too long."""
        ids = self.tokenizer.encode(self.text)
        if not ids:
            raise UserError("There is nothing to inspect: the text is empty.", "Pass a text.")
        if len(ids) > MAX_TOKENS:
            raise UserError(
                f"The text is too long: {len(ids):,} tokens (limit {MAX_TOKENS:,}).",
                "Inspect a part of it. Evaluation and the memorization check have no limit.",
            )
        return ids

    def _token_name(self, token_id: int) -> str:
        r"""Return the text of a token; incomplete characters are escaped, such as \xe6."""
        return self.tokenizer.token_bytes[token_id].decode("utf-8", errors="backslashreplace")

    def _down_projection(self, layer: int, neuron: int | None) -> nn.Linear:
        """Return the second linear layer of an MLP, whose inputs are the neurons.

        Raises:
            UserError: If the layer or the neuron does not exist.
        """
        layers = [module.down_proj for module in self.model.modules() if isinstance(module, MLP)]
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
        return layers[layer]

    def _hidden_states(self, ids: np.ndarray) -> Iterator[Tensor]:
        """Yield the final hidden states of ids (N,) int64, in chunks (n, C).

        The ids are read in consecutive windows.
        """
        T = self.model.config.context_length
        num_full = len(ids) // T * T  # tokens in windows of full length
        for windows in (ids[:num_full].reshape(-1, T), ids[None, num_full:]):
            if windows.size:
                for idx in torch.from_numpy(windows).split(max(1, BATCH_TOKENS // T)):
                    with self.machine.autocast():
                        yield self.model.forward_hidden(idx.to(self.machine.device)).flatten(0, 1)

    @torch.inference_mode()
    def _neuron_activations(
        self, ids: Sequence[int] | np.ndarray, down_proj: nn.Linear
    ) -> Iterator[np.ndarray]:
        """Yield the activations of a layer on ids (N,), in chunks (n, hidden) of float32."""
        recorded: list[Tensor] = []
        with forward_pre_hooks([down_proj], lambda _, inputs: recorded.append(inputs[0])):
            for _ in self._hidden_states(np.array(ids, np.int64)):
                yield recorded.pop().flatten(0, 1).float().cpu().numpy()


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
