"""report.html: a run on one page, which needs no network, no server and no script but to point at its curves and to leaf through its samples.

In: the files of a run folder. Out: the page. What is missing or damaged there is left out of it. Everything that comes from outside is escaped, and the
page's own policy keeps a browser from loading or running anything else. The curves are drawn here and not by plotly, whose script is 4.7 MB: a report is to
be small enough to send, and to be printed.
"""

import base64
import hashlib
import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import nanogpt
from nanogpt import checkpoint
from nanogpt.config import Config, Section, read_toml, resolve
from nanogpt.errors import Notice, UserError
from nanogpt.files import write_text
from nanogpt.plan import duration
from nanogpt.report.curves import Curve, chart, numbers, pooled
from nanogpt.report.log import read_records

MOST_STEPS = 4000  # of a run are read, which takes some 20 ms,
MOST_SAMPLES = 100  # and so many samples shown: the first, the last, and others evenly between
MOST_PASSAGES = 10
VALUES = ("train_loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens", "seconds", "progress")  # that a step must have
Known = TypeVar("Known")


@dataclass(frozen=True)
class Facts:
    """What a run folder tells, as far as it can be read; what cannot is empty."""

    run: Path
    config: Config
    text: dict[str, Any]
    summary: dict[str, Any]
    parameters: int
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    copies: dict[str, Any]

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return max((record["step"] for record in (*self.steps, *self.evaluations)), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, and did not go on since."""
        return self.summary.get("finished") == self.step and self.step > 0


def report(run: Path) -> str:
    """The page of a run, made from its folder alone, so that it can be made again at any time."""
    facts = _facts(Path(run))
    figures, data = _curves(facts)
    sections = {
        "Curves": figures,
        "Compared with counting": _ladder(facts),
        "What it wrote": _samples(facts),
        "Does it copy?": _copies(facts),
        "Text": _table(_text(facts)),
        "Machine": _table(_machine(facts)),
        "Settings": _settings(facts),
        "Again": _commands(facts),
    }
    body = "".join(f'<section id="{_slug(title)}"><h2>{title}</h2>{content}</section>' for title, content in sections.items() if content)
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    name = _shown(facts.run.resolve().name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark"><title>{name}</title>'
        f"<style>{style}</style></head><body><main>{_head(facts, name)}{body}"
        f"<footer>Written by nanogpt {nanogpt.__version__} from the files of the run.</footer></main>"
        f'<script type="application/json" id="numbers">{encoded}</script><script>{script}</script></body></html>\n'
    )


def write_report(run: Path) -> None:
    """Write the page into the run folder, whole or not at all; a warning where it cannot be: by then the run itself is safe."""
    try:
        write_text(run / "report.html", report(run))
    except (UserError, OSError) as error:
        warnings.warn(f"The report could not be written: {error}", Notice, stacklevel=2)


def _facts(run: Path) -> Facts:
    def known(read: Callable[[], Known], otherwise: Known) -> Known:
        try:
            return read()
        except (UserError, OSError, ValueError):
            return otherwise

    nothing: list[dict[str, Any]] = []
    unknown: tuple[dict[str, Any], int] = {}, 0
    records = known(lambda: read_records(run / "metrics.jsonl", MOST_STEPS), nothing)
    samples = [
        record for record in known(lambda: read_records(run / "samples.jsonl"), nothing) if _has(record, ("step",)) and isinstance(record.get("text"), str)
    ]
    text = known(lambda: json.loads((run / "text.json").read_text(encoding="utf-8")), None)
    summary, parameters = known(lambda: checkpoint.describe(run), unknown)
    copies = known(lambda: json.loads((run / "copies.json").read_text(encoding="utf-8")), None)
    return Facts(
        run=run,
        config=known(lambda: resolve(read_toml(run / "config.toml")), Config()),
        text=text if isinstance(text, dict) else {},
        summary=summary,
        parameters=parameters,
        steps=[record for record in records if _has(record, ("step", *VALUES))],
        evaluations=[record for record in records if _has(record, ("step", "val_loss", "bits_per_byte"))],
        samples=[samples[i] for i in _evenly(len(samples), MOST_SAMPLES)],
        copies=copies if isinstance(copies, dict) and copies.keys() >= {"step", "text", "sentence", "passages"} else {},
    )


def _has(record: dict[str, Any], names: Iterable[str]) -> bool:
    """Whether a record has all these, as numbers that can be drawn."""
    return all(isinstance(record.get(name), int | float) and math.isfinite(record[name]) for name in names)


def _evenly(n: int, most: int) -> list[int]:
    """At most `most` of n places, the first and the last among them."""
    return list(range(n)) if n <= most else [round(i * (n - 1) / (most - 1)) for i in range(most)]


def _shown(text: object) -> str:
    """Text as HTML: escaped, and without control characters and halves of characters, which no page may have."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(text).replace("\r\n", "\n")))


def _with_flags(text: str) -> str:
    """Text as HTML, in which a flag and its value stay on one line."""
    return re.sub(r"--[a-z-]+(?: [\d.]*\d)?", r'<span class="flag">\g<0></span>', _shown(text))


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-").rstrip("?")


def _head(facts: Facts, name: str) -> str:
    """The name, the verdict and the numbers that count."""
    model, summary = facts.config.model, facts.summary
    size = f"{facts.parameters / 1e6:.3g} million parameters" if facts.parameters else "A model"
    sources = ", ".join(os.path.basename(source) for source in _sources(facts)[:3])
    lead = f"{size}: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, context {model.context_length}"
    lead += f"; trained on {sources}" if sources else ""
    verdict = summary.get("verdict") or {"kind": "unknown", "sentence": "Not evaluated yet, so there is nothing to say of it."}
    state = "" if facts.finished else f"<p>{_unfinished(facts)}</p>"
    seconds = max((record["seconds"] for record in facts.steps + facts.evaluations if "seconds" in record), default=0.0)
    figures = {
        "bits per byte": f"{summary['bits_per_byte']:.3f}" if "bits_per_byte" in summary else "",
        "nats per token": f"{summary['val_loss']:.3f}" if "val_loss" in summary else "",
        "steps": f"{facts.step:,}",
        "of training": duration(seconds),
        "tokens a second": f"{_median([record['tokens_per_second'] for record in facts.steps]):,.0f}" if facts.steps else "",
        "times through the text": _passes(facts),
    }
    cells = "".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for label, value in figures.items() if value)
    return (
        f'<header><h1>{name}</h1><p class="lead">{_shown(lead)}.</p>'
        f'<div class="verdict {_shown(verdict["kind"])}"><p>{_with_flags(verdict["sentence"])}</p>{state}</div>'
        f'<dl class="figures">{cells}</dl></header>'
    )


