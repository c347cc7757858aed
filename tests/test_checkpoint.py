"""Model files and saved states: complete or absent, verified, and with useful errors."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import qwen3_like
from safetensors.torch import save_file

import nanogpt
from nanogpt import checkpoint, files
from nanogpt.config import TrainingConfig
from nanogpt.errors import UserError
from nanogpt.optim import Optimizer
from nanogpt.tokenizer.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer("char", ["hello wörld"])


@pytest.fixture
def saved(make_model, tmp_path):
    model = make_model(vocab_size=TOKENIZER.vocab_size)
    checkpoint.save_model(
        tmp_path / "model.safetensors", model, TOKENIZER, {"step": 3, "unseen_token_ranges": []}
    )
    return model, tmp_path / "model.safetensors"


def test_model_file_holds_weights_settings_tokenizer_and_summary(saved, tmp_path_factory):
    model, path = saved
    elsewhere = shutil.copy(path, tmp_path_factory.mktemp("elsewhere") / "any-name.safetensors")
    loaded = checkpoint.load(elsewhere)
    assert loaded.model.config == model.config
    assert loaded.summary["step"] == 3
    assert loaded.tokenizer.encode("hello 日") == TOKENIZER.encode("hello 日")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert len("".join(nanogpt.load(elsewhere).stream("he", seed=1, max_tokens=5))) <= 5


def test_save_model_is_deterministic(saved, tmp_path):
    model, path = saved
    copy = tmp_path / "copy.safetensors"
    checkpoint.save_model(copy, model, TOKENIZER, {"step": 3, "unseen_token_ranges": []})
    assert copy.read_bytes() == path.read_bytes()


QWEN3_SHAPES = [
    {},
    {"n_head": 4, "n_kv_head": 2, "head_dim": 6, "sliding_window": 3},
    {"tie_word_embeddings": True},
]


@pytest.mark.parametrize("shape", QWEN3_SHAPES)
def test_qwen3_file_holds_normalized_embeddings_and_the_same_function(make_model, tmp_path, shape):
    model = make_model(TOKENIZER.vocab_size, arch="qwen3", **shape)
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model, TOKENIZER, {"step": 1})
    loaded = checkpoint.load(path).model
    assert loaded.config == model.config
    assert (model.normalize_embedding, loaded.normalize_embedding) == (True, False)
    mean_squares = loaded.wte.weight.square().mean(dim=1)
    torch.testing.assert_close(mean_squares, torch.ones(TOKENIZER.vocab_size))
    idx = torch.arange(8)[None] % TOKENIZER.vocab_size
    torch.testing.assert_close(loaded(idx), model(idx), atol=1e-6, rtol=1e-6)
    peer = qwen3_like(loaded)
    assert torch.equal(peer.model.embed_tokens.weight, loaded.wte.weight)
    torch.testing.assert_close(peer(idx).logits, loaded(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_saving_a_loaded_model_changes_nothing(make_model, tmp_path, arch):
    model = make_model(TOKENIZER.vocab_size, arch=arch)
    path, copy = tmp_path / "model.safetensors", tmp_path / "copy.safetensors"
    checkpoint.save_model(path, model, TOKENIZER, {"step": 1, "unseen_token_ranges": []})
    loaded = checkpoint.load(path)
    checkpoint.save_model(copy, loaded.model, loaded.tokenizer, loaded.summary)
    assert copy.read_bytes() == path.read_bytes()


def test_load_best_weights_equals_load(make_model, tmp_path):
    model = make_model(TOKENIZER.vocab_size, arch="qwen3")
    checkpoint.save_model(tmp_path / "model.safetensors", model, TOKENIZER, {"step": 7})
    other = make_model(TOKENIZER.vocab_size, arch="qwen3", seed=5)
    assert checkpoint.load_best_weights(tmp_path, other)["step"] == 7
    idx = torch.arange(8)[None] % TOKENIZER.vocab_size
    assert torch.equal(other(idx), checkpoint.load(tmp_path).model(idx))


def test_load_weights_starts_training_from_the_function_of_the_file(make_model, tmp_path):
    model = make_model(TOKENIZER.vocab_size, arch="qwen3")
    checkpoint.save_model(tmp_path / "model.safetensors", model, TOKENIZER, {"step": 7})
    other = make_model(TOKENIZER.vocab_size, arch="qwen3", seed=5)
    checkpoint.load_weights(other, checkpoint.load(tmp_path).model)
    assert other.normalize_embedding
    idx = torch.arange(8)[None] % TOKENIZER.vocab_size
    torch.testing.assert_close(other(idx), model(idx), atol=1e-5, rtol=1e-5)


def test_state_holds_raw_embeddings(make_model, tmp_path):
    model = make_model(arch="qwen3")
    checkpoint.save_state(tmp_path, 1, model, one_step(model), {})
    other = make_model(arch="qwen3", seed=9)
    checkpoint.load_state(tmp_path, other, make_optimizer(other))
    assert torch.equal(other.wte.weight, model.wte.weight)
    assert other.normalize_embedding


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
def test_load_refuses_a_truncated_file(saved, keep):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_load_refuses_a_changed_weight(saved):
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
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: torch.save({"bomb": Bomb()}, path),
    ],
)
def test_load_refuses_pickles_without_reading_them(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(UserError, match="pickle"):
        checkpoint.load(tmp_path / name)
    assert not Path("exploded").exists()


def test_load_refuses_foreign_files_and_other_format_versions(saved, tmp_path, monkeypatch):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="nanogpt did not write"):
        checkpoint.load(tmp_path / "other.safetensors")
    model, path = saved
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    checkpoint.save_model(path, model, TOKENIZER, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer"):
        checkpoint.load(path)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
    checkpoint.save_model(path, model, TOKENIZER, {})
    monkeypatch.undo()
    for read in (checkpoint.load, checkpoint.read_metadata):
        with pytest.raises(UserError, match=r"an older nanogpt \(format 1, not 2\)"):
            read(path)


def test_load_names_the_files_that_a_folder_holds(saved, tmp_path):
    with pytest.raises(UserError, match="no model at"):
        checkpoint.load(tmp_path / "nothing")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds no model.safetensors .*notes.txt"):
        checkpoint.load(folder)


def make_optimizer(model):
    return Optimizer(model, TrainingConfig(optimizer="muon"), model.muon_param_splits())


def one_step(model):
    optimizer = make_optimizer(model)
    model.loss_sum(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    optimizer.step(1.0)
    return optimizer


def test_load_state_is_exact_and_only_the_latest_state_stays(make_model, tmp_path):
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
    before, after = optimizer.state_dict(), restored.state_dict()
    assert (
        before.keys()
        == after.keys()
        >= {"blocks.0.mlp.up_proj.weight.momentum", "wte.weight.exp_avg"}
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_save_state_killed_anywhere_leaves_a_loadable_state(make_model, tmp_path, monkeypatch):
    """Fail at each system call of a save in turn, as if the process had been killed there."""
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
            patch.setattr(files, "remove", lambda path: None)  # A killed process cleans nothing up.
            try:
                checkpoint.save_state(tmp_path, 2 + fatal, model, optimizer, {"step": 2 + fatal})
            except Killed:
                died += 1
            else:
                break
        assert checkpoint.load_state(tmp_path, make_model(), make_optimizer(model))[
            "step"
        ] == checkpoint.latest_step(tmp_path)
    assert died > 10
    assert checkpoint.latest_step(tmp_path) == 2 + fatal


def test_save_model_on_a_full_disk_keeps_the_old_file(saved, make_model, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: .* MB are free"):
        checkpoint.save_model(
            path, make_model(vocab_size=TOKENIZER.vocab_size, seed=4), TOKENIZER, {}
        )
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_require_space_checks_the_free_space(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="are needed"):
        files.require_space(tmp_path / "not" / "yet", 10**18)


def test_model_file_header_is_json(saved):
    _, path = saved
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"]["nanogpt"])
    assert set(metadata) == {"format_version", "model", "tokenizer", "summary", "sha256"}
    assert json.loads(metadata["tokenizer"])["model"]["type"] == "BPE"
