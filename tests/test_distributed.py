"""Many processes train the model that one would train: the same batches, the same losses, the same weights."""

import json
import os
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
from nanogpt.files import cache_dir

RUN = TINY | {"dropout": 0.1, "steps": 12, "eval_every": 6, "device": "cpu", "threads": 1, "seed": 3}
KINDS = [(arch, optimizer, micro) for arch in ("classic", "modern") for optimizer in ("adamw", "muon") for micro in (None, 1)]
WORKER = """
import json, os, sys
import nanogpt
for job in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(job.pop("port"))
    nanogpt.train(**job)
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
    """Train runs in so many processes; all that they said, by rank, and their exit codes."""
    jobs = [{**job, "port": free_port()} for job in jobs]
    processes = [start(rank, size, jobs) for rank in range(size)]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, said


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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run of every kind in one process, and in many, each way; several of a kind in one start of the processes, which takes seconds."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "story.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40, encoding="utf-8")
    cache_dir().mkdir(parents=True, exist_ok=True)
    jobs = {2: [], 4: []}
    for arch, optimizer, micro in KINDS:
        settings = RUN | {"arch": arch, "optimizer": optimizer, "batch_size": 8, "micro_batch_size": micro}
        nanogpt.train(text, folder / f"{arch}-{optimizer}-{micro}-1", **settings)
        for size, ways in ((2, ("ddp", "fsdp")), (4, ("ddp", "fsdp") if micro is None else ())):
            jobs[size] += [{"text": str(text), "out": str(folder / f"{arch}-{optimizer}-{micro}-{size}-{way}"), "parallel": way, **settings} for way in ways]
    for size, these in jobs.items():
        together(size, these)
    return folder


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("arch", "optimizer", "micro"), KINDS)
def test_two_processes_train_what_one_would(runs, arch, optimizer, micro, way):
    kind = f"{arch}-{optimizer}-{micro}"
    equal(runs / f"{kind}-2-{way}", runs / f"{kind}-1", 1e-4 if optimizer == "muon" else 1e-5)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("arch", "optimizer"), [(arch, optimizer) for arch, optimizer, micro in KINDS if micro is None])
def test_four_processes_train_what_one_would(runs, arch, optimizer, way):
    kind = f"{arch}-{optimizer}-None"
    equal(runs / f"{kind}-4-{way}", runs / f"{kind}-1", 1e-4 if optimizer == "muon" else 1e-5)
