"""Memory: steps are split to fit, before training and after out-of-memory errors."""

import signal

import pytest
from helpers import TINY, assert_runs_equal, metrics_without_timings, stop_at

import nanogpt
from nanogpt import config
from nanogpt.device import memory
from nanogpt.errors import Notice, UserError
from nanogpt.model import GPT
from nanogpt.plan import model_size

RUN = TINY | {"dropout": 0.1, "steps": 100, "eval_every": 20, "device": "cpu"}


def test_out_of_memory_error_names_settings_to_lower(story, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9999 bytes"
        )

    monkeypatch.setattr(GPT, "loss_sum", fail)
    message = (
        r"not enough memory for a micro-batch of shape \(1, 16\): .*9999 bytes\n"
        r"Lower context_length"
    )
    with (
        pytest.raises(UserError, match=message),
        pytest.warns(Notice, match="as many tokens as before"),
    ):
        nanogpt.train(story, tmp_path / "run", **RUN)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("micro_batch_size", [8, 5])
def test_micro_batches_equal_the_full_batch(story, tmp_path, arch, micro_batch_size):
    settings = RUN | {"arch": arch, "batch_size": 32, "steps": 5, "eval_every": 5, "dropout": 0.3}
    rows = []
    for name, more in (("full", {}), ("split", {"micro_batch_size": micro_batch_size})):
        nanogpt.train(story, tmp_path / name, **settings | more)
        rows.append(
            [
                (row["train_loss"], row.get("grad_norm", 0.0), row.get("val_loss", 0.0))
                for row in metrics_without_timings(tmp_path / name)
            ]
        )
    assert rows[0] != rows[1]
    for full, split in zip(*rows, strict=True):
        assert split == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize(
    ("max_sequences", "changes"),
    [(2, {"micro_batch_size": 2}), (0, {"micro_batch_size": 1, "activation_checkpointing": True})],
)
def test_memory_recovery_reduces_memory_use_and_resume_repeats_it(
    story, tmp_path, monkeypatch, max_sequences, changes
):
    loss_sum, failed_sizes = GPT.loss_sum, []

    def limited_loss_sum(self, idx, targets, dropout_seeds=None):
        is_training = dropout_seeds is not None
        if is_training and len(idx) > max_sequences and not self.activation_checkpointing:
            failed_sizes.append(len(idx))
            raise RuntimeError("CUDA out of memory. Tried to allocate 9999 bytes")
        return loss_sum(self, idx, targets, dropout_seeds)

    monkeypatch.setattr(GPT, "loss_sum", limited_loss_sum)
    settings = RUN | {"steps": 20, "eval_every": 10}
    with pytest.warns(Notice, match="as many tokens as before"), pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(13, signal.SIGINT), **settings)
    assert failed_sizes == ([4] if max_sequences else [4, 2, 1])
    assert changes.items() <= config.read_toml(tmp_path / "run").items()
    monkeypatch.undo()
    nanogpt.train(out=tmp_path / "run", resume=True)
    nanogpt.train(story, tmp_path / "full_run", **settings | changes)
    assert_runs_equal(tmp_path / "run", tmp_path / "full_run")


def test_fit_to_memory_chooses_micro_batch_size_and_resume_repeats_it(story, tmp_path, monkeypatch):
    settings = RUN | {
        "n_embd": 64,
        "context_length": 64,
        "batch_size": 32,
        "steps": 6,
        "eval_every": 3,
    }
    needs_all, needs_8 = (
        step_memory(story, settings | {"micro_batch_size": size}) for size in (32, 8)
    )
    monkeypatch.setattr(memory, "available_memory", lambda device: 1.21 * needs_8)
    events = []
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(
            story,
            tmp_path / "run",
            on_event=lambda event: events.append(event) or stop_at(4, signal.SIGINT)(event),
            **settings,
        )
    assert events[0].config.training.micro_batch_size == 8
    assert events[0].required_bytes == needs_8 < events[0].free_bytes < needs_all
    choices = [choice for choice in events[0].choices if choice.name == "micro_batch_size"]
    assert [choice.value for choice in choices] == [8]
    monkeypatch.undo()
    nanogpt.train(out=tmp_path / "run", resume=True)
    nanogpt.train(story, tmp_path / "full_run", **settings | {"micro_batch_size": 8})
    assert_runs_equal(tmp_path / "run", tmp_path / "full_run")


def step_memory(story, settings):
    """Estimate the bytes of a training step on the story."""
    resolved = config.resolve(settings)
    vocab_size = len(set(story.read_text())) + 257
    mode = model_size.StepMode(mixed_precision=False, sdpa=True)
    parts = model_size.estimate_memory(resolved.model, resolved.training, vocab_size, mode)
    return sum(parts.values())


def test_fit_to_memory_fails_before_anything_is_written(story, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 10_000.0)
    message = (
        r"micro-batches of 1 sequence of 16 tokens: about .* GB \(free: 1e-05 GB\)\.\n"
        r"Lower context_length"
    )
    with pytest.raises(UserError, match=message):
        nanogpt.train(story, tmp_path / "run", **RUN)
    with pytest.raises(UserError, match=r"micro-batches of 4 sequences .*\nLower micro_batch_size"):
        nanogpt.train(story, tmp_path / "run", micro_batch_size=4, **RUN)
    assert not (tmp_path / "run").exists()
