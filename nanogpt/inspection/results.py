"""Results of inspection as plain frozen dataclasses; `asdict` makes each ready for JSON.

Shapes: N tokens of the text, T of them in one window, L layers, H heads, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Result:
    """A result of inspection."""

    def asdict(self) -> dict[str, Any]:
        """Return the fields and the properties as plain lists and numbers."""
        values = asdict(self)
        for name, attribute in vars(type(self)).items():
            if isinstance(attribute, property):
                values[name] = getattr(self, name)
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        tuples = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | tuples | {name: array.tolist() for name, array in arrays.items()}


@dataclass(frozen=True)
class Surprisal(Result):
    """The surprisal of each token of a text, in bits: -log2 of its predicted probability.

    A text longer than the context is read in consecutive windows, as in `evaluate`. The first
    token of a window is predicted from the last token of the previous window only. Therefore
    `total_bits` equals the loss that `evaluate` returns for `start_token` followed by the text.

    Attributes:
        text: The text.
        token_texts: Text of each token (N). A character of several tokens belongs to the last of
            them; the others have "".
        token_ids: Token ids (N).
        bits: Surprisal of each token (N).
        alternatives: For each token (N), the most probable tokens in its place with their
            probabilities, in descending order.
        most_surprising: Indices of the tokens with the most bits, in descending order.
        window_starts: Index of the first token of each window.
        start_token: Text of the token that precedes the first one.
        uniform_bits: Surprisal of a token if all tokens were equally probable.
    """

    text: str
    token_texts: list[str]
    token_ids: list[int]
    bits: list[float]
    alternatives: list[list[tuple[str, float]]]
    most_surprising: list[int]
    window_starts: list[int]
    start_token: str
    uniform_bits: float

    @property
    def total_bits(self) -> float:
        """Return the information content of the text under the model, in bits."""
        return math.fsum(self.bits)

    @property
    def bits_per_token(self) -> float:
        """Return the mean surprisal of a token."""
        return self.total_bits / len(self.bits)

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte of UTF-8, which are comparable between tokenizers."""
        return self.total_bits / len(self.text.encode())

    @property
    def bits_per_character(self) -> float:
        """Return the mean bits of a character."""
        return self.total_bits / len(self.text)

    @property
    def character_bits(self) -> list[float]:
        """Return the bits of each character; those of a token are divided evenly among its."""
        return [
            bits / len(token_text)
            for _, token_text, bits in self.complete_tokens()
            for _ in token_text
        ]

    def complete_tokens(self) -> Iterator[tuple[int, str, float]]:
        """Yield index, text and bits of each token that completes a character.

        Its bits include those of the preceding tokens of the same character.
        """
        pending_bits = 0.0
        for i, (token_text, bits) in enumerate(zip(self.token_texts, self.bits, strict=True)):
            pending_bits += bits
            if token_text:
                yield i, token_text, pending_bits
                pending_bits = 0.0


@dataclass(frozen=True)
class HeadStats:
    """Attention of one head, averaged over the tokens of a text.

    Attributes:
        layer: Index of the layer.
        head: Index of the head in its layer.
        mean_distance: Mean distance of attention, in tokens.
        self_weight: Mean weight on the token itself.
        prev_weight: Mean weight on the previous token.
        first_weight: Mean weight on the first token.
    """

    layer: int
    head: int
    mean_distance: float
    self_weight: float
    prev_weight: float
    first_weight: float


@dataclass(frozen=True)
class AttentionWeights(Result):
    """Attention weights of all heads on one window of a text.

    Attributes:
        token_texts: Text of each token of the window (T).
        weights: Float32 (L, H, T, T). `weights[l, h, i, j]` is the weight of token j for token i;
            rows sum to 1, and weights with j > i are 0.
        start: Index in the text of the first token of the window.
        num_tokens: Number of tokens of the text.
    """

    token_texts: list[str]
    weights: np.ndarray
    start: int
    num_tokens: int

    @property
    def heads(self) -> list[HeadStats]:
        """Return the statistics of all heads, layer by layer."""
        n_layer, n_head, T, _ = self.weights.shape
        distance = np.arange(T)[:, None] - np.arange(T)  # (T, T)
        stats = np.stack(
            [
                (self.weights * distance).sum(axis=3).mean(axis=2, dtype=np.float64),
                self.weights.diagonal(0, 2, 3).sum(axis=2) / T,
                self.weights.diagonal(-1, 2, 3).sum(axis=2) / T,
                self.weights[:, :, :, 0].mean(axis=2, dtype=np.float64),
            ],
            axis=2,
        )  # (L, H, 4)
        return [
            HeadStats(layer, head, *stats[layer, head].tolist())
            for layer in range(n_layer)
            for head in range(n_head)
        ]

    def asdict(self) -> dict[str, Any]:
        """Return the fields, with weights rounded to six digits, and `heads`."""
        return vars(self) | {
            "weights": self.weights.astype(float).round(6).tolist(),
            "heads": [asdict(head) for head in self.heads],
        }


@dataclass(frozen=True)
class NeuronStats:
    """Activations of one neuron on a text.

    Attributes:
        neuron: Index of the neuron in its layer.
        std: Standard deviation of its activations.
        top_positions: Indices of the three tokens with the highest activations, in descending
            order.
    """

    neuron: int
    std: float
    top_positions: list[int]


@dataclass(frozen=True)
class Excerpt(Result):
    """An excerpt of held-out text around a token with a high activation.

    Attributes:
        token_texts: Text of each token of the excerpt.
        activations: Activation of the neuron at each token.
        peak: Index in the excerpt of the highest activation.
        position: Index of that token in the validation split.
    """

    token_texts: list[str]
    activations: list[float]
    peak: int
    position: int


@dataclass(frozen=True)
class NeuronActivations(Result):
    """Activations of one MLP neuron on a text.

    A neuron is a channel of the input of `down_proj`: after GELU in `gpt2`, after the product of
    gate and value in `qwen3`.

    Attributes:
        token_texts: Text of each token (N).
        layer: Index of the layer.
        neuron: Index of the neuron in the layer.
        activations: Activation at each token, float32 (N).
        top_neurons: Neurons of the layer with the largest standard deviation on this text, in
            descending order.
        excerpts: Excerpts of held-out text with the highest activations, if requested.
    """

    token_texts: list[str]
    layer: int
    neuron: int
    activations: np.ndarray
    top_neurons: list[NeuronStats]
    excerpts: list[Excerpt] = field(default_factory=list)


@dataclass(frozen=True)
class Embedding(Result):
    """Principal components of the token embeddings, without tokens unseen in training.

    The sign of a component is chosen so that its coordinate of largest magnitude is positive.

    Attributes:
        token_texts: Text of each token (V).
        token_ids: Token ids (V).
        coords: The first two principal components of each token, float32 (V, 2).
        explained_variance_ratio: Fraction of the variance along each of the two components.
    """

    token_texts: list[str]
    token_ids: list[int]
    coords: np.ndarray
    explained_variance_ratio: tuple[float, float]
