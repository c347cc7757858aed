"""Samples on standard output: of one prompt, as JSON, or of prompts typed one after another."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nanogpt.api import Model, new_seed
from nanogpt.config import SamplingConfig, resolve_sampling
from nanogpt.errors import UserError
from nanogpt.files import cache_dir
from nanogpt.formatting import sanitize
from nanogpt.generate.sequence import Request

HISTORY_LINES = 1000
EXTRA_SETTINGS = {"num_samples": (1, 10_000, 1), "seed": (0, 2**63 - 1, None)}  # min, max, default
SAMPLING_SETTINGS = [
    name for name in SamplingConfig.model_fields if name not in ("logit_bias", "allowed_token_ids")
]


def make_requests(
    model: Model,
    prompt: str | None,
    num_samples: int,
    seed: int,
    error_on_unknown: bool,
    settings: SamplingConfig,
) -> list[Request]:
    """Return `num_samples` requests for one prompt, with seeds `seed`, `seed + 1`, ..."""
    # Encoding the prompt once also warns once about its unknown characters.
    first = model.make_request(
        prompt, seed=seed, error_on_unknown=error_on_unknown, **settings.model_dump()
    )
    return [replace(first, seed=seed + i) for i in range(num_samples)]


def stream_to_stdout(model: Model, prompt: str, requests: Sequence[Request]) -> None:
    """Generate all samples as one batch and print them in order, streaming the first."""
    clean: Callable[[str], str] = sanitize if sys.stdout.isatty() else str
    pending = [""] * len(requests)
    finished = [False] * len(requests)

    def print_head(i: int) -> None:
        if len(requests) > 1:
            print(f"--- {i + 1} of {len(requests)}, seed {requests[i].seed} ---")
        print(clean(prompt), end="", flush=True)

    current = 0
    print_head(current)
    for i, output in model.generate_many(requests):
        pending[i] += output.text
        finished[i] = output.finish_reason is not None
        while current < len(requests) and (pending[current] or finished[current]):
            print(clean(pending[current]), end="", flush=True)
            pending[current] = ""
            if not finished[current]:
                break
            print()
            current += 1
            if current < len(requests):
                print_head(current)


def print_json(model: Model, prompt: str, requests: Sequence[Request]) -> None:
    """Print one JSON object: each sample's seed, text, token ids and log-probabilities (nats)."""
    samples: list[dict[str, Any]] = [
        {"seed": request.seed, "text": "", "tokens": [], "logprobs": [], "finish_reason": None}
        for request in requests
    ]
    for i, output in model.generate_many(requests):
        sample = samples[i]
        sample["text"] += output.text
        sample["finish_reason"] = output.finish_reason
        if output.token_id is not None:
            sample["tokens"].append(output.token_id)
            sample["logprobs"].append(round(output.logprob, 6))
    print(json.dumps({"prompt": prompt, "samples": samples}, ensure_ascii=False))


def chat_loop(
    model: Model,
    num_samples: int,
    seed: int | None,
    error_on_unknown: bool,
    sampling: SamplingConfig,
) -> None:
    """Read prompts and print samples until the end of input; "/" lines change the settings."""
    settings: dict[str, Any] = sampling.model_dump() | {"num_samples": num_samples, "seed": seed}
    with suppress(ImportError):  # Windows has no readline
        _enable_history()
    print(
        "Type a prompt. /help lists the settings; Ctrl-C stops a sample, Ctrl-D exits.",
        file=sys.stderr,
    )

    def answer(prompt: str) -> None:
        first_seed = new_seed() if settings["seed"] is None else settings["seed"]
        config, n = _to_sampling_config(settings), settings["num_samples"]
        requests = make_requests(model, prompt or None, n, first_seed, error_on_unknown, config)
        try:
            stream_to_stdout(model, prompt, requests)
        except KeyboardInterrupt:
            print()
        if settings["seed"] is None:
            print(f"seed {first_seed}; repeat with /seed {first_seed}", file=sys.stderr)

    while True:
        try:
            line = input("> ")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                settings = apply_setting_command(settings, line)
            else:
                answer(line)
        except UserError as error:
            print(error, file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _to_sampling_config(settings: dict[str, Any]) -> SamplingConfig:
    return resolve_sampling(
        {name: value for name, value in settings.items() if name not in EXTRA_SETTINGS}
    )


def apply_setting_command(settings: dict[str, Any], line: str) -> dict[str, Any]:
    """Return the settings after a line such as "/top-k 10"; without a value, the default.

    Raises:
        UserError: For an unknown setting or a value out of range.
    """
    command, _, value = line[1:].strip().partition(" ")
    name = command.replace("-", "_")
    if name == "help":
        _print_settings(settings)
        return settings
    if name in EXTRA_SETTINGS:
        minimum, maximum, default = EXTRA_SETTINGS[name]
        if value and not (value.isdecimal() and minimum <= int(value) <= maximum):
            raise UserError(
                f"/{command} is not a whole number from {minimum} to {maximum:,}: {value}."
            )
        return settings | {name: int(value) if value else default}
    if name not in SAMPLING_SETTINGS:
        raise UserError(f"Unknown setting: /{command}.", "/help lists the settings.")
    changed = {key: old for key, old in settings.items() if key != name}
    if value:
        changed[name] = (value,) if name == "stop" else value
    extra = {key: settings[key] for key in EXTRA_SETTINGS}
    return _to_sampling_config(changed).model_dump() | extra


def _print_settings(settings: dict[str, Any]) -> None:
    for name in (*SAMPLING_SETTINGS, *EXTRA_SETTINGS):
        value = settings[name] if settings[name] not in (None, ()) else "-"
        print(f"  /{name.replace('_', '-'):20} {value}", file=sys.stderr)
    print("  /quit", file=sys.stderr)


def _enable_history() -> None:
    """Let input lines be edited, and keep their history in the cache folder."""
    import atexit
    import readline

    file = cache_dir() / "prompts"
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)

    def save_history() -> None:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)

    atexit.register(save_history)
