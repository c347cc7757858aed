"""Counters, gauges and a histogram of the server, in the text format of Prometheus."""

from collections.abc import Mapping
from functools import partial

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds

# Without this, each counter also exports a `_created` series.
prometheus_client.disable_created_metrics()


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nanogpt_requests_total",
            "HTTP requests answered.",
            ("path", "status"),
            registry=registry,
        )
        self.tokens = Counter(
            "nanogpt_tokens_total",
            "Tokens read in prompts and generated in completions.",
            ("model", "kind"),
            registry=registry,
        )
        gauge = partial(Gauge, labelnames=("model",), registry=registry)
        self.running = gauge("nanogpt_active_rows", "Sequences being generated.")
        self.waiting = gauge("nanogpt_queue_length", "Queued sequences.")
        self.first_token = Histogram(
            "nanogpt_time_to_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=BUCKETS,
            registry=registry,
        )

    def count_request(self, path: str, status: int) -> None:
        """Count one answered request by its route and status."""
        self.requests.labels(path, str(status)).inc()

    def count_tokens(self, model: str, kind: str, count: int) -> None:
        """Count tokens of a model; `kind` is "prompt" or "completion"."""
        self.tokens.labels(_label(model), kind).inc(count)

    def render(self, running: Mapping[str, int], waiting: Mapping[str, int]) -> bytes:
        """Return all metrics as text.

        Args:
            running: Sequences being generated, by the names of the loaded models.
            waiting: Queued sequences, likewise.
        """
        for gauge, counts in ((self.running, running), (self.waiting, waiting)):
            gauge.clear()
            for model, count in counts.items():
                gauge.labels(_label(model)).set(count)
        return prometheus_client.generate_latest(self.registry)


def _label(name: str) -> str:
    """Escape undecodable bytes of a folder's name, which UTF-8 cannot represent."""
    return name.encode(errors="backslashreplace").decode()
