"""One rank of `test_distributed.py`: trains the runs given as JSON, one after another."""

import json
import os
import signal
import sys
import threading

import nanogpt
from nanogpt import checkpoint
from nanogpt.training import trainer
from nanogpt.training.events import SaveEnd, StepEnd

dcp_save = checkpoint.dcp_save


def train(job):
    """Train one run.

    A job has the arguments of `nanogpt.train`, and `port`; `stop`, the step after which the run is
    terminated; and `delay`, the step before which no shard is written on rank 0.
    """
    os.environ["MASTER_PORT"] = str(job.pop("port"))
    stop, delay = job.pop("stop", None), job.pop("delay", None)
    reached, events = threading.Event(), []

    def on_event(event):
        events.append((type(event), getattr(event, "step", None)))
        if isinstance(event, StepEnd) and event.step == stop:
            signal.raise_signal(signal.SIGTERM)
        if isinstance(event, StepEnd) and event.step == delay:
            reached.set()

    def delayed_save(*args):
        if os.environ["RANK"] == "0":
            assert reached.wait(60), f"no step {delay} while the state was being saved"
        dcp_save(*args)

    checkpoint.dcp_save = dcp_save if delay is None else delayed_save
    try:
        nanogpt.train(**job, on_event=on_event)
        if delay is not None and events:
            assert events.index((StepEnd, delay)) < events.index((SaveEnd, 3))
        assert stop is None
    except SystemExit as end:
        if end.code != 143 or stop is None:
            raise


trainer.SAMPLE_SETTINGS = trainer.SAMPLE_SETTINGS.model_copy(update={"max_tokens": 2})
for job in json.loads(sys.argv[1]):
    train(job)
