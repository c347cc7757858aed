"""What the server counts, in the text format that Prometheus reads.

In: counts and times. Out: lines of `name{label="value"} number`, each family with its help and type.
Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
Labels = tuple[tuple[str, str], ...]


class Histogram:
    """How many times lie below each of `EDGES`."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(EDGES) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(EDGES, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        below = 0
        for edge, count in zip((*EDGES, float("inf")), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{edge:g}"}} {below}'.replace("inf", "+Inf")
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """All that is counted since the server began."""

    def __init__(self) -> None:
        self.requests: Counter[Labels] = Counter()
        self.tokens: Counter[Labels] = Counter()
        self.first_token = Histogram()

    def count_request(self, path: str, status: int) -> None:
        self.requests[("path", path), ("status", str(status))] += 1

    def count_tokens(self, model: str, kind: str, count: int) -> None:
        self.tokens[("model", model), ("kind", kind)] += count

    def text(self, active: dict[str, int], waiting: dict[str, int]) -> str:
        """All of it; beside the counts the texts that are being written, and those that wait, for each loaded model."""
        lines = [
            *_family("nanogpt_requests_total", "counter", "HTTP requests answered.", self.requests),
            *_family("nanogpt_tokens_total", "counter", "Tokens read in prompts and written in completions.", self.tokens),
            *_family("nanogpt_active_rows", "gauge", "Texts being written.", {(("model", name),): count for name, count in active.items()}),
            *_family("nanogpt_queue_length", "gauge", "Texts waiting for a row.", {(("model", name),): count for name, count in waiting.items()}),
            *_head("nanogpt_time_to_first_token_seconds", "histogram", "From a request to its first token."),
            *self.first_token.lines("nanogpt_time_to_first_token_seconds"),
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]


def _family(name: str, kind: str, what: str, values: dict[Labels, int]) -> list[str]:
    return [*_head(name, kind, what), *(f"{name}{{{','.join(f'{key}={_quoted(value)}' for key, value in labels)}}} {n}" for labels, n in values.items())]


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
