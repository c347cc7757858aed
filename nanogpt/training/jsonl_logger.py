"""The listener that writes the JSONL logs of a run folder."""

from dataclasses import asdict

from nanogpt.run_folder import RunFolder, append_jsonl
from nanogpt.training.events import (
    EvalEnd,
    Event,
    InitialEval,
    RankTimings,
    SampleEnd,
    SaveStart,
    StepEnd,
    TrainStart,
)


class JsonlLogger:
    """Write each event with numbers or text as a line of a log in the run folder."""

    def __init__(self, run: RunFolder):
        self.run = run

    def __call__(self, event: Event) -> None:
        """Append one event to the logs of the run."""
        match event:
            case TrainStart():
                self.run.truncate_logs(event.step)
            case InitialEval() | StepEnd() | EvalEnd():
                append_jsonl(self.run.metrics_path, asdict(event))
            case SampleEnd():
                append_jsonl(self.run.samples_path, asdict(event))
            case RankTimings():
                append_jsonl(self.run.ranks_path, asdict(event))
            case SaveStart():
                self.run.sync_logs()
