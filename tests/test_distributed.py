"""Many processes train the model that one would train: the same batches, the same losses, the same weights."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import nanogpt
from nanogpt import checkpoint
from nanogpt.report import Stepped

RUN = TINY | {"batch_size": 8, "dropout": 0.1, "steps": 6, "eval_every": 3, "device": "cpu", "threads": 1, "seed": 3}
KINDS = [(arch, optimizer, micro) for arch in ("classic", "modern") for optimizer in ("adamw", "muon") for micro in (None, 1)]
OF_FOUR = [("classic", "adamw", None), ("modern", "adamw", 1), ("modern", "muon", None)]
STOPPED = ("modern", "muon", None)  # the kind of the runs that are stopped and go on
WORKER = """
import json, os, signal, sys
import nanogpt
from nanogpt import trainer
from nanogpt.report import Stepped
trainer.SAMPLE = trainer.SAMPLE.model_copy(update={"max_tokens": 2})
for job in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], stop = str(job.pop("port")), job.pop("stop", None)
    asked = lambda event: signal.raise_signal(signal.SIGTERM) if isinstance(event, Stepped) and event.step == stop else None
    try:
        nanogpt.train(**job, on_event=asked)
        assert stop is None
    except SystemExit as end:
        assert (end.code, stop is not None) == (143, True), end
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(rank, size, jobs, **environment):
    """One process of several, which trains one run after another."""
    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"} | environment
    own = os.environ | {name: str(value) for name, value in environment.items()} | {"PYTHONPATH": str(Path(nanogpt.__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(jobs)], env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(size, jobs):
    """Train runs in so many processes, one after another."""
    jobs = [{**job, "port": free_port()} for job in jobs]
    processes = [start(rank, size, jobs) for rank in range(size)]
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)


def weights(run):
    return load_file(run / "state" / str(checkpoint.latest_step(run)) / "weights.safetensors")


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train_loss"] for row in rows] + [row["val_loss"] for row in rows if "val_loss" in row]


def equal(run, other, tolerance):
    assert losses(run) == pytest.approx(losses(other), rel=tolerance)
    for one, two in ((weights(run), weights(other)), *[[load_file(path / "model.safetensors") for path in (run, other)]]):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def stop_after_three(event):
    """Asks a run to stop, as it is asked on a machine that is taken away."""
    if isinstance(event, Stepped) and event.step == 3:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run of every kind in one process, and in many, each way; several of a kind in one start of the processes, which takes seconds. And runs that
    were stopped, and went on in another way."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "story.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40, encoding="utf-8")

    def job(kind, name, **more):
        arch, optimizer, micro = kind
        return {"text": str(text), "out": str(folder / name), "arch": arch, "optimizer": optimizer, "micro_batch_size": micro} | RUN | more

    jobs: dict[int, list] = {2: [], 4: []}
    for kind in KINDS:
        name = "-".join(map(str, kind))
        nanogpt.train(**job(kind, f"{name}-1"))
        for size in (2, 4) if kind in OF_FOUR else (2,):
            jobs[size] += [job(kind, f"{name}-{size}-{way}", parallel=way) for way in ("ddp", "fsdp")]
    with pytest.raises(SystemExit):
        nanogpt.train(**job(STOPPED, "stopped-1"), on_event=stop_after_three)
    jobs[2] += [job(STOPPED, f"stopped-{way}", parallel=way, stop=3) for way in ("ddp", "fsdp")]
    together(2, jobs[2])
    for before in ("1", "ddp", "fsdp"):
        assert checkpoint.latest_step(folder / f"stopped-{before}") == 3
        for size, way in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")):
            after = shutil.copytree(folder / f"stopped-{before}", folder / f"{before}-then-{size}-{way}")
            if size == 1:
                nanogpt.train(out=after, resume=True)
            else:
                jobs[size].append({"out": str(after), "resume": True, "parallel": way})
    together(2, [job for job in jobs[2] if job.get("resume")])
    together(4, jobs[4])
    return folder


def tolerance(optimizer):
    """Of sums in another order; Muon's products make more of them."""
    return 1e-4 if optimizer == "muon" else 1e-5


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("arch", "optimizer", "micro"), KINDS)
def test_two_processes_train_what_one_would(runs, arch, optimizer, micro, way):
    kind = f"{arch}-{optimizer}-{micro}"
    equal(runs / f"{kind}-2-{way}", runs / f"{kind}-1", tolerance(optimizer))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("arch", "optimizer", "micro"), OF_FOUR)
def test_four_processes_train_what_one_would(runs, arch, optimizer, micro, way):
    kind = f"{arch}-{optimizer}-{micro}"
    equal(runs / f"{kind}-4-{way}", runs / f"{kind}-1", tolerance(optimizer))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_that_go_on_equal_two_that_never_stopped_bit_for_bit(runs, way):
    equal(runs / f"{way}-then-2-{way}", runs / f"{'-'.join(map(str, STOPPED))}-2-{way}", 0.0)


@pytest.mark.parametrize(("size", "way"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")])
@pytest.mark.parametrize("before", ["1", "ddp", "fsdp"])
def test_a_run_goes_on_in_another_number_of_processes_and_another_way(runs, before, size, way):
    equal(runs / f"{before}-then-{size}-{way}", runs / f"{'-'.join(map(str, STOPPED))}-1", tolerance(STOPPED[1]))


def test_the_pace_of_every_process_is_in_the_log(runs):
    rows = [json.loads(line) for line in (runs / "classic-adamw-None-2-ddp" / "ranks.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["seconds"])) for row in rows] == [(3, 2), (6, 2)]
    assert 0 <= rows[0]["exchange"] < 1
