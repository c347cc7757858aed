"""Tests of runs from an initial checkpoint: shape, tokenizer, rates, longer contexts, resuming."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, assert_runs_equal, metrics_without_timings, run, stop_at

import nanogpt
from nanogpt import checkpoint, config
from nanogpt.errors import Notice, UserError
from nanogpt.training.events import EvalEnd, InitialEval, TrainEnd
from nanogpt.training.finetune import FINETUNE_LR_RATIO

RUN = TINY | {"arch": "qwen3", "dropout": 0.1, "steps": 60, "eval_every": 20, "device": "cpu"}
MORE = {
    "steps": 20,
    "eval_every": 10,
    "device": "cpu",
    "dtype": "float32",
    "attention": "sdpa",
    "compile": False,
    "batch_size": 4,
}


@pytest.fixture
def init_run(story, tmp_path):
    """Train a short run on a story, and return its folder."""
    nanogpt.train(story, tmp_path / "init", **RUN)
    return tmp_path / "init"


@pytest.fixture
def sequel(story, tmp_path):
    """Write another text, with one new character four times and one once."""
    path = tmp_path / "sequel.txt"
    path.write_text(
        story.read_text().replace("cat", "cow").replace("barn", "wood")
        + "ÄÄÄÄ€ the end.\n"
        + story.read_text()[:1000]
    )
    return path


def test_init_from_starts_at_the_loss_of_the_model_and_reports_it(init_run, story, tmp_path):
    events = []
    nanogpt.train(
        story,
        tmp_path / "run",
        init_from=init_run,
        on_event=events.append,
        learning_rate=1e-3,
        warmup_steps=0,
        **MORE,
    )
    parts = checkpoint.load(init_run)
    initial, finished = (
        next(event for event in events if isinstance(event, kind))
        for kind in (InitialEval, TrainEnd)
    )
    assert initial.val_loss == pytest.approx(parts.summary["val_loss"])
    assert finished.initial_val_loss == initial.val_loss > finished.loss.loss
    assert metrics_without_timings(tmp_path / "run")[0] == {
        "step": 0,
        **{name: getattr(initial, name) for name in ("val_loss", "bits_per_byte", "val_tokens")},
    }
    assert [event.step for event in events if isinstance(event, EvalEnd)] == [10, 20]
    resolved = config.resolve(config.read_toml(tmp_path / "run"))
    assert resolved.model == parts.model.config


@pytest.mark.parametrize("kind", ["byte", "word", "bpe"])
def test_tokenizer_of_the_model_is_kept_and_saved_in_the_settings(story, sequel, tmp_path, kind):
    nanogpt.train(story, tmp_path / "init", **RUN | {"tokenizer": kind, "steps": 2})
    more = nanogpt.train(
        sequel, tmp_path / "run", init_from=tmp_path / "init", **MORE | {"steps": 2}
    )
    assert config.resolve(config.read_toml(tmp_path / "run")).data.tokenizer == kind
    assert more.tokenizer.to_json() == nanogpt.load(tmp_path / "init").tokenizer.to_json()
    assert nanogpt.train(out=tmp_path / "run", resume=True, steps=4).summary["step"] == 4


@pytest.mark.parametrize(
    ("settings", "rate"), [({}, FINETUNE_LR_RATIO * 3e-4), ({"learning_rate": 1e-3}, 1e-3)]
)
def test_learning_rate_is_lower_unless_given(init_run, story, tmp_path, settings, rate):
    events = []
    nanogpt.train(
        story, init_from=init_run, on_event=events.append, **MORE | {"steps": 1} | settings
    )
    assert events[0].config.training.learning_rate == pytest.approx(rate)
    assert [choice.value for choice in events[0].choices if choice.name == "learning_rate"] == (
        [] if settings else [pytest.approx(rate)]
    )


def test_unknown_characters_become_bytes_and_resume_is_exact(init_run, sequel, tmp_path):
    with pytest.warns(
        Notice,
        match=r"no token for 2 of the \d+ distinct characters of the text "
        r"\(5 of [\d,]+ characters\), which are encoded as bytes: 'Ä' 4 times, '€' 1 ",
    ):
        nanogpt.train(sequel, tmp_path / "full", init_from=init_run, **MORE)
    with pytest.warns(Notice, match="encoded as bytes"), pytest.raises(KeyboardInterrupt):
        nanogpt.train(
            sequel,
            tmp_path / "run",
            init_from=init_run,
            on_event=stop_at(13, signal.SIGINT),
            **MORE,
        )
    # Resuming does not need the initial checkpoint.
    shutil.rmtree(init_run)
    # The same tokenizer tokenizes the text again.
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    shutil.rmtree(Path(data["cache_dir"]))
    with pytest.warns(Notice, match="encoded as bytes"):
        nanogpt.train(out=tmp_path / "run", resume=True)
    assert_runs_equal(tmp_path / "run", tmp_path / "full")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        tmp_path / "full" / "model.safetensors"
    ).read_bytes()


def test_tokens_of_either_text_can_be_sampled(init_run, tmp_path):
    # A text that lacks most letters of the story.
    (tmp_path / "other.txt").write_text("the cat met the dog\n" * 40)
    model = nanogpt.train(tmp_path / "other.txt", init_from=init_run, **MORE | {"steps": 1})
    assert model.summary["unseen_token_ranges"] == [
        list(pair) for pair in checkpoint.load(init_run).summary["unseen_token_ranges"]
    ]


def test_another_shape_or_tokenizer_is_an_error(init_run, story, tmp_path):
    with pytest.raises(
        UserError,
        match=r"shape of an initial checkpoint:\n *setting +model +requested\n"
        r" *arch +qwen3 +gpt2\n *n_layer +2 +3\nLeave out arch, n_layer",
    ):
        nanogpt.train(
            story,
            tmp_path / "run",
            init_from=init_run,
            **MORE | {"n_layer": 3, "arch": "gpt2", "n_head": 2},
        )
    with pytest.raises(UserError, match="Cannot change the tokenizer"):
        nanogpt.train(story, tmp_path / "run", init_from=init_run, tokenizer="bpe", **MORE)
    (tmp_path / "other.toml").write_text('tokenizer = "bpe"')
    with pytest.raises(UserError, match=r"change the tokenizer.*requested tokenizer = bpe"):
        nanogpt.train(
            story, tmp_path / "run", init_from=init_run, config=tmp_path / "other.toml", **MORE
        )
    with pytest.raises(UserError, match="no model at"):
        nanogpt.train(story, tmp_path / "run", init_from=tmp_path / "nothing", **MORE)
    assert not (tmp_path / "run").exists()


def test_recipe_keeps_the_shape_and_chooses_the_rest(init_run, story, tmp_path):
    events = []
    with pytest.warns(Notice, match="leaves time for a single training step"):
        nanogpt.train(story, init_from=init_run, minutes=0.001, on_event=events.append)
    resolved = events[0].config
    model_config = resolved.model.model_copy(update={"dropout": 0.1})
    assert model_config == checkpoint.load(init_run).model.config
    chosen = {choice.name: choice.value for choice in events[0].choices}
    assert resolved.training.optimizer == chosen["optimizer"] == "muon"
    assert resolved.training.muon_learning_rate == chosen["muon_learning_rate"] < 0.02
    assert not chosen.keys() & {"arch", "n_layer", "n_head", "n_embd", "context_length"}


def test_longer_context_is_learned(init_run, story, tmp_path):
    short = nanogpt.train(story, tmp_path / "same", init_from=init_run, **MORE | {"steps": 1})
    assert short.config.rope_theta == 10_000.0
    events = []
    model = nanogpt.train(
        story,
        tmp_path / "long",
        init_from=init_run,
        context_length=64,
        on_event=events.append,
        learning_rate=3e-3,
        **MORE | {"steps": 60},
    )
    initial, finished = (
        next(event for event in events if isinstance(event, kind))
        for kind in (InitialEval, TrainEnd)
    )
    assert finished.loss.loss < initial.val_loss
    assert model.config.context_length == 64
    assert model.config.rope_theta == pytest.approx(10_000.0 * 4 ** (8 / 6))
    loaded = nanogpt.load(tmp_path / "long", dtype="float32")
    assert loaded.config == model.config
    ids = [loaded.tokenizer.encode(story.read_text()[:64])]
    torch.testing.assert_close(torch.tensor(loaded.logits(ids)), torch.tensor(model.logits(ids)))


def test_learned_positions_can_be_fewer_but_not_more(story, tmp_path):
    nanogpt.train(story, tmp_path / "gpt2", **RUN | {"arch": "gpt2", "steps": 5})
    with pytest.raises(
        UserError,
        match=r"longer than the 16 positions .*: 32 tokens .*\nSet context_length=16",
    ):
        nanogpt.train(
            story, tmp_path / "run", init_from=tmp_path / "gpt2", context_length=32, **MORE
        )
    model = nanogpt.train(
        story,
        tmp_path / "run",
        init_from=tmp_path / "gpt2" / "model.safetensors",
        context_length=9,
        **MORE | {"steps": 1},
    )
    assert model.module.wpe.weight.shape == (9, 16)


def test_short_text_shortens_the_context_of_the_model(init_run, tmp_path):
    (tmp_path / "short.txt").write_text("the cat met the dog\n" * 3)
    with pytest.warns(Notice, match="context_length is 13 instead of 16"):
        nanogpt.train(tmp_path / "short.txt", init_from=init_run, **MORE | {"steps": 1})


def test_command_line_reports_the_start_and_the_end(init_run, story, tmp_path, capsys):
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (MORE | {"steps": 2}).items()
        if name != "compile"
    ]
    assert (
        run(
            "train",
            story,
            "--out",
            tmp_path / "run",
            "--init-from",
            init_run,
            "--no-compile",
            *flags,
        )
        == 0
    )
    out = capsys.readouterr().out
    for expected in (
        f", from {init_run}\n",
        "Before step 1: ",
        "initial checkpoint",
        "micro-batch size 4",
    ):
        assert expected in out


def test_given_rope_theta_stays_and_resume_checks_init_from(init_run, story, tmp_path):
    model = nanogpt.train(
        story,
        tmp_path / "run",
        init_from=init_run,
        context_length=64,
        rope_theta=10_000.0,
        **MORE | {"steps": 1},
    )
    assert model.config.rope_theta == 10_000.0
    with pytest.raises(UserError, match=r"initial checkpoint: .*init \(requested .*other\)\.\n"):
        nanogpt.train(out=tmp_path / "run", resume=True, init_from=tmp_path / "other", steps=2)
    assert (
        nanogpt.train(out=tmp_path / "run", resume=True, init_from=init_run, steps=2).summary[
            "step"
        ]
        == 2
    )
