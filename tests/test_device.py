"""Device selection and autotuning: benchmarked, cached, explained, and overridden by settings."""

import json
import sys

import pytest
import torch

from nanogpt.config import ModelConfig, TrainDeviceConfig
from nanogpt.device import autotune, compile, measurements, memory
from nanogpt.device.device import Machine, select_device
from nanogpt.files import cache_dir

CPU = torch.device("cpu")
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, context_length=16, dropout=0.0)
OPEN_COMPILE = TrainDeviceConfig(dtype="float32", attention="sdpa")


@pytest.fixture
def machine():
    return select_device(TrainDeviceConfig(device="cpu", dtype="float32"))


def fake_measurements(monkeypatch, **values):
    """Replace measurements by values, found by the start of a measurement's name."""

    def cached_measurement(name, device, measure):
        key = name.replace("torch.", "").replace(" ", "_")
        return next(float(value) for start, value in values.items() if key.startswith(start))

    monkeypatch.setattr(measurements, "cached_measurement", cached_measurement)


@pytest.mark.parametrize(
    ("bfloat16", "expected"),
    [(5e11, torch.bfloat16), (1.1e11, torch.float32), (1e10, torch.float32)],
)
def test_select_device_takes_bfloat16_only_if_clearly_faster(monkeypatch, bfloat16, expected):
    fake_measurements(monkeypatch, peak_bfloat16=bfloat16, peak_float32=1e11)
    assert select_device(TrainDeviceConfig(device="cpu", threads=1)).dtype == expected
    config = TrainDeviceConfig(device="cpu", dtype="float32", threads=1)
    assert select_device(config).dtype == torch.float32


@pytest.fixture
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_restore_threads")
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({8: 1.0, 4: 0.9, 2: 0.95, 1: 2.0}, 8), ({8: 9.0, 4: 5.0, 2: 1.0, 1: 1.5}, 2)],
)
def test_select_device_takes_fewer_threads_only_if_clearly_faster(monkeypatch, seconds, expected):
    torch.set_num_threads(8)
    monkeypatch.setattr(
        measurements, "benchmark_seconds", lambda function, device: seconds[torch.get_num_threads()]
    )
    monkeypatch.setattr(measurements, "get_cached", lambda name, device: None)
    config = TrainDeviceConfig(device="cpu", dtype="float32")
    assert select_device(config).threads == expected
    torch.set_num_threads(8)
    assert select_device(config.model_copy(update={"threads": 3})).threads == 3


@pytest.mark.parametrize(
    ("eager", "sdpa", "expected"), [(1, 2, "eager"), (1, 1.1, "sdpa"), (2, 1, "sdpa")]
)
def test_autotune_takes_the_faster_attention(machine, monkeypatch, eager, sdpa, expected):
    fake_measurements(monkeypatch, attention_eager=eager, attention_sdpa=sdpa)
    config = TrainDeviceConfig(dtype="float32", compile=False)
    tuned, reasons = autotune.autotune_for_training(machine, config, MODEL, 4, 1.0)
    assert tuned.attention == expected
    assert reasons.keys() == {"attention"}
    assert "ms eager" in reasons["attention"]


def test_autotune_does_not_benchmark_explicit_settings(monkeypatch):
    config = TrainDeviceConfig(device="cpu", dtype="float32", attention="eager", compile=True)
    machine = select_device(config)
    monkeypatch.setattr(measurements, "cached_measurement", None)
    tuned, reasons = autotune.autotune_for_training(machine, config, MODEL, 4, 1.0)
    assert (tuned.attention, tuned.compile, reasons) == ("eager", True, {})


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(
    ("seconds", "speedup", "is_warm", "expected"),
    [
        (15, 1.3, False, False),
        (15, 2, True, True),
        (60, 1.3, False, False),
        (300, 1.3, False, True),
        (1e9, 1.3, False, True),
    ],
)
def test_autotune_compiles_only_if_it_amortizes_within_the_run(
    machine, monkeypatch, tmp_path, seconds, speedup, is_warm, expected
):
    marker = tmp_path / "compiler" / "marker"
    monkeypatch.setattr(compile, "has_compiler", lambda device: True)
    monkeypatch.setattr(compile, "compile_marker_path", lambda *_: marker)
    compile.record_compile(machine, MODEL, 4, 25.0, lambda: float(speedup))
    if not is_warm:
        marker.unlink()
    tuned, reasons = autotune.autotune_for_training(machine, OPEN_COMPILE, MODEL, 4, seconds)
    assert tuned.compile == expected
    assert f"{speedup:.1f} times as fast" in reasons["compile"]


