"""What was found, for a terminal: things that rich can print.

In: the dataclasses of `findings` and `copies`, and `shown`, which makes text harmless to where it is printed. Out: renderables; nothing is printed here.
"""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanogpt.look.copies import Copies
from nanogpt.look.findings import Attention, Neurons, Surprise

SHADES = ("", "black on #ffe9b8", "black on #ffcd85", "black on #ff9f5c", "white on #e4572e", "white on #b01e1e")  # the darker, the more
COLD = ("", "black on #d6e6fb", "black on #a9cdf7", "black on #74aaf0", "white on #3f7fd8", "white on #1f55a8")
MOST_NEURONS = 10
CONTEXT = 12  # tokens that are shown before a place
COLUMNS = 60  # of a passage in a table

Shown = Callable[[str], str]


def surprise(found: Surprise, shown: Shown) -> RenderableType:
    """The text shaded by surprise, a line of sums, and the most surprising places."""
    body, bits = Text(), 0.0
    for piece, own in zip(found.pieces, found.bits, strict=True):
        bits += own
        if piece:
            _append(body, shown(piece), bits / found.uniform_bits, SHADES)
            bits = 0.0
    table = _table("token", "after", "came", "bits", "likely there")
    for at in found.most:
        likely = "  ".join(f"{_visible(name)} {p:.0%}" for name, p in found.alternatives[at][:4])
        before = _one_line("".join(found.pieces[max(0, at - CONTEXT) : at]))
        table.add_row(f"{at:,}", shown(before), shown(_visible(found.pieces[at]) or "part of a character"), f"{found.bits[at]:.2f}", shown(likely))
    said = (
        f"{len(found.text):,} characters, {len(found.ids):,} tokens, {found.total_bits:,.1f} bits: {found.bits_per_token:.3f} for each token, "
        f"{found.bits_per_character:.3f} for each character, {found.bits_per_byte:.3f} for each byte."
    )
    return Group(body, Text(f"\n{said}\n"), table)


def attention(found: Attention, shown: Shown) -> RenderableType:
    """A row for each head: where it looks on average."""
    T = len(found.pieces)
    table = _table("layer", "head", "tokens back", "itself", "the one before", "the first")
    for head in found.heads:
        table.add_row(f"{head.layer}", f"{head.head}", f"{head.distance:.1f}", f"{head.own:.0%}", f"{head.previous:.0%}", f"{head.first:.0%}")
    part = f"tokens {found.first:,} to {found.first + T - 1:,} of {found.tokens:,}, which fill a context" if found.tokens > T else f"{T:,} tokens"
    return Group(table, Text(f"\nMeans over {part}. The whole maps: --html FILE, or as numbers --json."))


def neurons(found: Neurons, shown: Shown) -> RenderableType:
    """The text as one neuron sees it, the neurons of its layer that vary most on it, and what excites the one in held-out text."""
    table = _table("neuron", "standard deviation", "highest after")
    for each in found.strongest[:MOST_NEURONS]:
        places = "   ".join(_one_line("".join(found.pieces[max(0, at - CONTEXT) : at])) + _visible(found.pieces[at]) for at in each.highest)
        table.add_row(f"{each.neuron}", f"{each.spread:.3f}", shown(places))
    parts: list[RenderableType] = [_activated(found.pieces, found.activations.tolist(), shown)]
    parts += [Text(f"\nNeuron {found.neuron} of layer {found.layer}. Those of this layer that vary most on this text:"), table]
    if found.excerpts:
        parts.append(Text(f"\nWhat excites neuron {found.neuron} most in the validation split:"))
        parts += [_activated(list(map(_one_line, each.pieces)), each.activations, shown) for each in found.excerpts]
    return Group(*parts, Text("\nAnother neuron: --layer L --neuron N. A picture to point at: --html FILE."))


def copies(found: Copies, shown: Shown) -> RenderableType:
    """The verdict, and the passages with their places."""
    table = _table("bytes", "at character", "in", "line", "passage")
    for passage in found.passages:
        text = _one_line(found.text[passage.start : passage.end])
        text = text if len(text) <= COLUMNS else f"{text[: COLUMNS // 2]} … {text[-COLUMNS // 2 :]}"
        where = passage.source or f"document {passage.document:,}"
        table.add_row(f"{passage.bytes:,}", f"{passage.start:,}", shown(_one_line(where)), f"{passage.line:,}", shown(text))
    return Group(Text(f"{found.sentence}\n"), table) if found.passages else Text(found.sentence)


def _activated(pieces: Iterable[str], activations: Sequence[float], shown: Shown) -> Text:
    body, most = Text(), max(map(abs, activations)) or 1.0
    for piece, a in zip(pieces, activations, strict=True):
        _append(body, shown(piece), abs(a) / most, SHADES if a > 0 else COLD)
    return body


def _append(body: Text, piece: str, share: float, shades: Sequence[str]) -> None:
    """A token behind the others, in the shade of a share from 0 to 1. A line's end has no place of its own to shade, and so none."""
    body.append(piece, shades[min(int(share * len(shades)), len(shades) - 1)])


def _one_line(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥")


def _visible(token: str) -> str:
    """A token by itself, in which spaces can be seen."""
    return _one_line(token).replace(" ", "␣")


def _table(*head: str) -> Table:
    table = Table(*head, box=None, pad_edge=False)
    for column in table.columns:
        if column.header not in ("after", "came", "likely there", "in", "passage", "highest after"):
            column.justify = "right"
    return table
