"""Training in several processes equals training in one: losses, weights and resumption."""

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
from helpers import TINY, free_port, weights
from safetensors.torch import load_file

import nanogpt
from nanogpt import checkpoint
from nanogpt.device.compile import has_compiler
from nanogpt.distributed import launch as distributed_launch
from nanogpt.distributed.context import DistContext
from nanogpt.errors import UserError
from nanogpt.training.events import StepEnd

pytestmark = pytest.mark.distributed

RUN = TINY | {
    "batch_size": 8,
    "dropout": 0.1,
    "steps": 6,
    "eval_every": 3,
    "device": "cpu",
    "threads": 1,
    "seed": 3,
}
# Each variant is an architecture, an optimizer and a micro-batch size.
VARIANTS = [
    (arch, optimizer, micro_batch_size)
    for arch in ("gpt2", "qwen3")
    for optimizer in ("adamw", "muon")
    for micro_batch_size in (None, 1)
]
FOUR_RANK_VARIANTS = [("gpt2", "adamw", None), ("qwen3", "adamw", 1), ("qwen3", "muon", None)]
RESUMED_VARIANT = ("qwen3", "muon", None)
WORKER = Path(__file__).with_name("distributed_worker.py")


def variant_name(variant):
    return "-".join(map(str, variant))


