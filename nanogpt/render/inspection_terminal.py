"""Inspection results for a terminal, as objects that rich prints.

`sanitize` makes text safe for the terminal; it is the identity if the output is not a terminal.
"""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanogpt.inspection.memorization import Memorization
from nanogpt.inspection.results import AttentionWeights, NeuronActivations, Surprisal
from nanogpt.render.html import show_whitespace

# Backgrounds in ascending order. Weaker shades have none.
POSITIVE_COLOURS = ("#ffe9b8", "#ffcd85", "#ff9f5c", "#e4572e", "#b01e1e")
NEGATIVE_COLOURS = ("#d6e6fb", "#a9cdf7", "#74aaf0", "#3f7fd8", "#1f55a8")
FIRST_DARK_COLOUR = 4  # from here on, the text is white
MAX_NEURONS = 10
CONTEXT_TOKENS = 12  # tokens shown before a position
MAX_PASSAGE_CHARS = 60  # of a passage in the table
TEXT_COLUMNS = ("after", "token", "most probable", "document", "passage", "highest at the end of")

Sanitize = Callable[[str], str]


def surprisal(result: Surprisal, sanitize: Sanitize) -> RenderableType:
    """Return the text shaded by surprisal, its totals, and the most surprising tokens."""
    body = _shaded_text(
        (sanitize(text), bits / result.uniform_bits) for _, text, bits in result.complete_tokens()
    )
    table = _table("index", "after", "token", "bits", "most probable")
    for i in result.most_surprising:
        probable = [f"{show_whitespace(name)} {p:.0%}" for name, p in result.alternatives[i][:4]]
        token = show_whitespace(result.token_texts[i]) or "part of a character"
        texts = (_text_before(result.token_texts, i), token, "  ".join(probable))
        before, token, alternatives = map(sanitize, texts)
        table.add_row(f"{i:,}", before, token, f"{result.bits[i]:.2f}", alternatives)
    totals = (
        f"{len(result.text):,} characters, {len(result.token_ids):,} tokens, "
        f"{result.total_bits:,.1f} bits: {result.bits_per_token:.3f} per token, "
        f"{result.bits_per_character:.3f} per character, {result.bits_per_byte:.3f} per byte."
    )
    return Group(body, Text(f"\n{totals}\n"), table)


def attention(result: AttentionWeights, sanitize: Sanitize) -> RenderableType:
    """Return a table with the mean attention of each head."""
    T = len(result.token_texts)
    table = _table("layer", "head", "mean distance", "self", "previous", "first")
    for head in result.heads:
        weights = (head.self_weight, head.prev_weight, head.first_weight)
        percents = (f"{weight:.0%}" for weight in weights)
        table.add_row(f"{head.layer}", f"{head.head}", f"{head.mean_distance:.1f}", *percents)
    window = f"{T:,} tokens"
    if result.num_tokens > T:
        last = result.start + T - 1
        window = f"tokens {result.start:,} to {last:,} of {result.num_tokens:,}, one context"
    note = (
        f"\nMean distance in tokens, and mean attention weights on the token itself, the previous "
        f"and the first one, over {window}."
    )
    return Group(table, Text(note))


def neurons(result: NeuronActivations, sanitize: Sanitize) -> RenderableType:
    """Return the text and excerpts shaded by a neuron, and the neurons that vary most."""
    table = _table("neuron", "standard deviation", "highest at the end of")
    for stats in result.top_neurons[:MAX_NEURONS]:
        contexts = [
            _text_before(result.token_texts, i) + show_whitespace(result.token_texts[i])
            for i in stats.top_positions
        ]
        table.add_row(f"{stats.neuron}", f"{stats.std:.3f}", sanitize("   ".join(contexts)))
    texts = [sanitize(text) for text in result.token_texts]
    parts: list[RenderableType] = [
        _shaded_activations(texts, result.activations.tolist()),
        Text(
            f"\nNeuron {result.neuron} of layer {result.layer}. Neurons of this layer with the "
            "largest standard deviation on this text:"
        ),
        table,
    ]
    if result.excerpts:
        title = "Excerpts of the validation split with the highest activations of neuron"
        parts.append(Text(f"\n{title} {result.neuron}:"))
    for excerpt in result.excerpts:
        texts = [sanitize(_one_line(text)) for text in excerpt.token_texts]
        parts.append(_shaded_activations(texts, excerpt.activations))
    return Group(*parts)


def memorization(result: Memorization, sanitize: Sanitize) -> RenderableType:
    """Return the summary and a table of the memorized passages."""
    table = _table("bytes", "at character", "document", "line", "passage")
    for passage in result.passages:
        text = _one_line(result.text[passage.start : passage.end])
        if len(text) > MAX_PASSAGE_CHARS:
            half = MAX_PASSAGE_CHARS // 2
            text = f"{text[:half]} … {text[-half:]}"
        table.add_row(
            f"{passage.num_bytes:,}",
            f"{passage.start:,}",
            sanitize(_one_line(passage.source or f"document {passage.document:,}")),
            f"{passage.line:,}",
            sanitize(text),
        )
    return Group(Text(f"{result.summary}\n"), table) if result.passages else Text(result.summary)


def _shaded_activations(texts: Iterable[str], activations: Sequence[float]) -> Text:
    """Shade tokens by their activation, relative to the maximum magnitude."""
    max_magnitude = max(map(abs, activations)) or 1.0
    return _shaded_text(
        (text, activation / max_magnitude)
        for text, activation in zip(texts, activations, strict=True)
    )


def _shaded_text(tokens: Iterable[tuple[str, float]]) -> Text:
    """Append tokens, each on the background of its shade from -1 to 1; line ends have none."""
    body = Text()
    for text, shade in tokens:
        colours = POSITIVE_COLOURS if shade > 0 else NEGATIVE_COLOURS
        level = min(int(abs(shade) * (len(colours) + 1)), len(colours))
        text_colour = "white" if level >= FIRST_DARK_COLOUR else "black"
        body.append(text, f"{text_colour} on {colours[level - 1]}" if level else "")
    return body


def _text_before(token_texts: Sequence[str], i: int) -> str:
    """Return the text of the tokens before token i in one line."""
    return _one_line("".join(token_texts[max(0, i - CONTEXT_TOKENS) : i]))


def _one_line(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥")


def _table(*head: str) -> Table:
    """Create a table in which columns of numbers are right-aligned."""
    table = Table(*head, box=None, pad_edge=False)
    for column in table.columns:
        if column.header not in TEXT_COLUMNS:
            column.justify = "right"
    return table
