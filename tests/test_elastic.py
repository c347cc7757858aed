"""Fault tolerance under torchrun: killed ranks, signals, a full disk (run with `-m slow`)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY, free_port, weights
from safetensors.torch import load_file

import nanogpt
from nanogpt import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun and signals are those of Unix"),
]
SETTINGS = TINY | {"dropout": 0.1, "eval_every": 10, "device": "cpu", "threads": 1, "seed": 3}
KILLS, STEPS = 20, 600
# A program that runs nanogpt, and whose disk is full at step 20 on one rank.
DISK_FULL_PROGRAM = """
import errno
from nanogpt import checkpoint
from nanogpt.cli.main import main
save_state = checkpoint.save_state
def fail(run, step, *rest):
    if step == 20 and rest[-1].rank == {rank}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return save_state(run, step, *rest)
checkpoint.save_state = fail
main()
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(nanogpt.__file__).parent.parent)}


def flags(**settings):
    result = []
    for name, value in (SETTINGS | settings).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            result.append(f"--{flag}={value}")
    return result


def torchrun(*args, max_restarts=0, program=("-m", "nanogpt")):
    """Start torchrun with two ranks on this machine."""
    options = ["--standalone", "--nproc-per-node", 2, "--max-restarts", max_restarts]
    command = ["-m", "torch.distributed.run", *options, *program, "train", *args]
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_success(process):
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def last_step(run):
    """Return the last complete step in metrics.jsonl, which may still be written."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().rsplit("\n", 2)[-2])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def worker_pids(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def assert_weights_equal(run, other):
    best, other_best = (load_file(path / "model.safetensors") for path in (run, other))
    for tensors, other_tensors in ((weights(run), weights(other)), (best, other_best)):
        assert all(tensors[name].equal(other_tensors[name]) for name in other_tensors)


@pytest.fixture
def parallel():
    """Return the parallelism of the uninterrupted run; tests may parametrize it."""
    return "ddp"


@pytest.fixture
def uninterrupted(story, tmp_path, parallel):
    run = tmp_path / "uninterrupted"
    wait_for_success(torchrun(story, "--out", run, *flags(steps=STEPS, parallel=parallel)))
    return run


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process"
)
def test_twenty_killed_ranks_change_nothing(story, tmp_path, uninterrupted):
    generator, run = random.Random(1), tmp_path / "run"
    process = torchrun(story, "--out", run, *flags(steps=STEPS), max_restarts=KILLS)
    kills, next_kill = 0, 10
    while process.poll() is None and kills < KILLS:
        if last_step(run) >= next_kill and len(pids := worker_pids(process)) == 2:
            os.kill(generator.choice(pids), signal.SIGKILL)
            kills += 1
            next_kill = last_step(run) + generator.randrange(1, 40)
            time.sleep(1)
        time.sleep(0.002)
    wait_for_success(process)
    assert kills == KILLS
    assert_weights_equal(run, uninterrupted)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_killed_while_saving_changes_nothing(story, tmp_path, uninterrupted, parallel):
    run = tmp_path / "run"
    settings = flags(steps=STEPS, parallel=parallel)
    process = torchrun(story, "--out", run, *settings, max_restarts=3)
    kills = 0
    while process.poll() is None and kills < 3:
        # Hidden files are those that are being written.
        if list((run / "state").glob(".*")) and len(pids := worker_pids(process)) == 2:
            os.kill(pids[0], signal.SIGKILL)
            kills += 1
            time.sleep(1)
    wait_for_success(process)
    assert kills == 3
    assert_weights_equal(run, uninterrupted)


def test_sigterm_saves_and_resume_is_bit_exact(story, tmp_path, uninterrupted):
    run = tmp_path / "run"
    process = torchrun(story, "--out", run, *flags(steps=STEPS))
    while last_step(run) < 33:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (checkpoint.latest_step(run) or 0) >= 33
    wait_for_success(torchrun("--resume", "--out", run))
    assert_weights_equal(run, uninterrupted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_ends_all_ranks_and_keeps_the_last_checkpoint(
    story, tmp_path, rank, uninterrupted
):
    run, script = tmp_path / "run", tmp_path / "full.py"
    script.write_text(DISK_FULL_PROGRAM.format(rank=rank))
    process = torchrun(story, "--out", run, *flags(steps=STEPS), program=(script,))
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "No space left" in output
    assert "lost its peers" in output
    assert checkpoint.latest_step(run) == 10
    wait_for_success(torchrun("--resume", "--out", run))
    assert_weights_equal(run, uninterrupted)


def test_a_restarted_launch_does_not_take_over_the_run_that_refused_it(story, tmp_path):
    run = tmp_path / "run"
    nanogpt.train(story, run, **SETTINGS | {"steps": 20})
    before = (run / "model.safetensors").read_bytes()
    process = torchrun(story, "--out", run, *flags(steps=40), max_restarts=2)
    output = process.communicate(timeout=300)[0]
    assert output.count("already holds a run") == 3
    assert (run / "model.safetensors").read_bytes() == before


def ip(*args, check=True):
    done = subprocess.run(["ip", *args], check=check, capture_output=True)
    return done.returncode == 0


def can_create_namespaces():
    if not (shutil.which("ip") and shutil.which("unshare")) or os.geteuid() != 0:
        return False
    return ip("netns", "add", "nanogpt-try", check=False) and ip("netns", "del", "nanogpt-try")


@pytest.fixture
def hosts():
    """Return two network namespaces with a cable between them, like machines that share a disk."""
    if not can_create_namespaces():
        pytest.skip("network namespaces are not allowed here")
    names = [f"nanogpt-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        cable = "type veth peer name ng0 netns"
        ip("link", "add", "ng0", "netns", names[0], *cable.split(), names[1])
        for i, name in enumerate(names):
            for command in (
                f"addr add 10.77.0.{i + 1}/24 dev ng0",
                "link set ng0 up",
                "link set lo up",
            ):
                ip("netns", "exec", name, "ip", *command.split())
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def test_two_nodes_train_one_model(story, tmp_path, hosts):
    port = free_port()
    train = ["-m", "nanogpt", "train", story, "--out", tmp_path / "run", *flags(steps=40)]
    processes = []
    for i, name in enumerate(hosts):
        options = ["--nnodes", 2, "--node-rank", i, "--nproc-per-node", 1]
        options += ["--master-addr", "10.77.0.1", "--master-port", port]
        command = ["ip", "netns", "exec", name, sys.executable]
        command += ["-m", "torch.distributed.run", *options, *train]
        node = {"GLOO_SOCKET_IFNAME": "ng0", "XDG_CACHE_HOME": str(tmp_path / f"cache-{i}")}
        processes.append(
            subprocess.Popen(
                list(map(str, command)),
                env=ENVIRONMENT | node,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        wait_for_success(process)
    one = nanogpt.train(story, tmp_path / "one", **SETTINGS | {"steps": 40})
    two = nanogpt.load(tmp_path / "run")
    assert one.summary["val_loss"] == pytest.approx(two.summary["val_loss"], rel=1e-5)
