"""Texts for a person: one prompt's on the screen, or prompts and texts in turn.

In: a model, a prompt, settings. Out: texts on standard output in their order, the first as it is made; what is about them goes to standard error.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nanogpt import generate, report
from nanogpt.config import SamplingConfig, resolve_sampling
from nanogpt.errors import UserError
from nanogpt.files import cache_dir
from nanogpt.library import Model, new_seed

HISTORY = 1000  # lines that are remembered
OURS = ("n", "seed")  # what can be set besides the settings of sampling
NAMES = [name for name in SamplingConfig.model_fields if name not in ("logit_bias", "allowed")]


def requests_for(model: Model, prompt: str | None, n: int, seed: int, strict: bool, settings: SamplingConfig) -> list[generate.Request]:
    """n texts that continue a prompt; the second has the next seed, and so on."""
    first = model.request(prompt, seed=seed, strict=strict, **settings.model_dump())  # so that what is odd about the prompt is said once
    return [first, *(generate.Request(first.prompt, settings, seed + i) for i in range(1, n))]


def print_texts(model: Model, prompt: str, requests: Sequence[generate.Request]) -> None:
    """Write the texts, side by side, and print one after another: the first as it is made, and each that follows as far as it is made by then."""
    show: Callable[[str], str] = report.printable if sys.stdout.isatty() else str
    unprinted, ended = [""] * len(requests), [False] * len(requests)

    def begin(i: int) -> None:
        if len(requests) > 1:
            print(f"--- {i + 1} of {len(requests)}, seed {requests[i].seed} ---")
        print(show(prompt), end="", flush=True)

    at = 0
    begin(at)
    for i, piece in model.write(requests):
        unprinted[i], ended[i] = unprinted[i] + piece.text, piece.finish is not None
        while at < len(requests) and (unprinted[at] or ended[at]):
            print(show(unprinted[at]), end="", flush=True)
            unprinted[at] = ""
            if not ended[at]:
                break
            print()
            at += 1
            if at < len(requests):
                begin(at)


def print_json(model: Model, prompt: str, requests: Sequence[generate.Request]) -> None:
    """One object: for each text its seed, the text, and of every token its id and its log-probability in nats; and how the text ended."""
    samples: list[dict[str, Any]] = [{"seed": request.seed, "text": "", "tokens": [], "logprobs": [], "finish": None} for request in requests]
    for i, piece in model.write(requests):
        samples[i]["text"] += piece.text
        samples[i]["finish"] = piece.finish
        if piece.token is not None:
            samples[i]["tokens"].append(piece.token)
            samples[i]["logprobs"].append(round(piece.logprob, 6))
    print(json.dumps({"prompt": prompt, "samples": samples}, ensure_ascii=False))


def converse(model: Model, n: int, seed: int | None, strict: bool, sampling: SamplingConfig) -> None:
    """Prompts from the keyboard and texts in turn, until the end of input. Lines that begin with a slash change the settings."""
    settings: dict[str, Any] = sampling.model_dump() | {"n": n, "seed": seed}
    with suppress(ImportError):  # Windows has none, and lines are then edited plainly
        _remember_lines()
    print("Type what the text begins with. /help shows the settings; Ctrl-C stops a text, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
            if line.startswith("/"):
                if line.strip() == "/quit":
                    return
                settings = _changed(settings, line)
                continue
            seed = new_seed() if settings["seed"] is None else settings["seed"]
            try:
                print_texts(model, line, requests_for(model, line or None, settings["n"], seed, strict, _sampling(settings)))
            except KeyboardInterrupt:
                print()
            if settings["seed"] is None:
                print(f"--seed {seed}", file=sys.stderr)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _sampling(settings: dict[str, Any]) -> SamplingConfig:
    return resolve_sampling({name: value for name, value in settings.items() if name not in OURS})


def _changed(settings: dict[str, Any], line: str) -> dict[str, Any]:
    """The settings after a line such as "/top-k 10"; without a value it goes back to what it is otherwise. Errors: `UserError` for other lines."""
    command, _, value = line[1:].strip().partition(" ")
    name = command.replace("-", "_")
    if name == "help":
        for known in (*NAMES, *OURS):
            print(f"  /{known.replace('_', '-'):20} {settings[known] if settings[known] not in (None, ()) else '-'}", file=sys.stderr)
        print("  /quit", file=sys.stderr)
        return settings
    if name not in (*NAMES, *OURS):
        raise UserError(f"There is no /{command}.", "/help lists what there is.")
    if name in OURS:
        least, most, otherwise = (1, 10_000, 1) if name == "n" else (0, 2**63 - 1, None)
        if value and not (value.isdecimal() and least <= int(value) <= most):
            raise UserError(f"/{name} takes a whole number from {least} to {most:,}, not {value!r}.")
        return settings | {name: int(value) if value else otherwise}
    wanted = (value,) if name == "stop" else value
    changed = {key: old for key, old in settings.items() if key != name} | ({name: wanted} if value else {})
    return _sampling(changed).model_dump() | {ours: settings[ours] for ours in OURS}


def _remember_lines() -> None:
    """Let lines be edited and those of earlier times be called back."""
    import atexit
    import readline

    file = cache_dir() / "prompts"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY)

    def keep() -> None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)

    atexit.register(keep)
