"""HTML of inspection results: fragments for notebooks, and pages that need no network."""

import base64
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanogpt.inspection.inspector import Inspector
from nanogpt.inspection.memorization import Memorization
from nanogpt.inspection.results import AttentionWeights, Embedding, NeuronActivations, Surprisal
from nanogpt.render.html import render, show_whitespace

MAX_POINTS = 1500  # tokens shown of an embedding
PLOT_SIZE = 640  # side of the plot of an embedding, in SVG units
PLOT_MARGIN = 20
CONTEXT_TOKENS = 12  # tokens shown before a position


class ShadedToken(NamedTuple):
    """A token with the shade of its background, -1 to 1, and its tooltip."""

    text: str
    shade: float
    title: str


def page(title: str, fragment: str) -> str:
    """Return a complete HTML page with one fragment."""
    from markupsafe import Markup

    return render("inspection/page.html", title=title, fragment=Markup(fragment))


def model(name: str, summary: dict[str, Any]) -> str:
    """Return the losses of a model and its baselines, in descending order, and its diagnosis."""
    losses = dict(summary["baselines"])
    if "val_loss" in summary:
        losses["this model"] = summary["val_loss"]
    rows = [[label, f"{loss:.4f}"] for label, loss in sorted(losses.items(), key=lambda x: -x[1])]
    diagnosis = summary["diagnosis"]["summary"] if "diagnosis" in summary else ""
    return render("inspection/model.html", name=name, diagnosis=diagnosis, rows=rows)


def surprisal(result: Surprisal) -> str:
    """Return the text shaded by surprisal, with the most probable tokens as tooltips."""
    tokens = []
    for i, text, bits in result.complete_tokens():
        probable = ", ".join(f"{name!r} {p:.1%}" for name, p in result.alternatives[i])
        title = f"{text!r}: {bits:.2f} bits. Most probable: {probable}"
        tokens.append(ShadedToken(text, bits / result.uniform_bits, title))
    rows = []
    for i in result.most_surprising:
        token = repr(result.token_texts[i]) if result.token_texts[i] else "part of a character"
        most_probable, _ = result.alternatives[i][0]
        rows.append([f"{i:,}", token, f"{result.bits[i]:.2f}", repr(most_probable)])
    return render("inspection/surprisal.html", result=result, tokens=tokens, rows=rows)


def attention(result: AttentionWeights) -> str:
    """Return a map for each layer and head, and the text shaded by the selected head."""
    tokens = [ShadedToken(text, 0.0, repr(text)) for text in result.token_texts]
    maps = [[_png(weights) for weights in layer] for layer in result.weights]
    return render("inspection/attention.html", result=result, tokens=tokens, maps=maps)


def neurons(result: NeuronActivations) -> str:
    """Return the text and excerpts of the validation split shaded by a neuron's activations."""
    tokens = _shade_activations(result.token_texts, result.activations.tolist())
    excerpts = [_shade_activations(item.token_texts, item.activations) for item in result.excerpts]
    rows = []
    for stats in result.top_neurons:
        contexts = [_text_before(result.token_texts, i) for i in stats.top_positions]
        rows.append([f"{stats.neuron}", f"{stats.std:.3f}", "   ".join(contexts)])
    template = "inspection/neurons.html"
    return render(template, result=result, tokens=tokens, rows=rows, excerpts=excerpts)


def embedding(result: Embedding) -> str:
    """Return a plot of the tokens at their two principal components."""
    coords = result.coords[:MAX_POINTS]
    low, high = coords.min(axis=0), coords.max(axis=0)
    scale = (PLOT_SIZE - 2 * PLOT_MARGIN) / np.where(high > low, high - low, 1)
    positions = (PLOT_MARGIN + scale * (coords - low)).tolist()
    tokens = zip(result.token_texts, result.token_ids, positions, strict=False)
    points = [
        {"x": x, "y": PLOT_SIZE - y, "text": text, "title": f"{text!r}, token {token_id}"}
        for text, token_id, (x, y) in tokens
    ]
    return render("inspection/embedding.html", result=result, points=points, size=PLOT_SIZE)


def memorization(result: Memorization) -> str:
    """Return the text with its memorized passages marked, and a table of them."""
    segments = []
    stop = 0
    for passage in sorted(result.passages, key=lambda passage: passage.start):
        segments.append((result.text[stop : passage.start], False))
        segments.append((result.text[passage.start : passage.end], True))
        stop = passage.end
    segments.append((result.text[stop:], False))
    rows = []
    for passage in result.passages:
        document = passage.source or f"document {passage.document:,}"
        context = f"…{passage.context_before}[…]{passage.context_after}…"
        text = result.text[passage.start : passage.end]
        rows.append([f"{passage.num_bytes:,}", document, f"{passage.line:,}", context, text])
    return render("inspection/memorization.html", result=result, segments=segments, rows=rows)


def attach_notebook_displays() -> None:
    """Add `_repr_html_` to `Inspector` and the results; notebooks call it to display a value."""
    displays: dict[type, Callable[[Any], str]] = {
        Inspector: lambda inspector: surprisal(inspector.surprisal()),
        Surprisal: surprisal,
        AttentionWeights: attention,
        NeuronActivations: neurons,
        Embedding: embedding,
        Memorization: memorization,
    }
    for displayed_class, display in displays.items():
        displayed_class._repr_html_ = display  # type: ignore[attr-defined]


def _text_before(token_texts: Sequence[str], i: int) -> str:
    """Return the text that ends with token i, with visible white space."""
    return show_whitespace("".join(token_texts[max(0, i - CONTEXT_TOKENS) : i + 1]))


def _shade_activations(
    token_texts: Iterable[str], activations: Sequence[float]
) -> list[ShadedToken]:
    """Shade tokens by their activation, relative to the maximum magnitude."""
    max_magnitude = max(map(abs, activations)) or 1.0
    return [
        ShadedToken(text, activation / max_magnitude, f"{text!r}: {activation:.3f}")
        for text, activation in zip(token_texts, activations, strict=True)
        if text
    ]


def _png(weights: np.ndarray) -> str:
    """Encode weights (T, T) from 0 to 1 as a base64 PNG with one pixel per weight.

    The opacity of a pixel is the square root of the weight. The palette has one color, and a
    transparency for each of its 256 entries (ISO/IEC 15948, section 11).
    """
    T = len(weights)
    opacity = (np.sqrt(weights.clip(0, 1)) * 255).round()
    rows = np.pad(opacity, ((0, 0), (1, 0))).astype(np.uint8)  # each row starts with filter type 0
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", T, T, 8, 3, 0, 0, 0),
        b"PLTE": bytes([234, 100, 12]) * 256,
        b"tRNS": bytes(range(256)),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