@pytest.mark.usefixtures("linux")
def test_autotune_does_not_compile_again_after_a_failure(machine, monkeypatch):
    monkeypatch.setattr(compile, "has_compiler", lambda device: True)
    compile.record_compile_failure(machine, MODEL)
    tuned, reasons = autotune.autotune_for_training(machine, OPEN_COMPILE, MODEL, 4, 1e9)
    assert not tuned.compile
    assert "no faster" in reasons["compile"]
    wider = MODEL.model_copy(update={"n_embd": 32})
    assert autotune.autotune_for_training(machine, OPEN_COMPILE, wider, 4, 1e9)[0].compile


@pytest.mark.usefixtures("linux")
def test_record_compile_ignores_an_eager_step_that_runs_out_of_memory(machine):
    def speedup():
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
        )

    compile.record_compile(machine, MODEL, 4, 25.0, speedup)
    assert compile.compile_marker_path(machine, MODEL, 4).exists()
    cache = (cache_dir() / "measurements.json").read_text(encoding="utf-8")
    assert "compile speedup" not in cache


@pytest.mark.usefixtures("linux")
def test_autotune_reports_a_missing_compiler(machine, monkeypatch):
    monkeypatch.setattr(compile, "has_compiler", lambda device: False)
    tuned, reasons = autotune.autotune_for_training(machine, OPEN_COMPILE, MODEL, 4, 1e9)
    assert not tuned.compile
    assert "no C++ compiler" in reasons["compile"]


def test_autotune_does_not_compile_on_windows(machine, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    tuned, reasons = autotune.autotune_for_training(machine, OPEN_COMPILE, MODEL, 4, 1e9)
    assert not tuned.compile
    assert "Windows" in reasons["compile"]


def test_has_compiler_is_false_for_a_missing_compiler():
    # PyTorch has no public way to choose the compiler or to forget the one it found.
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    clear_cache = getattr(get_cpp_compiler, "cache_clear", lambda: None)
    clear_cache()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert not compile.has_compiler(CPU)
    clear_cache()


def test_cached_measurement_is_kept_and_a_corrupt_file_is_replaced():
    path = cache_dir() / "measurements.json"
    assert measurements.cached_measurement("a test", CPU, lambda: 1.5) == 1.5
    assert measurements.cached_measurement("a test", CPU, lambda: 2.5) == 1.5
    path.write_text("{")
    assert measurements.cached_measurement("a test", CPU, lambda: 2.5) == 2.5
    assert 2.5 in json.loads(path.read_text()).values()
    path.write_text("[]")
    assert measurements.get_cached("a test", CPU) is None


def test_cached_measurement_works_without_a_writable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measurements.cached_measurement("a test", CPU, lambda: 1.5) == 1.5


def test_select_device_resets_determinism():
    select_device(TrainDeviceConfig(device="cpu", dtype="float32", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    select_device(TrainDeviceConfig(device="cpu", dtype="float32"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_to_config_contains_every_choice():
    machine = Machine(CPU, torch.bfloat16, 2, "eager", True, True, "fsdp")
    assert machine.to_config() == TrainDeviceConfig(
        device="cpu",
        dtype="bfloat16",
        threads=2,
        attention="eager",
        compile=True,
        deterministic=True,
        parallel="fsdp",
    )


def test_total_memory_is_known():
    assert memory.total_memory(CPU) > 1e8


def test_available_memory_respects_the_limit_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP_FOLDER", tmp_path)
    contents = {
        "max": "5000000",
        "current": "4000000",
        "stat": "anon 3000000\ninactive_file 300000\nactive_file 200000\n",
    }
    for name, content in contents.items():
        (tmp_path / f"memory.{name}").write_text(content)
    assert memory.available_memory(CPU) == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory(CPU) > 1e8
