"""Training from Python: settings, run folders, texts and tokenizers that fit or are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, metrics_without_timings

import nanogpt
from nanogpt import checkpoint
from nanogpt.config import DataConfig, ModelConfig
from nanogpt.data.prepare import prepare_folder
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir
from nanogpt.tokenizer.tokenizer import train_tokenizer
from nanogpt.training.events import StepEnd

RUN = TINY | {"dropout": 0.1, "steps": 100, "eval_every": 20, "device": "cpu"}


@pytest.fixture
def full_run(story, tmp_path):
    """A run of 100 steps."""
    nanogpt.train(story, tmp_path / "full_run", **RUN)
    return tmp_path / "full_run"


def test_preset_unknown_name_fails(story):
    with pytest.raises(UserError, match=r"no preset 'gpt9'.\n.*nano"):
        nanogpt.train(story, preset="gpt9")


def test_preset_replaces_the_recipe(story):
    class EndRunError(Exception):
        pass

    def check(event):
        # The context length may be clamped to the short text.
        model = event.config.model.model_copy(update={"context_length": 256})
        assert model == ModelConfig(context_length=256)
        raise EndRunError

    with pytest.raises(EndRunError):
        nanogpt.train(
            story, preset="nano", minutes=1.0, on_event=check, compile=False, dtype="float32"
        )


def test_resume_with_changed_settings_fails_with_a_table(story, tmp_path):
    run = tmp_path / "run"
    nanogpt.train(story, run, **RUN | {"steps": 20})
    with pytest.raises(UserError, match=r"n_layer +2 +3\n +dropout +0.1 +0.0"):
        nanogpt.train(story, run, resume=True, n_layer=3, dropout=0.0)
    nanogpt.train(story, run, resume=True, steps=30, n_layer=2)
    assert metrics_without_timings(run)[-1]["step"] == 30


def test_resume_with_another_text_fails(story, tmp_path):
    run = tmp_path / "run"
    nanogpt.train(story, run, **RUN | {"steps": 20})
    story.write_text(story.read_text() + "!")
    with pytest.raises(UserError, match=r"text differs from the training text"):
        nanogpt.train(story, run, resume=True)
    before = (run / "model.safetensors").read_bytes()
    nanogpt.train(out=run, resume=True, steps=21)  # the prepared data still exists
    assert (run / "model.safetensors").read_bytes() != before


def test_resume_without_a_run_lists_other_runs(story, tmp_path):
    with pytest.raises(UserError, match="Start one: nanogpt train TEXT"):
        nanogpt.train([], tmp_path / "typo", resume=True)
    nanogpt.train(story, tmp_path / "right", **TINY | {"steps": 2})
    message = (
        f"There is no run to resume in {tmp_path / 'typo'}.\n"
        f"Runs that can be resumed: {tmp_path / 'right'}"
    )
    with pytest.raises(UserError, match=message):
        nanogpt.train([], tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_resume_without_state_starts_a_new_run_with_a_notice(story, tmp_path):
    with pytest.warns(Notice, match="starts at step 0"):
        nanogpt.train(story, tmp_path / "new", resume=True, **RUN | {"steps": 2})


def test_resume_of_a_complete_run_changes_nothing(story, tmp_path, full_run):
    def read_files():
        return {path.name: path.read_bytes() for path in full_run.iterdir() if path.is_file()}

    before = read_files()
    nanogpt.train(out=full_run, resume=True)
    assert read_files() == before


def test_run_folder_in_use_is_not_overwritten(story, tmp_path, full_run):
    before = (full_run / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run, saved at step 100"):
        nanogpt.train(story, full_run, **RUN)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").touch()
    with pytest.raises(UserError, match=r"not a nanogpt run: it contains chapter1.tex"):
        nanogpt.train(story, foreign, overwrite=True, **RUN)
    with pytest.raises(UserError):  # a run that cannot start overwrites nothing
        nanogpt.train(tmp_path / "nothing.txt", full_run, overwrite=True, **RUN)
    assert (full_run / "model.safetensors").read_bytes() == before
    nanogpt.train(story, full_run, overwrite=True, **RUN | {"steps": 3})
    assert checkpoint.latest_step(full_run) == 3


def test_context_length_is_clamped_on_a_300_byte_text(tmp_path):
    (tmp_path / "small.txt").write_text(("We all live in a yellow submarine. " * 9)[:300])
    with pytest.warns(Notice, match="context_length is 67 instead of 256"):
        model = nanogpt.train(
            tmp_path / "small.txt", n_layer=1, n_head=1, n_embd=8, batch_size=2, steps=3
        )
    assert 0 < model.evaluate().loss < 10
    with pytest.raises(UserError, match=r"limit 269, from 270 training tokens"):
        nanogpt.train(tmp_path / "small.txt", context_length=300)


def test_resume_with_lost_state_keeps_the_model(story, tmp_path, full_run):
    before = (full_run / "model.safetensors").read_bytes()
    (full_run / "state" / "latest").write_text("")
    with pytest.raises(UserError, match="state is missing or damaged"):
        nanogpt.train(story, full_run, resume=True, **RUN)
    (full_run / "state" / "latest").write_text("100")
    (full_run / "state" / "100" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"The state in .*100 is damaged"):
        nanogpt.train(out=full_run, resume=True)
    assert (full_run / "model.safetensors").read_bytes() == before


def test_overwrite_checks_disk_space_first(story, full_run, monkeypatch):
    before = sorted(path.name for path in full_run.iterdir())
    monkeypatch.setattr(
        "nanogpt.files.shutil.disk_usage",
        lambda path: type("Usage", (), {"total": 10**9, "free": 1000}),
    )
    with pytest.raises(UserError, match="disk is full"):
        nanogpt.train(story, full_run, overwrite=True, **RUN)
    assert sorted(path.name for path in full_run.iterdir()) == before


def test_run_folder_keeps_foreign_files(story, full_run):
    (full_run / "notes.txt").write_text("mine")
    nanogpt.train(out=full_run, resume=True)
    nanogpt.train(story, full_run, overwrite=True, **RUN | {"steps": 2})
    assert (full_run / "notes.txt").read_text() == "mine"


def test_run_folder_is_locked_by_one_process(story, tmp_path):
    run, errors = tmp_path / "run", []
    script = f"import sys, nanogpt; nanogpt.train(sys.argv[1], sys.argv[2], resume=True, **{RUN})"

    def start_second_process(event):
        if isinstance(event, StepEnd) and event.step == 3:
            command = [sys.executable, "-c", script, story, run]
            errors.append(subprocess.run(command, capture_output=True, text=True).stderr)

    nanogpt.train(story, run, on_event=start_second_process, **RUN | {"steps": 5})
    assert "Another process is training in" in errors[0]


def test_resume_with_changed_validation_text_fails(story, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The cat saw the dog.\n" * 20)
    nanogpt.train(story, tmp_path / "run", val_text=held_out, **RUN | {"steps": 2})
    held_out.write_text("The dog saw the cat.\n" * 20)
    with pytest.raises(UserError, match="text differs from the training text"):
        nanogpt.train(story, tmp_path / "run", resume=True, steps=4)


def test_samples_with_unusual_line_ends_survive_a_resume(tmp_path):
    (tmp_path / "odd.txt").write_text("ab\u2028cd\x85ef" * 100)
    nanogpt.train(tmp_path / "odd.txt", tmp_path / "run", **RUN | {"steps": 10, "eval_every": 5})
    nanogpt.train(out=tmp_path / "run", resume=True, steps=20)
    lines = (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15, 20]


def test_evaluate_refuses_tokens_of_another_tokenizer(story, tmp_path, full_run):
    (tmp_path / "other.txt").write_text("0123456789 " * 200)
    nanogpt.train(tmp_path / "other.txt", tmp_path / "run", **RUN | {"steps": 2})
    (full_run / "other.safetensors").write_bytes(
        (tmp_path / "run" / "model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="Name a text"):
        nanogpt.load(full_run / "other.safetensors").evaluate()


def test_api_errors_are_user_errors(story, tmp_path, full_run):
    model = nanogpt.load(full_run)
    for ids in ([], [[]], [[1] * 17], [[1, 2], [3]], [[10**6]], [[-1]]):
        with pytest.raises(UserError, match="logits takes rows"):
            model.logits(ids)
    for wrong in ({"stop": ["a", 3]}, {"stop": [""]}, {"temprature": 1}, {"top_p": 0}):
        with pytest.raises(UserError):
            model.stream("a", **wrong)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match="seed"):
            model.stream("a", seed=seed)
    with pytest.raises(UserError, match="load takes"):
        nanogpt.load(full_run, steps=5)
    with pytest.raises(UserError, match="no run to resume"):
        nanogpt.train(story, resume=True)
    with pytest.raises(UserError, match="past its last step: 100 "):
        nanogpt.train(out=full_run, resume=True, steps=50)
    assert "".join(model.stream("The", stop=" ", seed=1)).count(" ") == 0
    with pytest.raises(UserError, match="at the same time"):
        nanogpt.train(story, full_run, resume=True, overwrite=True)


def test_train_without_out_leaves_no_files(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nanogpt.train(story, **RUN | {"steps": 2})
    assert sorted(os.listdir(tmp_path)) == ["story.txt"]
    assert model.logits([[1, 2, 3]]).shape == (1, 3, model.tokenizer.vocab_size)


def test_evaluate_without_text_or_run_fails(story, tmp_path):
    nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 2})
    copy = tmp_path / "elsewhere" / "m.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    model = nanogpt.load(copy)
    with pytest.raises(UserError, match="Name a text"):
        model.evaluate()
    assert model.evaluate(story).baselines == {}
    assert nanogpt.load(tmp_path / "run").evaluate(story).baselines["bigram"] > 0
    with pytest.raises(UserError, match=r"out of range: 17 \(limit 16\)"):
        model.evaluate(story, context_length=17)


def test_evaluate_prepares_deleted_data_again(story, tmp_path):
    expected = nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 2}).evaluate().loss
    folder = Path(json.loads((tmp_path / "run" / "data.json").read_text())["cache_dir"])
    next(folder.glob("val-*.bin")).unlink()
    assert nanogpt.load(tmp_path / "run", dtype="float32").evaluate().loss == expected
    shutil.rmtree(folder)
    assert nanogpt.load(tmp_path / "run", dtype="float32").evaluate().loss == expected


def test_evaluate_ends_documents_as_in_training(story, tmp_path):
    lines = story.read_text().splitlines()
    table = tmp_path / "story.jsonl"
    records = [json.dumps({"body": line, "text": "The cat"}) for line in lines]
    table.write_text("\n".join(records) + "\n")
    without_ends = nanogpt.train(story, **RUN | {"steps": 1})
    assert without_ends.evaluate(table, text_field="body").tokens == len("".join(lines)) - 1
    model = nanogpt.train(table, tmp_path / "run", text_field="body", **RUN | {"steps": 1})
    loaded = nanogpt.load(tmp_path / "run", dtype="float32")
    # A loaded model reads the text field of its run.
    assert loaded.evaluate(table) == model.evaluate(table, text_field="body")
    assert model.evaluate(table).tokens == len("".join(lines)) + len(lines) - 1
    assert model.evaluate(story).tokens == len(story.read_text()) - 1
    prepare_folder([str(story)], DataConfig(), tmp_path / "data")
    with pytest.raises(UserError, match="prepared for training"):
        model.evaluate(tmp_path / "data")


def test_prepared_folder_with_another_text_fails(story, tmp_path):
    other, data, run = tmp_path / "other.txt", tmp_path / "data", tmp_path / "run"
    prepare_folder([str(story)], DataConfig(), data)
    nanogpt.train(data, run, **RUN | {"steps": 2})
    before = (run / "data.json").read_bytes()
    shutil.rmtree(data)
    other.write_text(story.read_text().replace("fox", "dog"))
    prepare_folder([str(other)], DataConfig(), data)
    with pytest.raises(UserError, match="text differs from the training text"):
        nanogpt.train(out=run, resume=True, steps=4)
    with pytest.raises(UserError, match="text differs from the training text"):
        nanogpt.load(run).evaluate()
    assert (run / "data.json").read_bytes() == before


@pytest.mark.parametrize("tokenizer", ["byte", "word", "bpe", "tokenizer.json"])
def test_tokenizers_train_and_resume(story, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(
        train_tokenizer("bpe", [story.read_text()], 280).to_json(), encoding="utf-8"
    )
    settings = RUN | {"tokenizer": tokenizer, "eval_every": 2}
    first = nanogpt.train(story, "run", **settings | {"steps": 2})
    val_tokens = json.loads(Path("run/data.json").read_text())["val_tokens"]
    assert first.evaluate().tokens == val_tokens - 1
    full = nanogpt.train(story, "full_run", **settings | {"steps": 4})
    resumed = nanogpt.train((), "run", resume=True, steps=4)
    assert resumed.evaluate().tokens == full.evaluate().tokens == val_tokens - 1
    assert first.tokenizer.to_json() == nanogpt.load("run").tokenizer.to_json()
    assert "".join(full.stream("The cat", seed=1, max_tokens=20))
    loss = full.evaluate(story)
    text_size = np.array([len(story.read_text()), len(story.read_text().split())])
    predicted_size = text_size * loss.tokens / (loss.tokens + 1)
    assert (loss.bytes, loss.words) == pytest.approx(predicted_size)
    assert set(loss.baselines) == {"uniform", "unigram", "bigram", "trigram"}


def test_resume_with_a_changed_tokenizer_fails(story, tmp_path):
    path, run = tmp_path / "tokenizer.json", tmp_path / "run"
    path.write_text(train_tokenizer("bpe", [story.read_text()], 280).to_json(), encoding="utf-8")
    nanogpt.train(story, run, **RUN | {"tokenizer": str(path), "steps": 2})
    shutil.rmtree(cache_dir() / "tokens")
    path.write_text(train_tokenizer("bpe", [story.read_text()], 270).to_json(), encoding="utf-8")
    message = (
        r"tokenizer of .* has changed: "
        r"it makes [\d,]+ training tokens \(expected [\d,]+\)"
    )
    with pytest.raises(UserError, match=message):
        nanogpt.train((), run, resume=True, steps=4)
    path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        nanogpt.load(run).evaluate()
