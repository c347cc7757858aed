"""Files are whole or absent, say what is wrong with them, and hold all that they should."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nanogpt
from nanogpt import checkpoint, files
from nanogpt.config import TrainingConfig
from nanogpt.errors import UserError
from nanogpt.optim import Optimizer
from nanogpt.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer("char", ["hello wörld"])


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model(vocab_size=TOKENIZER.vocab_size)
    checkpoint.save_model(tmp_path / "model.safetensors", model, TOKENIZER, {"step": 3, "unused": []})
    return model, tmp_path / "model.safetensors"


def test_one_file_holds_weights_settings_tokenizer_and_summary(saved, tmp_path_factory):
    model, path = saved
    elsewhere = shutil.copy(path, tmp_path_factory.mktemp("elsewhere") / "any-name.safetensors")
    parts = checkpoint.load(elsewhere)
    assert parts.model.config == model.config
    assert parts.summary["step"] == 3
    assert parts.tokenizer.encode("hello 日") == TOKENIZER.encode("hello 日")
    for name, tensor in model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], tensor)
    assert len("".join(nanogpt.load(elsewhere).stream("he", seed=1, max_tokens=5))) <= 5


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    model, path = saved
    checkpoint.save_model(tmp_path / "again.safetensors", model, TOKENIZER, {"step": 3, "unused": []})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_a_file_cut_short_is_refused(saved, keep):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_changed_weight_is_found_by_the_checksum(saved):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256"):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save({"bomb": Bomb()}, path)])
def test_pickles_are_refused_unread(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(UserError, match="pickle"):
        checkpoint.load(tmp_path / name)
    assert not Path("exploded").exists()


def test_files_of_others_and_of_the_future_are_refused(saved, tmp_path, monkeypatch):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="none that nanogpt made"):
        checkpoint.load(tmp_path / "other.safetensors")
    model, path = saved
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    checkpoint.save_model(path, model, TOKENIZER, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer"):
        checkpoint.load(path)


def test_what_is_not_there_is_said_with_what_is(saved, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        checkpoint.load(tmp_path / "nothing")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no model.safetensors .*notes.txt"):
        checkpoint.load(folder)


def make_optimizer(model):
    return Optimizer(model, TrainingConfig(optimizer="muon"), model.matrices())


def one_step(model):
    optimizer = make_optimizer(model)
    model.nats(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizer.step(1.0)
    return optimizer


def test_state_comes_back_exactly_and_only_the_latest_stays(make_model, tmp_path):
    model = make_model()
    optimizer = one_step(model)
    for step in (10, 20):
        checkpoint.save_state(tmp_path, step, model, optimizer, {"step": step})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["20", "latest"]
    other = make_model(seed=9)
    restored = make_optimizer(other)
    assert checkpoint.load_state(tmp_path, other, restored) == {"step": 20}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = optimizer.state_tensors(), restored.state_tensors()
    assert before.keys() == after.keys() >= {"blocks.0.mlp.fc.weight.momentum", "wte.weight.exp_avg"}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_save_that_dies_anywhere_leaves_the_last_one_loadable(make_model, tmp_path, monkeypatch):
    """Every call into the system that a save makes is made to fail in turn, as if the process had been killed there."""
    model = make_model()
    optimizer = one_step(model)
    checkpoint.save_state(tmp_path, 1, model, optimizer, {"step": 1})

    class Killed(BaseException):
        pass

    real = {name: getattr(os, name) for name in ("replace", "fsync", "open")}
    died = 0
    for fatal in range(100):
        calls = iter(range(1000))

        def dying(name, calls=calls, fatal=fatal):
            def call(*args, **kwargs):
                if next(calls) == fatal:
                    raise Killed
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(files.os, name, dying(name))
            patch.setattr(files, "discard", lambda path: None)  # the dead do not tidy up
            try:
                checkpoint.save_state(tmp_path, 2 + fatal, model, optimizer, {"step": 2 + fatal})
            except Killed:
                died += 1
            else:
                break
        assert checkpoint.load_state(tmp_path, make_model(), make_optimizer(model))["step"] == checkpoint.latest_step(tmp_path)
    assert died > 10
    assert checkpoint.latest_step(tmp_path) == 2 + fatal


def test_a_full_disk_leaves_the_old_file_and_says_how_much_is_free(saved, make_model, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: .* MB are free"):
        checkpoint.save_model(path, make_model(vocab_size=TOKENIZER.vocab_size, seed=4), TOKENIZER, {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_room_is_asked_for_before_anything_is_written(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="are needed"):
        files.require_space(tmp_path / "not" / "yet", 10**18)


def test_header_is_one_json_object_that_other_programs_can_read(saved):
    _, path = saved
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = json.loads(header["__metadata__"]["nanogpt"])
    assert set(about) == {"format_version", "model", "tokenizer", "summary", "sha256"}
    assert json.loads(about["tokenizer"])["model"]["type"] == "BPE"