def start_rank(rank, world_size, command, **environment):
    """Start one rank as torchrun does."""
    environment = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": Path(nanogpt.__file__).parent.parent,
    } | environment
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_distributed(world_size, jobs):
    """Train runs one after another in several processes, and return what these print."""
    jobs = [{**job, "port": free_port()} for job in jobs]
    processes = [
        start_rank(
            rank,
            world_size,
            [WORKER, json.dumps(jobs)],
            LOCAL_RANK=rank,
            LOCAL_WORLD_SIZE=world_size,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(errors)
    return "\n".join(errors)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val_losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return [row["train_loss"] for row in rows] + val_losses


def assert_runs_equal(run, other, tolerance):
    assert losses(run) == pytest.approx(losses(other), rel=tolerance)
    best, other_best = (load_file(path / "model.safetensors") for path in (run, other))
    for tensors, other_tensors in ((weights(run), weights(other)), (best, other_best)):
        assert tensors.keys() == other_tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor,
                other_tensors[name],
                rtol=0,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def stop_after_three_steps(event):
    if isinstance(event, StepEnd) and event.step == 3:
        signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def _module_cache(tmp_path_factory):
    """Give the runs of this module their own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, _module_cache):
    """Train all variants in one, two and four processes, and resume stopped runs.

    All runs of a world size share the same processes, because starting them takes seconds.
    """
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "story.txt"
    text.write_text(
        "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40,
        encoding="utf-8",
    )

    def job(variant, name, **more):
        arch, optimizer, micro_batch_size = variant
        settings = {
            "text": str(text),
            "out": str(folder / name),
            "arch": arch,
            "optimizer": optimizer,
            "micro_batch_size": micro_batch_size,
        }
        return settings | RUN | more

    jobs: dict[int, list] = {2: [], 4: []}
    for variant in VARIANTS:
        name = variant_name(variant)
        nanogpt.train(**job(variant, f"{name}-1"))
        for world_size in (2, 4) if variant in FOUR_RANK_VARIANTS else (2,):
            jobs[world_size] += [
                job(variant, f"{name}-{world_size}-{parallel}", parallel=parallel)
                for parallel in ("ddp", "fsdp")
            ]
    with pytest.raises(SystemExit):
        nanogpt.train(**job(RESUMED_VARIANT, "stopped-1"), on_event=stop_after_three_steps)
    jobs[2] += [
        job(RESUMED_VARIANT, f"stopped-{parallel}", parallel=parallel, stop=3)
        for parallel in ("ddp", "fsdp")
    ]
    jobs[2].append(job(RESUMED_VARIANT, "delayed-fsdp", parallel="fsdp", delay=4))
    train_distributed(2, jobs[2])
    for before in ("1", "ddp", "fsdp"):
        stopped = folder / f"stopped-{before}"
        assert checkpoint.latest_step(stopped) == 3
        for world_size, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")):
            run = shutil.copytree(stopped, folder / f"{before}-then-{world_size}-{parallel}")
            if world_size == 1:
                nanogpt.train(out=run, resume=True)
            else:
                jobs[world_size].append({"out": str(run), "resume": True, "parallel": parallel})
    train_distributed(2, [job for job in jobs[2] if job.get("resume")])
    train_distributed(4, jobs[4])
    return folder


def tolerance(optimizer):
    """Return the error of sums in another order, which Muon's matmuls amplify."""
    return 1e-4 if optimizer == "muon" else 1e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_two_ranks_equal_one(runs, variant, parallel):
    name = variant_name(variant)
    assert_runs_equal(runs / f"{name}-2-{parallel}", runs / f"{name}-1", tolerance(variant[1]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("variant", FOUR_RANK_VARIANTS, ids=variant_name)
def test_four_ranks_equal_one(runs, variant, parallel):
    name = variant_name(variant)
    assert_runs_equal(runs / f"{name}-4-{parallel}", runs / f"{name}-1", tolerance(variant[1]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resume_distributed_is_bit_exact(runs, parallel):
    uninterrupted = runs / f"{variant_name(RESUMED_VARIANT)}-2-{parallel}"
    assert_runs_equal(runs / f"{parallel}-then-2-{parallel}", uninterrupted, 0.0)


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")]
)
@pytest.mark.parametrize("before", ["1", "ddp", "fsdp"])
def test_resume_with_another_world_size_and_parallelism(runs, before, world_size, parallel):
    assert_runs_equal(
        runs / f"{before}-then-{world_size}-{parallel}",
        runs / f"{variant_name(RESUMED_VARIANT)}-1",
        tolerance("muon"),
    )


def test_save_fsdp_overlaps_with_training(runs):
    uninterrupted = runs / f"{variant_name(RESUMED_VARIANT)}-1"
    assert_runs_equal(runs / "delayed-fsdp", uninterrupted, tolerance("muon"))


def test_rank_timings_are_logged(runs):
    lines = (runs / "gpt2-adamw-None-2-ddp" / "ranks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], len(row["seconds"])) for row in rows] == [(3, 2), (6, 2)]
    assert 0 <= rows[0]["comm_fraction"] < 1


def launch_ranks(commands):
    """Run a command on each of two ranks; return their exit codes and errors."""
    port = free_port()
    processes = [
        start_rank(rank, len(commands), command, MASTER_PORT=port)
        for rank, command in enumerate(commands)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


def test_launch_with_different_settings_is_refused_before_anything_is_written(story, tmp_path):
    train = ["-m", "nanogpt", "train", story, "--out", tmp_path / "run", "--steps"]
    codes, errors = launch_ranks([[*train, 4], [*train, 5]])
    assert codes == [2, 2]
    assert "launched with different settings" in errors[0]
    assert 'steps            "4": rank 0' in errors[0]
    assert 'steps            "5": rank 1' in errors[0]
    assert "torchrun --nproc-per-node 2 -m nanogpt train" in errors[0]
    assert errors[1] == ""
    assert not (tmp_path / "run").exists()


def test_launch_with_different_versions_is_refused(story, tmp_path):
    older = (
        "import nanogpt; nanogpt.__version__ = '0.0.1'; from nanogpt.cli.main import main; main()"
    )
    train = ["train", story, "--out", tmp_path / "run", "--steps", 4]
    codes, errors = launch_ranks([["-m", "nanogpt", *train], ["-c", older, *train]])
    assert codes == [2, 2]
    assert f'nanogpt          "{nanogpt.__version__}": rank 0' in errors[0]
    assert 'nanogpt          "0.0.1": rank 1' in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="there is no compiler")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_two_ranks_equal_one(story, tmp_path, parallel):
    job = {"text": str(story), "arch": "qwen3"} | RUN
    nanogpt.train(**job, out=tmp_path / "one")
    two = {"out": str(tmp_path / "two"), "parallel": parallel, "compile": True}
    errors = train_distributed(2, [job | two])
    assert "compile = true" in (tmp_path / "two" / "config.toml").read_text()
    assert "torch.compile failed" not in errors
    assert_runs_equal(tmp_path / "two", tmp_path / "one", 1e-4)


@pytest.fixture
def set_rank(monkeypatch):
    """Return a function that makes this process one rank of a launch by torchrun."""

    def set_environment(rank, world_size, port, address="127.0.0.1"):
        environment = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        command = ["/usr/bin/nanogpt", "train", "book.txt", "--batch-size", "32", "--device=cuda"]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(distributed_launch, "INIT_TIMEOUT_SECONDS", 1.0)

    return set_environment


def test_local_batch_slice_requires_a_divisible_batch_size(set_rank):
    set_rank(0, 3, 1)
    with pytest.raises(UserError) as error:
        DistContext(0, 3, backend="gloo").local_batch_slice(32)
    message = str(error.value)
    assert "batch size 32 is not divisible" in message
    assert "3 (ranks 0 to 2, gloo)" in message
    torchrun = "torchrun --nproc-per-node"
    assert f"{torchrun} 3 -m nanogpt train book.txt --device=cuda --batch-size 33" in message
    assert f"{torchrun} 2 -m nanogpt train book.txt --batch-size 32" in message
    with pytest.raises(SystemExit):
        DistContext(1, 3, backend="gloo").local_batch_slice(32)
    assert DistContext(2, 4).local_batch_slice(32) == range(16, 24)


def test_init_distributed_reports_a_port_in_use(set_rank):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        set_rank(0, 2, port)
        expected = (
            rf"Rank 0 of 2 \(gloo\) cannot listen at 127.0.0.1:{port}: the port is in use.\n"
            rf".*--master-port {port + 1} "
        )
        with pytest.raises(UserError, match=expected):
            distributed_launch.init_distributed("cpu")


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_init_distributed_reports_an_unreachable_address(set_rank, address):
    port = free_port()
    set_rank(1, 2, port, address)
    expected = (
        rf"Rank 1 of 2 \(gloo\) could not connect to the other processes at {address}:{port} .*\n"
        r".*--rdzv-endpoint HOST:PORT -m nanogpt train"
    )
    with pytest.raises(UserError, match=expected):
        distributed_launch.init_distributed("cpu")


def test_init_distributed_reports_a_missing_rank(set_rank):
    set_rank(0, 2, free_port())
    with pytest.raises(UserError, match=r"Rank 0 of 2 \(gloo\) could not connect to the other"):
        distributed_launch.init_distributed("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_init_distributed_reports_missing_gpus(set_rank):
    set_rank(0, 2, 1)
    with pytest.raises(
        UserError, match=r"finds no GPU for 2 processes \(ranks 0 to 1, NCCL\)"
    ) as error:
        distributed_launch.init_distributed("cuda")
    command = "torchrun --nproc-per-node 2 -m nanogpt train book.txt --batch-size 32 --device cpu"
    assert command in str(error.value)


def test_init_distributed_without_torchrun_is_a_single_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    context = distributed_launch.init_distributed("cpu")
    assert context == DistContext()
    assert context.all_reduce_sum(1.5, 2) == [1.5, 2]
    assert context.any_rank(True, False) == [True, False]
    assert context.broadcast_object({"a": 1}) == {"a": 1}
    assert context.all_gather_object(3) == [3]
    assert context.local_batch_slice(5) == range(5)
