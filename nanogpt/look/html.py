"""What was found, drawn: fragments of HTML for a notebook, and whole pages that need no network.

In: the dataclasses of `findings` and `copies`. Out: HTML in which all text is escaped; colours are laid over whatever ground there is, dark or light.
"""

import base64
import html
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanogpt.look.copies import Copies
from nanogpt.look.findings import Attention, Embedding, Neurons, Surprise

LABELS = 1500  # tokens that a map of the alphabet shows
CONTEXT = 12  # tokens that are shown before a place
SIDE = 640  # of the map, in pixels

PAGE_STYLE = ":root { color-scheme: light dark; } body { margin: 2rem; font-family: system-ui, sans-serif; }"
STYLE = """<style>
.look { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; }
.look pre { font: 15px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.look pre span { background: rgba(234, 100, 12, var(--p, 0)); border-radius: 2px; }
.look pre span.minus { background: rgba(30, 120, 220, var(--p, 0)); }
.look pre span.chosen { outline: 2px solid; }
.look mark { background: rgba(234, 100, 12, .45); color: inherit; border-radius: 2px; }
.look i.end { opacity: .4; font-style: normal; }
.look table { border-collapse: collapse; margin: .5rem 0; }
.look td, .look th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
.look td.n { text-align: right; font-variant-numeric: tabular-nums; }
.look td code { white-space: pre-wrap; }
.look .maps { display: grid; gap: 4px; }
.look .maps button { padding: 0; border: 2px solid rgba(128, 128, 128, .3); background: none; cursor: pointer; }
.look .maps button[aria-pressed=true] { border-color: rgb(234, 100, 12); }
.look .maps img { width: 100%; display: block; image-rendering: pixelated; }
.look svg { width: 100%; max-width: 40rem; }
.look svg text { fill: currentColor; font: 14px ui-monospace, monospace; text-anchor: middle; }
</style>"""

# The maps are the data: a pixel's opacity is the square root of the attention. Clicking a map chooses a head; pointing at a token shows what it looks at.
ATTENTION_SCRIPT = """<script>
(() => {
  const root = document.currentScript.parentElement, tokens = [...root.querySelectorAll("pre span")], maps = [...root.querySelectorAll(".maps button")];
  const name = root.querySelector(".head");
  let pixels, T, at = tokens.length - 1;
  const show = () => tokens.forEach((token, j) => {
    token.style.setProperty("--p", j <= at ? pixels[4 * (at * T + j) + 3] / 255 : 0);
    token.classList.toggle("chosen", j === at);
  });
  const choose = async map => {
    const image = map.querySelector("img"), canvas = document.createElement("canvas");
    await image.decode();
    canvas.width = canvas.height = T = image.naturalWidth;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    pixels = context.getImageData(0, 0, T, T).data;
    maps.forEach(other => other.setAttribute("aria-pressed", other === map));
    name.textContent = map.title;
    show();
  };
  maps.forEach(map => map.addEventListener("click", () => choose(map)));
  tokens.forEach((token, i) => ["mouseenter", "click"].forEach(event => token.addEventListener(event, () => { at = i; if (pixels) show(); })));
  choose(maps[0]);
})();
</script>"""


