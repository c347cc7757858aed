"""What is chosen by measuring: kept, said, and overridden by what was asked for."""

import json
import sys

import pytest
import torch

from nanogpt import machine
from nanogpt.config import MachineConfig, ModelConfig
from nanogpt.files import cache_dir

CPU = torch.device("cpu")
SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, dropout=0.0)


def figures(monkeypatch, **seconds):
    """Let measurements be what the test says: FLOP/s and seconds by the beginning of their names."""

    def once(what, device, measure):
        return next(float(value) for name, value in seconds.items() if what.replace("torch.", "").replace(" ", "_").startswith(name))

    monkeypatch.setattr(machine, "once", once)


@pytest.mark.parametrize(("half", "chosen"), [(5e11, torch.bfloat16), (1.1e11, torch.float32), (1e10, torch.float32)])
def test_bfloat16_only_where_it_is_clearly_faster(monkeypatch, half, chosen):
    figures(monkeypatch, peak_bfloat16=half, peak_float32=1e11)
    assert machine.choose(MachineConfig(device="cpu", threads=1)).dtype == chosen
    assert machine.choose(MachineConfig(device="cpu", dtype="float32", threads=1)).dtype == torch.float32


@pytest.fixture
def _own_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_own_threads")
@pytest.mark.parametrize(("seconds", "chosen"), [({8: 1.0, 4: 0.9, 2: 0.95, 1: 2.0}, 8), ({8: 9.0, 4: 5.0, 2: 1.0, 1: 1.5}, 2)])
def test_fewer_threads_only_where_they_are_clearly_faster(monkeypatch, seconds, chosen):
    torch.set_num_threads(8)
    monkeypatch.setattr(machine, "_seconds", lambda work, device: seconds[torch.get_num_threads()])
    monkeypatch.setattr(machine, "known", lambda what, device: None)
    assert machine.choose(MachineConfig(device="cpu", dtype="float32")).threads == chosen
    torch.set_num_threads(8)
    assert machine.choose(MachineConfig(device="cpu", dtype="float32", threads=3)).threads == 3


@pytest.mark.parametrize(("plain", "fused", "chosen"), [(1, 2, "plain"), (1, 1.1, "fused"), (2, 1, "fused")])
def test_attention_is_the_faster(place, monkeypatch, plain, fused, chosen):
    monkeypatch.setattr(machine, "once", lambda what, device, measure: float(fused if "fused=True" in what else plain))
    found, reasons = machine.for_training(place, MachineConfig(dtype="float32", compile=False), SHAPE, 4, 1.0)
    assert found.attention == chosen
    assert reasons.keys() == {"attention"}
    assert "ms plain" in reasons["attention"]


def test_what_was_asked_for_is_not_measured(place, monkeypatch):
    monkeypatch.setattr(machine, "once", None)
    asked = MachineConfig(dtype="float32", attention="plain", compile=True)
    found, reasons = machine.for_training(place, asked, SHAPE, 4, 1.0)
    assert (found.attention, found.compile, reasons) == ("plain", True, {})


ASKED = MachineConfig(dtype="float32", attention="fused")


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    ("seconds", "gain", "before", "pays"),
    [(15, 1.3, False, False), (15, 2, True, True), (60, 1.3, False, False), (300, 1.3, False, True), (1e9, 1.3, False, True)],
)
def test_compiling_must_pay_within_the_run(place, monkeypatch, tmp_path, seconds, gain, before, pays):
    monkeypatch.setattr(machine, "has_compiler", lambda device: True)
    monkeypatch.setattr(machine, "compiled_before", lambda *_: tmp_path / "compiler" / "marker")
    machine.note_compiling(place, SHAPE, 4, 25.0, lambda: float(gain))
    if not before:
        (tmp_path / "compiler" / "marker").unlink()
    found, reasons = machine.for_training(place, ASKED, SHAPE, 4, seconds)
    assert found.compile == pays
    assert f"{gain:.1f} times as fast" in reasons["compile"]


@pytest.mark.usefixtures("linux")
def test_what_did_not_help_or_did_not_work_is_not_tried_again(place, monkeypatch):
    monkeypatch.setattr(machine, "has_compiler", lambda device: True)
    machine.note_failure(place, SHAPE)
    found, reasons = machine.for_training(place, ASKED, SHAPE, 4, 1e9)
    assert not found.compile
    assert "no faster" in reasons["compile"]
    assert machine.for_training(place, ASKED, SHAPE.model_copy(update={"n_embd": 32}), 4, 1e9)[0].compile


@pytest.mark.usefixtures("linux")
def test_a_step_that_only_fits_compiled_still_trains(place):
    def gain():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    machine.note_compiling(place, SHAPE, 4, 25.0, gain)
    assert machine.compiled_before(place, SHAPE, 4).exists()
    assert "compiled gain" not in (cache_dir() / "machine.json").read_text(encoding="utf-8")


@pytest.mark.usefixtures("linux")
def test_without_a_compiler_it_says_so(place, monkeypatch):
    monkeypatch.setattr(machine, "has_compiler", lambda device: False)
    found, reasons = machine.for_training(place, ASKED, SHAPE, 4, 1e9)
    assert not found.compile
    assert "no C++ compiler" in reasons["compile"]


def test_on_windows_it_says_so(place, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    found, reasons = machine.for_training(place, ASKED, SHAPE, 4, 1e9)
    assert not found.compile
    assert "Windows" in reasons["compile"]


def test_a_compiler_that_is_not_there_is_noticed():
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    forget = getattr(get_cpp_compiler, "cache_clear", lambda: None)
    forget()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert not machine.has_compiler(CPU)
    forget()


def test_figures_are_kept_and_a_damaged_file_is_measured_anew():
    assert machine.once("a test", CPU, lambda: 1.5) == 1.5
    assert machine.once("a test", CPU, lambda: 2.5) == 1.5
    (cache_dir() / "machine.json").write_text("{")
    assert machine.once("a test", CPU, lambda: 2.5) == 2.5
    assert 2.5 in json.loads((cache_dir() / "machine.json").read_text()).values()
    (cache_dir() / "machine.json").write_text("[]")
    assert machine.known("a test", CPU) is None


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.once("a test", CPU, lambda: 1.5) == 1.5


def test_one_run_does_not_make_the_next_deterministic():
    machine.choose(MachineConfig(device="cpu", dtype="float32", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    machine.choose(MachineConfig(device="cpu", dtype="float32"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_choice_is_written_down_and_made_again(place):
    settings = machine.Machine(CPU, torch.bfloat16, 2, "plain", True, True, "fsdp").settings()
    assert settings == MachineConfig(device="cpu", dtype="bfloat16", threads=2, attention="plain", compile=True, deterministic=True, parallel="fsdp")


def test_memory_is_told():
    assert machine.memory_of(CPU) > 1e8


def test_what_a_container_uses_is_not_free(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.memory, "CGROUP", tmp_path)
    for name, content in (("max", "5000000"), ("current", "4000000"), ("stat", "anon 3000000\ninactive_file 300000\nactive_file 200000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert machine.free_memory(CPU) == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory(CPU) > 1e8
