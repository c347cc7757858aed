"""What happens in a run, told: events to the terminal, to files, and to whoever else wants them."""

from nanogpt.plan import duration
from nanogpt.report.events import (
    Began,
    Evaluated,
    Event,
    Finished,
    Interrupted,
    Paced,
    Sampled,
    Saved,
    Saving,
    Speed,
    Started,
    Stepped,
    Stopping,
)
from nanogpt.report.html import write_report
from nanogpt.report.log import RunLog, read_records
from nanogpt.report.terminal import Terminal, loss_table, printable, show_by_position, show_evaluation, show_speed
from nanogpt.report.trackers import Trackers

__all__ = [
    "Began",
    "Evaluated",
    "Event",
    "Finished",
    "Interrupted",
    "Paced",
    "RunLog",
    "Sampled",
    "Saved",
    "Saving",
    "Speed",
    "Started",
    "Stepped",
    "Stopping",
    "Terminal",
    "Trackers",
    "duration",
    "loss_table",
    "printable",
    "read_records",
    "show_by_position",
    "show_evaluation",
    "show_speed",
    "write_report",
]
