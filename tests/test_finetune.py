"""A run from an earlier model keeps what it is, learns a new text, looks back further where it can, and resumes as any other."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_cli import run
from test_train import same, stop_at, timeless

import nanogpt
from nanogpt import checkpoint, config
from nanogpt.errors import Notice, UserError
from nanogpt.finetune import FINE_TUNING
from nanogpt.report import Began, Evaluated, Finished

RUN = TINY | {"arch": "modern", "dropout": 0.1, "steps": 60, "eval_every": 20, "device": "cpu"}
MORE = {"steps": 20, "eval_every": 10, "device": "cpu", "dtype": "float32", "attention": "fused", "compile": False, "batch_size": 4}


@pytest.fixture
def earlier(story, tmp_path):
    """The folder of a short run on a story."""
    nanogpt.train(story, tmp_path / "earlier", **RUN)
    return tmp_path / "earlier"


@pytest.fixture
def sequel(story, tmp_path):
    """Another text, with two characters that the story lacks, four times and once."""
    path = tmp_path / "sequel.txt"
    path.write_text(story.read_text().replace("cat", "cow").replace("barn", "wood") + "ÄÄÄÄ€ the end.\n" + story.read_text()[:1000])
    return path


def test_it_begins_from_the_model_and_tells_the_loss_before_and_after(earlier, story, tmp_path):
    events = []
    nanogpt.train(story, tmp_path / "run", init_from=earlier, on_event=events.append, learning_rate=1e-3, warmup_steps=0, **MORE)
    parts = checkpoint.load(earlier)
    began, finished = (next(event for event in events if isinstance(event, kind)) for kind in (Began, Finished))
    assert began.val_loss == pytest.approx(parts.summary["val_loss"])
    assert finished.before == began.val_loss > finished.loss.val_loss
    assert timeless(tmp_path / "run")[0] == {"step": 0, **{name: getattr(began, name) for name in ("val_loss", "bits_per_byte", "val_tokens")}}
    assert [event.step for event in events if isinstance(event, Evaluated)] == [10, 20]
    settled = config.resolve(config.read_toml(tmp_path / "run"))
    assert settled.model == parts.model.config


@pytest.mark.parametrize("kind", ["byte", "word", "bpe"])
def test_the_settings_name_the_kind_of_tokens_that_the_model_has(story, sequel, tmp_path, kind):
    nanogpt.train(story, tmp_path / "earlier", **RUN | {"tokenizer": kind, "steps": 2})
    more = nanogpt.train(sequel, tmp_path / "run", init_from=tmp_path / "earlier", **MORE | {"steps": 2})
    assert config.resolve(config.read_toml(tmp_path / "run")).text.tokenizer == kind
    assert more.tokenizer.to_json() == nanogpt.load(tmp_path / "earlier").tokenizer.to_json()
    assert nanogpt.train(out=tmp_path / "run", resume=True, steps=4).summary["step"] == 4


@pytest.mark.parametrize(("given", "rate"), [({}, FINE_TUNING * 3e-4), ({"learning_rate": 1e-3}, 1e-3)])
def test_its_learning_rate_is_lower_unless_it_was_given(earlier, story, tmp_path, given, rate):
    events = []
    nanogpt.train(story, init_from=earlier, on_event=events.append, **MORE | {"steps": 1} | given)
    assert events[0].config.training.learning_rate == pytest.approx(rate)
    assert [choice.value for choice in events[0].choices if choice.name == "learning_rate"] == ([] if given else [pytest.approx(rate)])


def test_unknown_characters_are_counted_and_spelled_by_bytes_and_resume_is_exact(earlier, sequel, tmp_path):
    with pytest.warns(Notice, match=r"no token for 2 of the \d+ different characters of the text, which are 5 of its [\d,]+ characters \('Ä' 4 times, '€' 1 "):
        nanogpt.train(sequel, tmp_path / "whole", init_from=earlier, **MORE)
    with pytest.warns(Notice, match="spelled by their bytes"), pytest.raises(KeyboardInterrupt):
        nanogpt.train(sequel, tmp_path / "run", init_from=earlier, on_event=stop_at(13, signal.SIGINT), **MORE)
    shutil.rmtree(earlier)  # which resuming does not need
    shutil.rmtree(Path(json.loads((tmp_path / "run" / "text.json").read_text())["folder"]))  # the tokens are made again, by the same tokenizer
    with pytest.warns(Notice, match="spelled by their bytes"):
        nanogpt.train(out=tmp_path / "run", resume=True)
    same(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_what_either_text_had_may_be_written(earlier, tmp_path):
    (tmp_path / "other.txt").write_text("the cat met the dog\n" * 40)  # without most letters
    model = nanogpt.train(tmp_path / "other.txt", init_from=earlier, **MORE | {"steps": 1})
    assert model.summary["unused"] == [list(pair) for pair in checkpoint.load(earlier).summary["unused"]]


def test_another_shape_or_tokenizer_is_refused_with_a_table(earlier, story, tmp_path):
    with pytest.raises(UserError, match=r"keeps its shape:\n *setting +model +asked\n *arch +modern +classic\n *n_layer +2 +3\nLeave them out"):
        nanogpt.train(story, tmp_path / "run", init_from=earlier, **MORE | {"n_layer": 3, "arch": "classic", "n_head": 2})
    with pytest.raises(UserError, match="keeps its tokenizer"):
        nanogpt.train(story, tmp_path / "run", init_from=earlier, tokenizer="bpe", **MORE)
    (tmp_path / "other.toml").write_text('tokenizer = "bpe"')
    with pytest.raises(UserError, match=r"keeps its tokenizer.* not tokenizer = bpe"):
        nanogpt.train(story, tmp_path / "run", init_from=earlier, config=tmp_path / "other.toml", **MORE)
    with pytest.raises(UserError, match="no model at"):
        nanogpt.train(story, tmp_path / "run", init_from=tmp_path / "nothing", **MORE)
    assert not (tmp_path / "run").exists()


def test_by_the_clock_the_recipe_keeps_the_shape_and_chooses_the_rest(earlier, story, tmp_path):
    events = []
    with pytest.warns(Notice, match="nothing is left for training but one step"):
        nanogpt.train(story, init_from=earlier, minutes=0.001, on_event=events.append)
    settled = events[0].config
    assert settled.model.model_copy(update={"dropout": 0.1}) == checkpoint.load(earlier).model.config
    chosen = {choice.name: choice.value for choice in events[0].choices}
    assert settled.training.optimizer == chosen["optimizer"] == "muon"
    assert settled.training.matrix_learning_rate == chosen["matrix_learning_rate"] < 0.02
    assert not chosen.keys() & {"arch", "n_layer", "n_head", "n_embd", "context_length"}


def test_a_stretched_model_learns_to_use_the_longer_context(earlier, story, tmp_path):
    short = nanogpt.train(story, tmp_path / "same", init_from=earlier, **MORE | {"steps": 1})
    assert short._model.config.rope_base == 10_000.0  # nothing changes at the same length
    events = []
    model = nanogpt.train(story, tmp_path / "long", init_from=earlier, context_length=64, on_event=events.append, learning_rate=3e-3, **MORE | {"steps": 60})
    began, finished = (next(event for event in events if isinstance(event, kind)) for kind in (Began, Finished))
    assert finished.loss.val_loss < began.val_loss
    assert model._model.config.context_length == 64
    assert model._model.config.rope_base == pytest.approx(10_000.0 * 4 ** (8 / 6))
    loaded = nanogpt.load(tmp_path / "long", dtype="float32")
    assert loaded._model.config == model._model.config
    ids = [loaded.tokenizer.encode(story.read_text()[:64])]
    torch.testing.assert_close(torch.tensor(loaded.logits(ids)), torch.tensor(model.logits(ids)))


def test_learned_positions_can_be_cut_but_not_stretched(story, tmp_path):
    nanogpt.train(story, tmp_path / "classic", **RUN | {"arch": "classic", "steps": 5})
    with pytest.raises(UserError, match=r"has learned 16 positions, and cannot look back on 32 tokens.\nUse --context-length 16 or less"):
        nanogpt.train(story, tmp_path / "run", init_from=tmp_path / "classic", context_length=32, **MORE)
    model = nanogpt.train(story, tmp_path / "run", init_from=tmp_path / "classic" / "model.safetensors", context_length=9, **MORE | {"steps": 1})
    assert model._model.wpe.weight.shape == (9, 16)


def test_a_short_text_gets_a_shorter_context_than_the_model_had(earlier, tmp_path):
    (tmp_path / "short.txt").write_text("the cat met the dog\n" * 3)
    with pytest.warns(Notice, match="the context is 13 tokens instead of 16"):
        nanogpt.train(tmp_path / "short.txt", init_from=earlier, **MORE | {"steps": 1})


def test_the_run_and_its_end_are_told(earlier, story, tmp_path, capsys):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (MORE | {"steps": 2}).items() if name != "compile"]
    assert run("train", story, "--out", tmp_path / "run", "--init-from", earlier, "--no-compile", *words) == 0
    out = capsys.readouterr().out
    for expected in (f", from {earlier}\n", "Before step 1: ", "the model it began from", "GB for a step, 4 windows at a time"):
        assert expected in out


def test_a_base_that_was_given_stays_and_a_run_goes_on_only_from_what_it_began_from(earlier, story, tmp_path):
    model = nanogpt.train(story, tmp_path / "run", init_from=earlier, context_length=64, rope_base=10_000.0, **MORE | {"steps": 1})
    assert model._model.config.rope_base == 10_000.0
    with pytest.raises(UserError, match=r"began from .*earlier, not from .*other\.\n"):
        nanogpt.train(out=tmp_path / "run", resume=True, init_from=tmp_path / "other", steps=2)
    assert nanogpt.train(out=tmp_path / "run", resume=True, init_from=earlier, steps=2).summary["step"] == 2
