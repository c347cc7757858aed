"""The listener that writes the JSONL logs of a run folder."""

from dataclasses import asdict

from nanogpt.run_folder import RunFolder, append_jsonl
from nanogpt.training import events


def log_event(run: RunFolder, event: events.Event) -> None:
    """Append an event with numbers or text as a line to its log in the run folder."""
    match event:
        case events.TrainStart():
            run.truncate_logs(event.step)
        case events.InitialEval() | events.StepEnd() | events.EvalEnd():
            append_jsonl(run.metrics_path, asdict(event))
        case events.SampleEnd():
            append_jsonl(run.samples_path, asdict(event))
        case events.RankTimings():
            append_jsonl(run.ranks_path, asdict(event))
        case events.SaveStart():
            run.sync_logs()