def _unfinished(facts: Facts) -> str:
    over = f", {facts.steps[-1]['progress']:.0%} of it over" if facts.steps else ""
    command = f"nanogpt train --resume --out {shlex.quote(str(facts.run))}"
    return f"The run was stopped after step {facts.step:,}{over}. It goes on with <code>{_shown(command)}</code>"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _passes(facts: Facts) -> str:
    """How often the training text was read."""
    if not facts.steps or not facts.text.get("train_tokens"):
        return ""
    tokens = sum(record["tokens"] for record in facts.steps) / len(facts.steps) * facts.step
    passes = tokens / facts.text["train_tokens"]
    return f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"


def _curves(facts: Facts) -> tuple[str, list[object]]:
    """The figures, and their numbers for the script."""
    if not facts.steps or facts.step < 2:
        return "", []
    steps = [record["step"] for record in facts.steps]
    of_steps = {name: pooled("", "c0", steps, [record[name] for record in facts.steps]) for name in VALUES[:4]}
    training = of_steps["train_loss"]
    losses = [Curve("training", "c0", training.x, training.y, training.low, training.high)]
    right = None
    if points := facts.evaluations:
        losses.append(Curve("validation", "c1", [p["step"] for p in points], [p["val_loss"] for p in points], dots=len(points) <= 60))
        if points[-1]["val_loss"] > 0:
            right = ("bits per byte", points[-1]["bits_per_byte"] / points[-1]["val_loss"])
    small = {
        "Learning rate": ("", "learning_rate", False, True),
        "Gradient norm": ("", "grad_norm", True, False),
        "Speed": ("tokens a second", "tokens_per_second", False, True),
    }
    drawn = [chart("Loss", "nats per token", losses, facts.step, levels=_baselines(facts), right=right, log=True, tall=True)]
    drawn += [chart(title, unit, [of_steps[name]], facts.step, log=log, zero=zero) for title, (unit, name, log, zero) in small.items()]
    note = "Across: steps. The training loss is of each step's own batch, the gradient norm is that before clipping. Lines are means of neighbours where there "
    note += "are many, with a band from the lowest to the highest."
    most = max((record.get("val_tokens", 0) for record in facts.evaluations), default=0)
    if 0 < most < facts.text.get("val_tokens", 0) - 1:
        note += f" Evaluations during the run took {most:,} of the {facts.text['val_tokens']:,} held-out tokens, always the same ones."
    html = f'<div class="charts">{"".join(drawn)}</div><p class="note">{note}</p>'
    return html, [numbers(losses, facts.step), *(numbers([of_steps[name]], facts.step) for _, name, _, _ in small.values())]