def page(title: str, fragment: str) -> str:
    """A fragment as a page of its own."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escaped(title)}</title><style>{PAGE_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><h1>{escaped(title)}</h1>\n{fragment}\n</body></html>\n'


def model(name: str, summary: dict[str, Any]) -> str:
    """What a model file tells of its training: the loss among the baselines, best last, and the verdict."""
    losses = summary["baselines"] | ({"this model": summary["val_loss"]} if "val_loss" in summary else {})
    rows = [[label, f"{loss:.4f}"] for label, loss in sorted(losses.items(), key=lambda row: -row[1])]
    verdict = f"<p>{escaped(summary['verdict']['sentence'])}</p>" if "verdict" in summary else ""
    return _look(f"<p><b>{escaped(name)}</b></p>{verdict}", _table(["", "nats per token"], rows, (1,)))


def surprise(found: Surprise) -> str:
    """The text, each token shaded by its bits; pointing at one shows what was likely there."""
    spans, bits = [], 0.0
    for piece, own, likely in zip(found.pieces, found.bits, found.alternatives, strict=True):
        bits += own  # a character of several tokens has the bits of all of them
        if piece:
            others = ", ".join(f"{name!r} {p:.1%}" for name, p in likely)
            spans.append(_span(piece, bits / found.uniform_bits, f"{piece!r}: {bits:.2f} bits. Likely here: {others}"))
            bits = 0.0
    rows = [
        [f"{at:,}", repr(found.pieces[at]) if found.pieces[at] else "part of a character", f"{found.bits[at]:.2f}", repr(found.alternatives[at][0][0])]
        for at in found.most
    ]
    said = f"{found.total_bits:,.1f} bits: {found.bits_per_character:.3f} for each character, {found.bits_per_byte:.3f} for each byte"
    return _look(f"<p>{said}.</p><pre>{''.join(spans)}</pre>", _table(["token", "text", "bits", "likeliest was"], rows, (0, 2)))


def attention(found: Attention) -> str:
    """A map for each layer (down) and head (across), and the text, in which the chosen head shows where a token looks."""
    n_layer, n_head, T, _ = found.weights.shape
    maps = "".join(
        f'<button type="button" title="{name}" aria-pressed="false"><img alt="Attention of {name}" src="data:image/png;base64,{_png(found.weights[i, j])}">'
        "</button>"
        for i in range(n_layer)
        for j in range(n_head)
        for name in [f"layer {i}, head {j}"]
    )
    said = f"Tokens {found.first:,} to {found.first + T - 1:,} of {found.tokens:,}. In a map, row i shows which tokens are looked at from token i."
    text = "".join(_span(piece, 0.0, repr(piece)) for piece in found.pieces)
    return _look(
        f'<p>{said} Choose a map, then a token: <b class="head"></b></p><pre>{text}</pre>',
        f'<div class="maps" style="grid-template-columns: repeat({n_head}, minmax(0, 16rem))">{maps}</div>',
        ATTENTION_SCRIPT,
    )


def neurons(found: Neurons) -> str:
    """The text, each token shaded by the activation after it, blue where that is negative; and the same for passages of the validation split."""
    rows = [
        [f"{each.neuron}", f"{each.spread:.3f}", "   ".join(_visible("".join(found.pieces[max(0, at - CONTEXT) : at + 1])) for at in each.highest)]
        for each in found.strongest
    ]
    parts = [
        f"<p>Neuron {found.neuron} of layer {found.layer}:</p><pre>{_activated(found.pieces, found.activations.tolist())}</pre>",
        "<p>The neurons of this layer that vary most on this text:</p>",
        _table(["neuron", "standard deviation", "highest after"], rows, (0, 1)),
        "<p>What excites this neuron most in the validation split:</p>" if found.excerpts else "",
    ]
    parts += [f"<pre>{_activated(excerpt.pieces, excerpt.activations)}</pre>" for excerpt in found.excerpts]
    return _look(*parts)


def embedding(found: Embedding) -> str:
    """The map, as text in a picture."""
    xy = found.xy[:LABELS]
    low, high = xy.min(axis=0), xy.max(axis=0)
    places = 20 + (SIDE - 40) * (xy - low) / np.where(high > low, high - low, 1)
    texts = "".join(
        f'<text x="{x:.1f}" y="{SIDE - y:.1f}"><title>{escaped(repr(piece))}, token {i}</title>{escaped(_visible(piece))}</text>'
        for piece, i, (x, y) in zip(found.pieces, found.ids, places.tolist(), strict=False)
    )
    shown = f" The first {LABELS:,} of {len(found.pieces):,} tokens." if len(found.pieces) > LABELS else ""
    said = f"<p>The tokens along their two principal components, which explain {found.explained[0]:.1%} and {found.explained[1]:.1%}.{shown}</p>"
    return _look(said, f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="Map of the alphabet">{texts}</svg>')


def copies(found: Copies) -> str:
    """The text with its copied passages marked, and where they stand."""
    text, at = [], 0
    for passage in sorted(found.passages, key=lambda passage: passage.start):
        text += [escaped(found.text[at : passage.start]), f"<mark>{escaped(found.text[passage.start : passage.end])}</mark>"]
        at = passage.end
    text.append(escaped(found.text[at:]))
    rows = [
        [f"{p.bytes:,}", p.source or f"document {p.document:,}", f"{p.line:,}", f"…{p.before}[…]{p.after}…", found.text[p.start : p.end]]
        for p in found.passages
    ]
    table = _table(["bytes", "in", "line", "stands between", "passage"], rows, (0, 2)) if rows else ""
    return _look(f"<p>{escaped(found.sentence)}</p><pre>{''.join(text)}</pre>", table)


def escaped(text: str) -> str:
    """Text that HTML takes for nothing else; control characters become pictures of themselves."""
    return html.escape("".join(chr(0x2400 + ord(letter)) if letter < " " and letter not in "\n\t" else letter for letter in text))


def _look(*parts: str) -> str:
    return f'<div class="look">{STYLE}{"".join(parts)}</div>'


def _span(piece: str, share: float, title: str, kind: str = "") -> str:
    """A token shaded by a share from 0 to 1."""
    return f'<span{kind} style="--p:{min(max(share, 0.0), 1.0):.3f}" title="{escaped(title)}">{_text(piece)}</span>'


def _text(piece: str) -> str:
    """A token in running text: the ends of lines can be seen, and so shaded."""
    return escaped(piece).replace("\n", '<i class="end">↵</i>\n')


def _visible(piece: str) -> str:
    """A token by itself: white space can be seen."""
    return piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def _activated(pieces: Sequence[str], activations: Sequence[float]) -> str:
    most = max(map(abs, activations)) or 1.0
    return "".join(
        _span(piece, abs(a) / most, f"{piece!r}: {a:.3f}", ' class="minus"' if a < 0 else "") for piece, a in zip(pieces, activations, strict=True) if piece
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    cells = "".join(
        f"<tr>{''.join(f'<td class=n>{escaped(cell)}</td>' if i in numbers else f'<td><code>{escaped(cell)}</code></td>' for i, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return f"<table><tr>{''.join(f'<th>{escaped(name)}</th>' for name in head)}</tr>{cells}</table>"


def _png(weights: np.ndarray) -> str:
    """(T, T) from 0 to 1 as a picture in base 64, a pixel each, whose opacity is the square root (ISO/IEC 15948, section 11; a palette of one colour)."""
    T = len(weights)
    opacity = np.sqrt(weights.clip(0, 1)) * 255
    rows = np.concatenate([np.zeros((T, 1)), opacity.round()], axis=1).astype(np.uint8)  # each behind the number of its filter, none
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", T, T, 8, 3, 0, 0, 0),
        b"PLTE": bytes([234, 100, 12]) * 256,
        b"tRNS": bytes(range(256)),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks.items()]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
