"""`Inspector`: all inspections of one model on one text."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from nanogpt.data.batches import MemmapTokens
from nanogpt.device.device import Machine
from nanogpt.errors import UserError
from nanogpt.inspection import activations, memorization
from nanogpt.inspection.fingerprint_index import FingerprintIndex
from nanogpt.inspection.memorization import Memorization
from nanogpt.inspection.results import (
    AttentionWeights,
    Embedding,
    Excerpt,
    NeuronActivations,
    Surprisal,
)
from nanogpt.model import GPT
from nanogpt.tokenizer.tokenizer import Tokenizer

MAX_SOURCE_BYTES = 50_000_000  # training text up to this size is reread to name its files


@dataclass(frozen=True)
class Inspector:
    """Inspections of a model on a text; each method computes one.

    Attributes:
        text: The text.
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
    load_held_out: Callable[[], MemmapTokens]
    read_sources: Callable[[], Iterable[tuple[str, str]]]

    def surprisal(self, n_alternatives: int = 10) -> Surprisal:
        """Compute the surprisal of each token, with the most probable alternatives."""
        return activations.surprisal(
            self.model, self.tokenizer, self.machine, self.text, self.start_token, n_alternatives
        )

    def attention(self, start: int = 0) -> AttentionWeights:
        """Compute the attention weights of all heads on the window that starts at token `start`."""
        return activations.attention(self.model, self.tokenizer, self.machine, self.text, start)

    def neurons(
        self, layer: int = 0, neuron: int | None = None, n_excerpts: int = 0
    ) -> NeuronActivations:
        """Compute the activations of a neuron; None selects the one that varies most.

        Up to `n_excerpts` excerpts of the validation split are added if that is available.
        """
        result = activations.neurons(
            self.model, self.tokenizer, self.machine, self.text, layer, neuron
        )
        if n_excerpts:
            with suppress(UserError):
                excerpts = self.top_activating_excerpts(layer, result.neuron, n_excerpts)
                return replace(result, excerpts=excerpts)
        return result

    def top_activating_excerpts(self, layer: int, neuron: int, n: int = 10) -> list[Excerpt]:
        """Find the excerpts of the validation split with the highest activations of a neuron.

        Raises:
            UserError: If the validation split is gone, or the layer or neuron does not exist.
        """
        return activations.top_activating_excerpts(
            self.model, self.tokenizer, self.machine, self.load_held_out(), layer, neuron, n
        )

    def embedding(self) -> Embedding:
        """Project the token embeddings onto two dimensions; the text is not used."""
        return activations.embedding(self.model, self.tokenizer, self.unseen_token_ranges)

    def memorization(self) -> Memorization:
        """Find the passages of the text that occur verbatim in the training text.

        Raises:
            UserError: If the training text is gone.
        """
        result = memorization.measure_memorization(self.load_index(), self.text)
        # The prepared tokens may outlive the source files, whose names are optional.
        with suppress(UserError, OSError):
            if result.passages and result.indexed_bytes <= MAX_SOURCE_BYTES:
                return memorization.attach_sources(result, self.read_sources())
        return result
