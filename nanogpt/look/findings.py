"""What can be found inside a model, as plain data with documented shapes; `inside` computes it.

In: nothing. Out: frozen dataclasses; `asdict` turns each into plain lists, ready for JSON, and in a notebook each shows itself.

N tokens of the text, T of them at a time, L layers, H heads, V vocabulary.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Surprise:
    """How well a model foresaw each of the N tokens of a text.

    `pieces` (N) is the text of each token; a character of several tokens belongs to the last of them, and the others have "". `bits` (N) is -log2 of the
    probability that the model gave to the token, `alternatives` (N, at most 10) the likeliest tokens there with their probabilities, the likeliest first.
    `most` are the places of the most surprising tokens, the most surprising first. The first token is predicted after `start`, the token that begins a text.

    Of a text longer than the context, windows side by side are read, as in `evaluate`: in each, the first token has but the last one of the window before to
    go by. `windows` are the places where they begin. So `total_bits` is the loss of `evaluate` on `start` and the text. `uniform_bits` is what every token
    would cost if all were equally likely: an end for a scale of colours.
    """

    text: str
    pieces: list[str]
    ids: list[int]
    bits: list[float]
    alternatives: list[list[tuple[str, float]]]
    most: list[int]
    windows: list[int]
    start: str
    uniform_bits: float

    @property
    def total_bits(self) -> float:
        """Bits to tell the whole text to somebody who has the model."""
        return math.fsum(self.bits)

    @property
    def bits_per_token(self) -> float:
        """Their mean over the tokens."""
        return self.total_bits / len(self.bits)

    @property
    def bits_per_byte(self) -> float:
        """Their mean over the bytes of UTF-8, which can be compared between models."""
        return self.total_bits / len(self.text.encode())

    @property
    def bits_per_character(self) -> float:
        """Their mean over the characters."""
        return self.total_bits / len(self.text)

    @property
    def character_bits(self) -> list[float]:
        """The bits of each character of the text: those of all its tokens, or its equal part of a token of several characters. They sum to `total_bits`."""
        found: list[float] = []
        waiting = 0.0
        for piece, bits in zip(self.pieces, self.bits, strict=True):
            waiting += bits
            if piece:
                found += [waiting / len(piece)] * len(piece)
                waiting = 0.0
        return found

    def asdict(self) -> dict[str, Any]:
        """For JSON: the fields, and the four sums and means."""
        names = ("total_bits", "bits_per_token", "bits_per_byte", "bits_per_character", "character_bits")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.surprise(self)


@dataclass(frozen=True)
class Head:
    """How a head spreads its attention on a text, on average over its tokens: how many tokens back it looks (`distance`), and which shares the token itself
    (`own`), the `previous` one and the `first` of all get."""

    layer: int
    head: int
    distance: float
    own: float
    previous: float
    first: float


@dataclass(frozen=True)
class Attention:
    """Where each token looks: `weights` (L, H, T, T) float32, in which [l, h, i, j] is the share that head h of layer l takes from token j when it has read
    token i. Rows sum to one, and nothing comes from behind i. `pieces` (T) are the tokens, the first of which is number `first` of the `tokens` in the text:
    the model reads them as the beginning of its context."""

    pieces: list[str]
    weights: np.ndarray
    first: int
    tokens: int

    @property
    def heads(self) -> list[Head]:
        """What the heads do on this text, in a word: see `Head`. Layer by layer."""
        n_layer, n_head, T, _ = self.weights.shape
        back = np.arange(T)[:, None] - np.arange(T)  # (T, T): how far before token i token j stands
        distance = (self.weights * back).sum(axis=3).mean(axis=2, dtype=np.float64)  # (L, H)
        own, previous = (self.weights.diagonal(-far, 2, 3).sum(axis=2) / T for far in (0, 1))
        first = self.weights[:, :, :, 0].mean(axis=2, dtype=np.float64)
        places = [(layer, head) for layer in range(n_layer) for head in range(n_head)]
        return [Head(*place, *(float(share[place]) for share in (distance, own, previous, first))) for place in places]

    def asdict(self) -> dict[str, Any]:
        """For JSON: the fields, weights to six digits, and `heads`."""
        return vars(self) | {"weights": self.weights.astype(float).round(6).tolist(), "heads": [asdict(head) for head in self.heads]}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.attention(self)


@dataclass(frozen=True)
class Varying:
    """A `neuron` that varies on a text: the standard deviation of its activations (`spread`), and the three places where they are `highest`, highest first."""

    neuron: int
    spread: float
    highest: list[int]


@dataclass(frozen=True)
class Excerpt:
    """A passage of held-out text around a place that excites a neuron: the `peak`th of its `pieces` has the highest of the `activations`; it is token
    number `position` of the validation split."""

    pieces: list[str]
    activations: list[float]
    peak: int
    position: int

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Neurons:
    """What one neuron of a feed-forward layer does while a text is read: `activations` (N) float32, after each token, of the channel between the two
    linear layers (in modern, the product of gate and value).

    `strongest` are the neurons of the `layer` that vary most on this text, the most telling first. `excerpts` are the passages of held-out text that excite
    the neuron most, if they were asked for.
    """

    pieces: list[str]
    layer: int
    neuron: int
    activations: np.ndarray
    strongest: list[Varying]
    excerpts: list[Excerpt] = field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"activations": self.activations.tolist()}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.neurons(self)


@dataclass(frozen=True)
class Embedding:
    """The alphabet as a map: `xy` (V, 2) float32, the tokens' embeddings, as the model reads them, along their two principal components; `pieces` (V) and
    `ids` (V) name the tokens. `explained` is the share of all variance along each of the two. Tokens that the training text lacked are left out.

    Of each component the sign is chosen so that the token farthest from zero is on the positive side.
    """

    pieces: list[str]
    ids: list[int]
    xy: np.ndarray
    explained: tuple[float, float]

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"xy": self.xy.tolist(), "explained": list(self.explained)}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.embedding(self)
