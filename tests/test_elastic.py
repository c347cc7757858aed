"""What happens to a run of many processes on machines that fail: torchrun begins again, and the end is the same. Run with `pytest -m slow`."""

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
from conftest import TINY
from safetensors.torch import load_file
from test_distributed import free_port, weights

import nanogpt
from nanogpt import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="torchrun and signals are those of Unix")]
SETTINGS = TINY | {"dropout": 0.1, "eval_every": 10, "device": "cpu", "threads": 1, "seed": 3}
KILLS, STEPS = 20, 600
DISK_FULL = """
import errno, sys
from nanogpt import checkpoint, cli
write = checkpoint.save_state
def full(run, step, *rest):
    if step == 20 and rest[-1].rank == {rank}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(run, step, *rest)
checkpoint.save_state = full
cli.main()
"""


def flags(**settings):
    return [
        f"--{'no-' if value is False else ''}{name.replace('_', '-')}" + ("" if value in (True, False) and isinstance(value, bool) else f"={value}")
        for name, value in (SETTINGS | settings).items()
    ]


def torchrun(*words, restarts=0, program=("-m", "nanogpt"), port=None):
    """torchrun with two processes on this machine, as a person begins it."""
    meeting = ["--standalone"] if port is None else ["--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", "2", "--max-restarts", str(restarts), *program, "train"]
    own = os.environ | {"PYTHONPATH": str(Path(nanogpt.__file__).parent.parent)}
    return subprocess.Popen([*command, *map(str, words)], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process):
    said = process.communicate(timeout=900)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def last_step(run):
    """Of metrics.jsonl, while it is written."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().rsplit("\n", 2)[-2])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def workers(process):
    """The processes that torchrun began."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def same(run, other):
    for one, two in ((weights(run), weights(other)), (load_file(run / "model.safetensors"), load_file(other / "model.safetensors"))):
        assert all(one[name].equal(two[name]) for name in two)


@pytest.fixture
def parallel():
    """How the processes share the work; a test that wants both ways asks for them."""
    return "ddp"


@pytest.fixture
def undisturbed(story, tmp_path, parallel):
    finished(torchrun(story, "--out", tmp_path / "undisturbed", *flags(steps=STEPS, parallel=parallel)))
    return tmp_path / "undisturbed"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process")
def test_twenty_killed_workers_change_nothing(story, tmp_path, undisturbed):
    chance, run = random.Random(1), tmp_path / "run"
    process = torchrun(story, "--out", run, *flags(steps=STEPS), restarts=KILLS)
    kills, then = 0, 10
    while process.poll() is None and kills < KILLS:
        if last_step(run) >= then and len(pids := workers(process)) == 2:
            os.kill(chance.choice(pids), signal.SIGKILL)
            kills, then = kills + 1, last_step(run) + chance.randrange(1, 40)
            time.sleep(1)
        time.sleep(0.002)
    finished(process)
    assert kills == KILLS
    same(run, undisturbed)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_worker_killed_while_it_saves_changes_nothing(story, tmp_path, undisturbed, parallel):
    run = tmp_path / "run"
    process = torchrun(story, "--out", run, *flags(steps=STEPS, parallel=parallel), restarts=3)
    kills = 0
    while process.poll() is None and kills < 3:
        if list((run / "state").glob(".*.unfinished")) and len(pids := workers(process)) == 2:
            os.kill(pids[0], signal.SIGKILL)
            kills += 1
            time.sleep(1)
    finished(process)
    assert kills == 3
    same(run, undisturbed)


def test_sigterm_to_torchrun_saves_and_the_same_command_goes_on(story, tmp_path, undisturbed):
    run = tmp_path / "run"
    process = torchrun(story, "--out", run, *flags(steps=STEPS))
    while last_step(run) < 33:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert (checkpoint.latest_step(run) or 0) >= 33
    finished(torchrun("--resume", "--out", run))
    same(run, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_ends_all_and_the_last_save_stays(story, tmp_path, rank, undisturbed):
    run, script = tmp_path / "run", tmp_path / "full.py"
    script.write_text(DISK_FULL.format(rank=rank))
    process = torchrun(story, "--out", run, *flags(steps=STEPS), program=(script,))
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "No space left" in said
    assert "has lost the others" in said
    assert checkpoint.latest_step(run) == 10
    finished(torchrun("--resume", "--out", run))
    same(run, undisturbed)


def test_a_launch_that_was_refused_does_not_take_over_the_folder_when_torchrun_tries_again(story, tmp_path):
    nanogpt.train(story, tmp_path / "run", **SETTINGS | {"steps": 20})
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    said = torchrun(story, "--out", tmp_path / "run", *flags(steps=40), restarts=2).communicate(timeout=300)[0]
    assert said.count("already holds a run") == 3
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def _namespaces_allowed():
    tools = shutil.which("ip") and shutil.which("unshare")
    return bool(tools) and os.geteuid() == 0 and subprocess.run(["ip", "netns", "add", "nanogpt-try"], capture_output=True).returncode == 0


@pytest.fixture
def hosts():
    """Two network namespaces with an address each and a cable between them: two machines that share a disk."""
    if not _namespaces_allowed():
        pytest.skip("network namespaces are not allowed here")
    subprocess.run(["ip", "netns", "del", "nanogpt-try"], check=True)
    names = [f"nanogpt-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        cable = ["ip", "link", "add", "ng0", "netns", names[0], "type", "veth", "peer", "name", "ng0", "netns", names[1]]
        subprocess.run(cable, check=True)
        for i, name in enumerate(names):
            for words in (f"addr add 10.77.0.{i + 1}/24 dev ng0", "link set ng0 up", "link set lo up"):
                subprocess.run(["ip", "netns", "exec", name, "ip", *words.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_two_machines_with_an_address_each_train_one_model(story, tmp_path, hosts):
    port = free_port()
    own = os.environ | {"PYTHONPATH": str(Path(nanogpt.__file__).parent.parent), "GLOO_SOCKET_IFNAME": "ng0"}
    processes = []
    for i, name in enumerate(hosts):
        meeting = ["--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", str(port)]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "nanogpt", "train"]
        words = [*command, str(story), "--out", str(tmp_path / "run"), *flags(steps=40)]
        processes.append(
            subprocess.Popen(words, env=own | {"XDG_CACHE_HOME": str(tmp_path / f"cache-{i}")}, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        finished(process)
    one = nanogpt.train(story, tmp_path / "one", **SETTINGS | {"steps": 40})
    assert one.summary["val_loss"] == pytest.approx(nanogpt.load(tmp_path / "run").summary["val_loss"], rel=1e-5)
