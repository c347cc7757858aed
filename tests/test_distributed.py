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
from nanogpt.errors import UserError
from nanogpt.machine import has_compiler, ranks
from nanogpt.machine.shards import read_whole
from nanogpt.report import Stepped

RUN = TINY | {"batch_size": 8, "dropout": 0.1, "steps": 6, "eval_every": 3, "device": "cpu", "threads": 1, "seed": 3}
KINDS = [(arch, optimizer, micro) for arch in ("classic", "modern") for optimizer in ("adamw", "muon") for micro in (None, 1)]
OF_FOUR = [("classic", "adamw", None), ("modern", "adamw", 1), ("modern", "muon", None)]
STOPPED = ("modern", "muon", None)  # the kind of the runs that are stopped and go on
WORKER = """
import json, os, signal, sys, threading
import nanogpt
from nanogpt import checkpoint, trainer
from nanogpt.report import Saved, Stepped
save_shards = checkpoint.save_shards
trainer.SAMPLE = trainer.SAMPLE.model_copy(update={"max_tokens": 2})
for job in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], stop, held = str(job.pop("port")), job.pop("stop", None), job.pop("held", None)
    later, seen = threading.Event(), []
    def on_event(event):
        seen.append((type(event), getattr(event, "step", None)))
        if isinstance(event, Stepped) and event.step == stop:
            signal.raise_signal(signal.SIGTERM)
        if isinstance(event, Stepped) and event.step == held:
            later.set()
    def written_later(*parts):
        assert os.environ["RANK"] != "0" or later.wait(60), f"no step {held} while the state was being saved"
        save_shards(*parts)
    checkpoint.save_shards = save_shards if held is None else written_later
    try:
        nanogpt.train(**job, on_event=on_event)
        assert held is None or not seen or seen.index((Stepped, held)) < seen.index((Saved, 3))
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
    """Train runs in so many processes, one after another; what the processes said."""
    jobs = [{**job, "port": free_port()} for job in jobs]
    processes = [start(rank, size, jobs) for rank in range(size)]
    try:
        said = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)
    return "\n".join(said)


def weights(run):
    folder = run / "state" / str(checkpoint.latest_step(run))
    return {name: tensor for name, tensor in read_whole(folder).items() if name in load_file(run / "model.safetensors")}


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
    jobs[2].append(job(STOPPED, "held-fsdp", parallel="fsdp", held=4))
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


def test_training_goes_on_while_sharded_weights_are_written(runs):
    equal(runs / "held-fsdp", runs / f"{'-'.join(map(str, STOPPED))}-1", tolerance(STOPPED[1]))


def test_the_pace_of_every_process_is_in_the_log(runs):
    rows = [json.loads(line) for line in (runs / "classic-adamw-None-2-ddp" / "ranks.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["seconds"])) for row in rows] == [(3, 2), (6, 2)]
    assert 0 <= rows[0]["exchange"] < 1


def launch(rank, size, *words, program=("-m", "nanogpt"), **environment):
    """One process of several, from the command line."""
    environment = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"} | environment
    own = os.environ | {name: str(value) for name, value in environment.items()} | {"PYTHONPATH": str(Path(nanogpt.__file__).parent.parent)}
    command = [sys.executable, *program, "train", *map(str, words)]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_were_begun_differently_are_refused_before_anything_is_written(story, tmp_path):
    port = free_port()
    processes = [launch(rank, 2, story, "--out", tmp_path / "run", "--steps", 4 + rank, MASTER_PORT=port) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "not begun alike" in said[0]
    assert 'steps            "4": rank 0' in said[0]
    assert 'steps            "5": rank 1' in said[0]
    assert "torchrun --nproc-per-node 2 -m nanogpt train" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()


def test_a_process_of_another_version_is_refused(story, tmp_path):
    port = free_port()
    older = "import nanogpt; nanogpt.__version__ = '0.0.1'; from nanogpt.cli import main; main()"
    programs = ("-m", "nanogpt"), ("-c", older)
    processes = [launch(rank, 2, story, "--out", tmp_path / "run", "--steps", 4, program=programs[rank], MASTER_PORT=port) for rank in range(2)]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert f'nanogpt          "{nanogpt.__version__}": rank 0' in said[0]
    assert 'nanogpt          "0.0.1": rank 1' in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="there is no compiler")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_compiled_steps_of_two_processes_train_what_one_would(story, tmp_path, way):
    job = {"text": str(story), "arch": "modern"} | RUN
    nanogpt.train(**job, out=tmp_path / "one")
    said = together(2, [job | {"out": str(tmp_path / "two"), "parallel": way, "compile": True}])
    assert "compile = true" in (tmp_path / "two" / "config.toml").read_text()
    assert "torch.compile failed" not in said
    equal(tmp_path / "two", tmp_path / "one", 1e-4)


@pytest.fixture
def in_process(monkeypatch):
    """What a launcher tells one of several processes."""

    def tell(rank, size, port, address="127.0.0.1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["/usr/bin/nanogpt", "train", "book.txt", "--batch-size", "32", "--device=cuda"])
        monkeypatch.setattr(ranks, "JOIN_SECONDS", 1.0)

    return tell


def test_a_batch_that_cannot_be_shared_names_one_that_can(in_process):
    in_process(0, 3, 1)
    with pytest.raises(UserError) as refused:
        ranks.Ranks(0, 3, backend="gloo").rows(32)
    assert "32 windows cannot be shared evenly by 3 processes (ranks 0 to 2, gloo)" in str(refused.value)
    assert "torchrun --nproc-per-node 3 -m nanogpt train book.txt --device=cuda --batch-size 33" in str(refused.value)
    assert "torchrun --nproc-per-node 2 -m nanogpt train book.txt --batch-size 32" in str(refused.value)
    with pytest.raises(SystemExit):
        ranks.Ranks(1, 3, backend="gloo").rows(32)
    assert ranks.Ranks(2, 4).rows(32) == range(16, 24)


def test_a_port_that_is_taken_is_said(in_process):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        in_process(0, 2, port)
        with pytest.raises(UserError, match=rf"Rank 0 of 2 \(gloo\) cannot listen at 127.0.0.1:{port}: the port is taken.\n.*--master-port {port + 1} "):
            ranks.join("cpu")


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_an_address_where_nobody_is_is_said(in_process, address):
    port = free_port()
    in_process(1, 2, port, address)
    with pytest.raises(UserError, match=rf"Rank 1 of 2 \(gloo\) did not reach the others at {address}:{port} .*\n.*--rdzv-endpoint HOST:PORT -m nanogpt train"):
        ranks.join("cpu")


def test_a_process_that_waits_in_vain_says_so(in_process):
    in_process(0, 2, free_port())
    with pytest.raises(UserError, match=r"Rank 0 of 2 \(gloo\) did not reach the others"):
        ranks.join("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_nccl_without_gpus_is_said(in_process):
    in_process(0, 2, 1)
    with pytest.raises(UserError, match=r"2 processes \(ranks 0 to 1, NCCL\).*sees none") as refused:
        ranks.join("cuda")
    assert "torchrun --nproc-per-node 2 -m nanogpt train book.txt --batch-size 32 --device cpu" in str(refused.value)


def test_one_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    alone = ranks.join("cpu")
    assert alone == ranks.Ranks()
    assert (alone.sum(1.5, 2), alone.any(True, False), alone.of_first({"a": 1}), alone.of_all(3)) == ([1.5, 2], [True, False], {"a": 1}, [3])
    assert alone.rows(5) == range(5)
