"""Looking inside a model, as plain data: for a page, a notebook, a terminal, or a file.

In: a model, a text, and for copies the tokens it was trained on. Out: a `Look`, whose methods give the dataclasses of `findings` and `copies`.

`inside` is what happens while the model reads the text, `copies` what of the text stands verbatim in the training text; `html` and `terminal` draw both.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from nanogpt.data import Tokens
from nanogpt.errors import UserError
from nanogpt.look import copies, inside
from nanogpt.look.copies import Copies
from nanogpt.look.findings import Attention, Embedding, Excerpt, Neurons, Surprise
from nanogpt.look.index import Index
from nanogpt.machine import Machine
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

MOST_READ = 50_000_000  # bytes of a text that are read again for the names of its files


@dataclass(frozen=True)
class Look:
    """A text under a model's eyes; each method computes what it gives. In a notebook it shows the surprise.

    `start` is the token that begins a text, `unused` are ranges of tokens that the model never saw; `index` opens the index of its training text, and
    `held_out` the validation split, both or a `UserError` where these are gone; `sources` reads the texts of the run again, each with its name.
    """

    text: str
    model: GPT
    tokenizer: Tokenizer
    machine: Machine
    start: int
    unused: Sequence[Sequence[int]]
    index: Callable[[], Index]
    held_out: Callable[[], Tokens]
    sources: Callable[[], Iterable[tuple[str, str]]]

    def surprise(self, n_alternatives: int = 10) -> Surprise:
        """See `inside.surprise`."""
        return inside.surprise(self.model, self.tokenizer, self.machine, self.text, self.start, n_alternatives)

    def attention(self, first: int = 0) -> Attention:
        """See `inside.attention`."""
        return inside.attention(self.model, self.tokenizer, self.machine, self.text, first)

    def neurons(self, layer: int = 0, neuron: int | None = None, n_excerpts: int = 0) -> Neurons:
        """See `inside.neurons`; with so many passages of the validation split that excite the neuron, where that is still there."""
        found = inside.neurons(self.model, self.tokenizer, self.machine, self.text, layer, neuron)
        with suppress(UserError):
            return replace(found, excerpts=self.exciting(layer, found.neuron, n_excerpts) if n_excerpts else [])
        return found

    def exciting(self, layer: int, neuron: int, n: int = 10) -> list[Excerpt]:
        """See `inside.exciting`: passages of the validation split, whatever the text. Errors: also `UserError` where that is gone."""
        return inside.exciting(self.model, self.tokenizer, self.machine, self.held_out(), layer, neuron, n)

    def embedding(self) -> Embedding:
        """See `inside.embedding`: it does not depend on the text."""
        return inside.embedding(self.model, self.tokenizer, self.unused)

    def copies(self) -> Copies:
        """See `copies.copies` and `copies.named`. Errors: `UserError` where the training text is gone."""
        found = copies.copies(self.index(), self.text)
        with suppress(UserError, OSError):  # its tokens may outlive it
            if found.passages and found.indexed_bytes <= MOST_READ:
                return copies.named(found, self.sources())
        return found

    def _repr_html_(self) -> str:
        return self.surprise()._repr_html_()