def _baselines(facts: Facts) -> dict[str, float]:
    found = facts.summary.get("baselines") or facts.text.get("baselines") or {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _ladder(facts: Facts) -> str:
    """The model among the n-gram baselines, worst first: a table with a bar in each row."""
    baselines, loss = _baselines(facts), facts.summary.get("val_loss")
    if loss is None or not baselines:
        return ""
    to_bits = facts.summary["bits_per_byte"] / loss
    rows = sorted([*((name, value, "") for name, value in baselines.items()), ("this model", loss, ' class="own"')], key=lambda row: -row[1])
    most = rows[0][1]
    body = "".join(
        f'<tr{mark}><th scope="row">{_shown(name)}</th><td class="bar"><i style="width:{100 * value / most:.1f}%"></i></td>'
        f"<td>{value * to_bits:.4f}</td><td>{value:.4f}</td></tr>"
        for name, value, mark in rows
    )
    step = facts.summary.get("step")
    return (
        '<table class="ladder"><thead><tr><th></th><td></td><th scope="col">bits per byte</th><th scope="col">nats per token</th></tr></thead>'
        f'<tbody>{body}</tbody></table><p class="note">On {facts.summary.get("val_tokens", 0):,} held-out tokens; the model is that of step {step:,}, the best '
        "of the run. The others only count tokens, pairs and triples in the training text (Witten-Bell smoothing).</p>"
    )


def _samples(facts: Facts) -> str:
    """All samples, one behind the other; the script shows one at a time."""
    losses = {record["step"]: record["val_loss"] for record in facts.evaluations}
    items = []
    for sample in facts.samples:
        loss = f", validation loss {losses[sample['step']]:.3f}" if sample["step"] in losses else ""
        items.append(f'<li><h3>Step {sample["step"]:,}{loss}</h3><pre dir="auto" tabindex="0">{_shown(sample["text"])}</pre></li>')
    return f'<ol class="samples all">{"".join(items)}</ol>' if items else ""


def _copies(facts: Facts) -> str:
    """What of the last sample stands in the training text, as `look.copies` found it: longest passages first."""
    if not facts.copies:
        return ""
    text = facts.copies["text"]
    rows = "".join(
        f"<tr><td>{p['bytes']:,}</td><td>{_shown(p['source'] or 'document {:,}'.format(p['document']))}, line {p['line']:,}</td>"
        f"<td><q>{_shown(text[p['start'] : p['end']])}</q></td></tr>"
        for p in facts.copies["passages"][:MOST_PASSAGES]
    )
    head = '<thead><tr><th scope="col">bytes</th><th scope="col">where</th><th scope="col">passage</th></tr></thead>'
    table = f'<table class="passages">{head}<tbody>{rows}</tbody></table>' if rows else ""
    return f'<p>{_shown(facts.copies["sentence"])}</p>{table}<p class="note">Of the sample of step {facts.copies["step"]:,}.</p>'


def _sources(facts: Facts) -> list[str]:
    sources = facts.text.get("sources")
    return [str(source) for source in sources] if isinstance(sources, list) else []


def _text(facts: Facts) -> dict[str, str]:
    text, tokenizer = facts.text, facts.config.text.tokenizer
    if not _has(text, ("train_bytes", "val_bytes", "train_tokens", "val_tokens")):
        return {}
    return {
        "Sources": ", ".join(_sources(facts)),
        "Size": f"{text['train_bytes'] + text['val_bytes']:,} bytes in {text.get('documents', 1):,} document{'s' * (text.get('documents', 1) != 1)}",
        "Held out": str(text.get("split", "")),
        "Tokens": f"{text['train_tokens']:,} to train on, {text['val_tokens']:,} to validate on; {text.get('symbols', 0):,} different ones ({tokenizer})",
        "SHA-256": str(text.get("fingerprint", "")),
        "Began from": str(text.get("init_from", "")),
    }


def _machine(facts: Facts) -> dict[str, str]:
    machine = facts.config.machine
    return {
        "Machine": str(facts.summary.get("machine", "")),
        "Step": f"{machine.attention} attention, {'compiled' if machine.compile else 'not compiled'}{', deterministic kernels' * machine.deterministic}",
    }


def _table(rows: dict[str, str]) -> str:
    cells = "".join(f'<tr><th scope="row">{name}</th><td>{_shown(value)}</td></tr>' for name, value in rows.items() if value)
    return f'<table class="facts">{cells}</table>' if cells else ""


def _settings(facts: Facts) -> str:
    """Every setting that has a value; those that are not the default stand out."""
    groups = []
    for name in Config.model_fields:
        section: Section = getattr(facts.config, name)
        rows = []
        for setting, about in type(section).model_fields.items():
            value = getattr(section, setting)
            if value is None:
                continue
            text = f"{value:g}" if isinstance(value, float) else ("no", "yes")[value] if isinstance(value, bool) else value
            mark = "" if value == about.default else ' class="chosen"'
            rows.append(f'<div{mark} title="{_shown(about.description)}"><dt>{setting}</dt><dd>{_shown(text)}</dd></div>')
        groups.append(f"<div><h3>{name.capitalize()}</h3><dl>{''.join(rows)}</dl></div>")
    return f'<div class="settings">{"".join(groups)}</div><p class="note">Bold: not the default.</p>'


def _commands(facts: Facts) -> str:
    """What to type to have the same run again, and what to do with this one."""
    run, training = shlex.quote(str(facts.run)), facts.config.training
    sources = [_path(source) for source in _sources(facts)] or ["TEXT"]
    again = f"nanogpt train {' '.join(sources)} --config {shlex.quote(str(facts.run / 'config.toml'))} --out {shlex.quote(f'{facts.run}-again')}"
    if init_from := facts.text.get("init_from"):
        again += f" --init-from {_path(str(init_from))}"
    if "-" in sources:
        again = f"cat TEXT | {again}"
    lines = [("The same run again", again), ("Let it write", f"nanogpt sample {run}"), ("Measure it", f"nanogpt eval {run}")]
    lines += [("Does it copy its text?", f"nanogpt sample {run} | nanogpt look {run} - --copies"), ("Look inside", f"nanogpt serve {run}")]
    note = ""
    if training.minutes is not None:
        note = f"By the clock a run makes as many steps as the machine manages; with <code>--steps {facts.step}</code> it makes as many as this one."
        note = f'<p class="note">{note}</p>'
    return "".join(f"<h3>{title}</h3><pre><code>{_shown(command)}</code></pre>" for title, command in lines) + note


def _path(path: str) -> str:
    """A path as a word of a command, from the home of whoever types it where it lies in that of whoever trained."""
    home = str(Path.home())
    return "~/" + shlex.quote(path[len(home) + 1 :]) if path.startswith(home + os.sep) else shlex.quote(path)
