"""The command line: its flags are frozen here, and user errors exit with code 2 and a message."""

import json
import subprocess
import sys

import pytest
from helpers import TINY, run

import nanogpt
from nanogpt.cli.app import app
from nanogpt.cli.args import move_stdin_dash_last

MODEL = (
    "--arch --context-length --dropout --head-dim --n-embd --n-head --n-kv-head --n-layer "
    "--no-tie-word-embeddings --rope-theta --sliding-window --tie-word-embeddings"
)
DATA = (
    "--cross-documents --encoding --max-val-bytes --no-cross-documents --text-field --tokenizer "
    "--val-text --vocab-size"
)
TRAINING = (
    "--activation-checkpointing --batch-size --cooldown-fraction --eval-every --grad-clip "
    "--learning-rate --micro-batch-size --minutes --muon-learning-rate "
    "--no-activation-checkpointing --optimizer --patience --seed --steps --warmup-steps "
    "--weight-decay"
)
DEVICE = "--deterministic --device --dtype --threads"
RUN = f"{MODEL} {DATA} {TRAINING} {DEVICE} --attention --compile --no-compile --parallel"
SAMPLING = "--max-tokens --min-p --repetition-penalty --stop --temperature --top-k --top-p"
SURFACE = {
    "train": f"{RUN} --config --init-from --open --out --overwrite --preset --resume --track",
    "plan": f"{RUN} --gpu --gpus-per-node --json --network --nodes --preset --price --text-bytes",
    "bench": f"{RUN} --json",
    "prepare": f"{DATA} --json --out --shard",
    "sample": f"{SAMPLING} {DEVICE} --encoding --error-on-unknown --json --num-samples --prompt "
    "--prompt-file --seed",
    "eval": f"{DEVICE} --by-position --context-length --encoding --json --text-field",
    "compare": "--json --plot",
    "inspect": f"{DEVICE} --attention --encoding --html --json --layer --memorization --neuron "
    "--neurons --surprisal --text",
    "serve": f"{DEVICE} --api-key --host --max-batch-size --max-queue --port --timeout",
}
SMALL = [
    f"--{name.replace('_', '-')}={value}"
    for name, value in (TINY | {"steps": 4, "eval_every": 2, "dropout": 0}).items()
]


@pytest.mark.parametrize(
    "before",
    [
        [],
        ["--no-compile"],
        ["--deterministic"],
        ["--resume"],
        ["--memorization"],
        ["--out=run"],
        ["--out", "run"],
        ["book.txt"],
    ],
)
def test_move_stdin_dash_last(before):
    assert move_stdin_dash_last(["train", *before, "-", "--seed", "1"]) == [
        "train",
        *before,
        "--seed",
        "1",
        "--",
        "-",
    ]


def test_move_stdin_dash_last_keeps_option_values():
    assert move_stdin_dash_last(["sample", "run", "--prompt-file", "-"]) == [
        "sample",
        "run",
        "--prompt-file",
        "-",
    ]


@pytest.fixture
def trained(story, tmp_path):
    nanogpt.train(story, tmp_path / "run", **TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0})
    return tmp_path / "run"


def test_flags_are_frozen():
    commands = {
        name: app for name, app in app.resolved_commands().items() if not name.startswith("-")
    }
    assert set(commands) == set(SURFACE)
    for name, command in commands.items():
        options = {
            name
            for argument in command.assemble_argument_collection()
            if argument.parse
            for name in argument.names
            if name.startswith("--")
        }
        assert options == set(SURFACE[name].split())


def test_train_prints_plain_lines_without_a_terminal(story, tmp_path, capsys):
    assert run("train", story, "--out", tmp_path / "run", *SMALL) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for expected in (
        "held out",
        "M parameters",
        "2/4  ",
        "val ",
        "bits per byte",
        "trigram baseline",
        "this model (step",
        "nanogpt sample",
    ):
        assert expected in out


def test_sample_streams_the_prompt_and_what_follows(trained, tmp_path, capsys):
    assert run("sample", trained, "--prompt", "The cat", "--seed", 3, "--max-tokens", 20) == 0
    first = capsys.readouterr().out
    assert first.startswith("The cat")
    assert len(first) == len("The cat") + 20 + 1
    (tmp_path / "prompt.txt").write_text("The cat\n")
    assert (
        run(
            "sample",
            trained / "model.safetensors",
            "--prompt-file",
            tmp_path / "prompt.txt",
            "--seed",
            3,
            "--max-tokens",
            20,
        )
        == 0
    )
    assert capsys.readouterr().out == first
    assert (
        run(
            "sample",
            trained,
            "--prompt",
            "The cat",
            "--seed",
            2,
            "--max-tokens",
            20,
            "--num-samples",
            2,
        )
        == 0
    )
    assert "--- 2 of 2, seed 3 ---\n" + first in capsys.readouterr().out


def test_sample_json_is_one_object(trained, capsys):
    assert (
        run("sample", trained, "--json", "--num-samples", 2, "--seed", 5, "--max-tokens", 10) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert [sample["seed"] for sample in answer["samples"]] == [5, 6]
    assert all(len(sample["text"]) == 10 for sample in answer["samples"])


def test_sample_prints_its_random_seed(trained, capsys):
    assert run("sample", trained, "--max-tokens", 5) == 0
    assert "seed" in capsys.readouterr().err


def test_eval_prints_a_table_or_json(trained, story, capsys):
    assert run("eval", trained) == 0
    table = capsys.readouterr().out
    assert table.index("uniform baseline") < table.index("trigram baseline")
    assert run("eval", trained, story, "--json", "--context-length", 8) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["loss"] > 0
    assert answer["bits_per_byte"] > 0
    assert answer["word_perplexity"] > 1
    assert "loss_by_position" not in answer
    assert run("eval", trained, "--by-position") == 0
    assert "position in the context  nats per token  tokens" in capsys.readouterr().out
    assert run("eval", trained, "--by-position", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    (bucket,) = answer["loss_by_position"]
    assert bucket == {
        "first": 0,
        "last": 15,
        "loss": pytest.approx(answer["loss"]),
        "tokens": answer["tokens"],
    }


MISTAKES = {
    "wrong path": (["stroy.txt"], ["There is no file", "stroy.txt", "story.txt"]),
    "no text": (["--out", "run"], ["no text"]),
    "empty folder": (["empty"], ["There is no text file in the folder"]),
    "binary file": (["binary.dat"], ["binary file"]),
    "pdf": (["paper.pdf"], ["PDF", "Convert it to plain text"]),
    "not utf-8": (["latin.txt"], ["byte 0xe9 at offset 12, line 2", "--encoding cp1252"]),
    "too short": (["short.txt"], ["too short", "1 to validate on"]),
    "one symbol": (["same.txt"], ["all the same"]),
    "context too long": (
        ["story.txt", "--context-length", "100000"],
        ["The context is too long for the text: 100000 tokens"],
    ),
    "a window for classic": (
        ["story.txt", "--sliding-window", "10", "--steps", "1"],
        ["sliding_window = 10 requires arch = 'qwen3'"],
    ),
    "heads do not divide": (
        ["story.txt", "--n-embd", "100", "--n-head", "3"],
        ["n_embd = 100", "n_head = 3", "n_embd = 99"],
    ),
    "misspelt flag": (["story.txt", "--n-layers", "3"], ["Did you mean --n-layer?"]),
    "misspelt command": (None, ["Did you mean", "train"]),
    "wrong type": (["story.txt", "--steps", "many"], ["steps", "'many'"]),
    "out of range, twice": (
        ["story.txt", "--steps", "0", "--dropout", "1.5"],
        ["steps = '0'", "dropout = '1.5'"],
    ),
    "misspelt TOML key": (
        ["story.txt", "--config", "misspelt.toml"],
        ["'n_layres'", "Did you mean 'n_layer'?"],
    ),
    "not TOML": (["story.txt", "--config", "broken.toml"], ["cannot be read"]),
    "no such TOML": (["story.txt", "--config", "absent.toml"], ["absent.toml", "cannot be read"]),
    "cuda without a GPU": (
        ["story.txt", "--device", "cuda"],
        ["The device cuda is not available", "Available devices: cpu"],
    ),
    "unknown tokenizer": (
        ["story.txt", "--tokenizer", "bpee"],
        ["tokenizer = 'bpee'", "char, byte, word, bpe", "did you mean bpe."],
    ),
    "no such tokenizer": (
        ["story.txt", "--tokenizer", "none/tokenizer.json"],
        ["no tokenizer", "none/tokenizer.json"],
    ),
    "size of characters": (
        ["story.txt", "--vocab-size", "300"],
        ["vocab_size = 300 does not go with tokenizer = 'char'"],
    ),
    "vocabulary too large": (
        ["story.txt", "--tokenizer", "bpe", "--vocab-size", "9999"],
        ["The text supports", "not vocab_size = 9999"],
    ),
    "occupied folder": (["story.txt", "--out", "occupied"], ["not a nanogpt run", "thesis.tex"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_train_mistakes_exit_2_and_write_nothing(mistake, story, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    files = {
        "binary.dat": b"\x01\x00\x02\x00\x00" * 9,
        "paper.pdf": b"%PDF-1.7\n",
        "latin.txt": b"one line\ncaf\xe9 au lait",
        "short.txt": b"hello",
        "same.txt": b"a" * 400,
        "misspelt.toml": b"[model]\nn_layres = 3\n",
        "broken.toml": b"[model\n",
        "occupied/thesis.tex": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    words, expected = MISTAKES[mistake]
    assert run(*(["train", *words] if words is not None else ["trian"])) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_override_toml_overrides_defaults(story, tmp_path):
    (tmp_path / "settings.toml").write_text(
        "n_layer = 1\n[model]\nn_embd = 8\nn_head = 2\n[training]\nsteps = 3\nbatch_size = 2\n"
    )
    out = tmp_path / "run"
    assert (
        run("train", story, "--config", tmp_path / "settings.toml", "--out", out, "--n-embd", 12)
        == 0
    )
    settings = (out / "config.toml").read_text()
    for expected in (
        "n_layer = 1\n",
        "n_embd = 12\n",
        "n_head = 2\n",
        "steps = 3\n",
        "learning_rate = 0.0003\n",
        "context_length = 256\n",
    ):
        assert expected in settings
    assert run("train", story, "--config", out / "config.toml", "--out", tmp_path / "again") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_default_run_name_follows_the_text(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a [b]: c?.txt").write_text(story.read_text())
    (tmp_path / "sub").mkdir()
    assert run("train", "a [b]: c?.txt", *SMALL) == 0
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "sub" / "runs")
    assert run("train", "../story.txt", *SMALL) == 0
    assert sorted(path.name for path in (tmp_path / "sub" / "runs").iterdir()) == ["a-b-c", "story"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "STORY", "--out", "STORY/x"], "Not a directory"),
        (["train", "STORY", "--out", "STORY"], "is a file, not a folder"),
        (["sample", "RUN", "--num-samples", "0"], "--num-samples is too small: 0"),
        (["sample", "RUN", "--stop", ""], "stop"),
        (["sample", "RUN", "--seed", "99999999999999999999"], "out of range"),
        (["sample", "RUN", "--prompt-file", "python-docs"], "No such prompt file"),
        (["sample", "STORY"], "not a model file"),
        (["train", "https://example.org/book.txt"], "Download it, then"),
        (
            ["train", "STORY", "--out", "big", "--n-embd", "4000000", "--n-head", "1"],
            "not enough memory for a model",
        ),
        (
            ["train", "STORY", "--out", "big", "--steps", "1", "--batch-size", "10000000"],
            "micro-batches of 1 sequence of 256 tokens",
        ),
        (["eval", "RUN", "--context-length", "99"], "out of range: 99 (limit 16)"),
    ],
)
def test_mistakes_exit_2(words, expected, trained, story, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        run(*(word.replace("STORY", str(story)).replace("RUN", str(trained)) for word in words))
        == 2
    )
    assert expected in capsys.readouterr().err


def test_sample_at_tiny_temperature_is_greedy(trained, capsys):
    texts = []
    for temperature in (0, 1e-40):
        assert (
            run("sample", trained, "--temperature", temperature, "--seed", 1, "--max-tokens", 20)
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_sample_names_unknown_characters(trained, capsys):
    assert run("sample", trained, "--prompt", "日🙂", "--max-tokens", 3) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("日🙂")
    assert "'日' (U+65E5) at position 0, '🙂' (U+1F642) at position 1" in captured.err
    assert run("sample", trained, "--prompt", "日🙂", "--error-on-unknown") == 2
    assert run("sample", trained, "--prompt", "ok \udc80") == 2
    assert "surrogate" in capsys.readouterr().err


def test_sample_of_corrupt_model_suggests_resume(trained, capsys):
    path = trained / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run("sample", trained) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("sample", trained / "nothing") == 2


def test_train_checks_free_disk_space_first(story, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "nanogpt.files.shutil.disk_usage",
        lambda path: type("Usage", (), {"total": 10**9, "free": 1000}),
    )
    assert run("train", story, "--out", tmp_path / "run", *SMALL) == 2
    message = capsys.readouterr().err
    assert "disk is full" in message
    assert "are needed" in message


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_train_and_sample_in_pipes(story, tmp_path):
    command = [sys.executable, "-m", "nanogpt"]
    subprocess.run(
        [*command, "train", "-", "--out", tmp_path / "run", *SMALL],
        stdin=story.open("rb"),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    pipe = subprocess.run(
        f"'{sys.executable}' -m nanogpt sample '{tmp_path / 'run'}' --max-tokens 300 | head -c 20",
        shell=True,
        capture_output=True,
    )
    assert len(pipe.stdout) == 20
    words = " ".join(
        f"'{word}'"
        for word in [
            sys.executable,
            "-m",
            "nanogpt",
            "train",
            str(story),
            "--out",
            str(tmp_path / "deaf"),
            *SMALL,
        ]
    )
    # Training continues after its reader has exited.
    deaf = subprocess.run(f"{words} | head -c 1", shell=True, capture_output=True)
    assert (tmp_path / "deaf" / "state" / "latest").read_text() == "4"
    assert b"Traceback" not in deaf.stderr
    assert b"Traceback" not in pipe.stderr


def test_plan_prints_estimates(capsys):
    assert run("plan", "--dtype", "float32", "--text-bytes", 1_000_000) == 0
    out = capsys.readouterr().out
    for expected in (
        "10.77 M: embedding",
        "GB: weights",
        "MFLOP per token",
        "s per step",
        "1.00 M tokens of 1.00 bytes, 1 shard of 1.00 MB",
        "tokens per parameter",
        "41.0 epochs",
    ):
        assert expected in out
    assert run("plan", "--gpu", "h100", "--nodes", 2, "--gpus-per-node", 8, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["devices"], made["total_parameters"]) == (16, 10_770_816)
    assert made["communication_seconds"] > 0


LLAMA_SIZED = [
    "--arch",
    "qwen3",
    "--n-layer",
    80,
    "--n-head",
    64,
    "--n-kv-head",
    8,
    "--n-embd",
    9216,
    "--context-length",
    4096,
    "--vocab-size",
    32768,
]


def test_plan_for_seventy_billion_parameters_and_ten_terabytes(capsys):
    where = [
        "--gpu",
        "h100",
        "--nodes",
        8,
        "--gpus-per-node",
        8,
        "--batch-size",
        64,
        "--price",
        2,
        "--tokenizer",
        "bpe",
        "--text-bytes",
        10**13,
    ]
    assert run("plan", *LLAMA_SIZED, *where, "--parallel", "fsdp", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["total_parameters"], made["fits"], made["fix"], made["corpus"]["shards"]) == (
        70_251_904_512,
        True,
        None,
        4096,
    )
    assert made["cost"] == pytest.approx(2 * 64 * made["seconds"] / 3600)
    assert run("plan", *LLAMA_SIZED, *where) == 0
    out = capsys.readouterr().out
    for expected in (
        "does not fit into 80 GB",
        "It fits with --parallel fsdp.",
        "all-reduce of gradients",
        "Cost ",
        "10.0 TB: ",
        "4,096 shards of",
    ):
        assert expected in out


def test_plan_for_gpus_imports_no_torch():
    code = (
        "import sys; from nanogpt.cli.main import main\n"
        "main(['plan', '--gpu', 'h100', '--text-bytes', '1000'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_plan_knows_presets_and_micro_batches(capsys):
    assert run("plan", "--preset", "gpt2", "--vocab-size", 50257, "--gpu", "h100", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["total_parameters"], made["tokens_per_step"]) == (124_439_808, 512 * 1024)
    assert 1 < made["micro_batch_size"] < 512
    assert made["total_memory"] < made["device_memory"] == 80e9
    assert not made["activation_checkpointing"]
    assert run("plan", "--preset", "gpt2-xl", "--n-layer", 2, "--gpu", "t4", "--batch-size", 4) == 0
    assert "micro-batch size" in capsys.readouterr().out
    assert run("plan", "--preset", "gpt3") == 2
    assert "Presets: nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl" in capsys.readouterr().err


def test_plan_with_minutes_follows_the_recipe(capsys, monkeypatch):
    monkeypatch.setattr("nanogpt.training.recipe.seconds_per_token", lambda *_: 1e-4)
    assert run("plan", "--minutes", 1, "--dtype", "float32", "--json") == 0
    # Only qwen3, which the recipe chooses, has a head of its own.
    assert "head" in json.loads(capsys.readouterr().out)["parameters"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["plan", "--text-bytes", 0], "Not a positive number: --text-bytes 0"),
        (
            ["plan", "--nodes", -1, "--gpus-per-node", 0],
            "Not a positive number: --gpus-per-node 0, --nodes -1",
        ),
        (["plan", "--gpu", "h100", "--price", "nan"], "Not a positive number: --price nan"),
        (["plan", "--gpu", "abacus"], "no GPU 'abacus'"),
        (["bench", "--n-embd", 100, "--n-head", 3], "is not divisible by"),
    ],
)
def test_plan_mistakes_exit_2(words, answer, capsys):
    assert run(*words) == 2
    assert answer in capsys.readouterr().err


def test_bench_measures_training_and_decoding(capsys, monkeypatch):
    from nanogpt import bench

    monkeypatch.setattr(bench.bench, "__defaults__", (0.0, 3))  # no seconds, three tokens
    tiny = [
        f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "compile"
    ]
    assert run("bench", *tiny, "--no-compile", "--json") == 0
    speed = json.loads(capsys.readouterr().out)
    assert speed["train_tokens_per_second"] == pytest.approx(64 / speed["step_seconds"])
    assert speed["mfu"] == pytest.approx(
        speed["train_flops_per_second"] / speed["peak_flops_per_second"]
    )
    assert (speed["steps"], speed["tokens"], speed["compiled"]) == (3, 3, False)
    assert run("bench", *tiny, "--no-compile") == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert "Decoding" in out


def test_prepare_in_shards_then_train(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"body": f"Text {i}: " + "the cat. " * (i % 7 + 1)}) + "\n"
            for i in range(200)
        )
    )
    words = [
        "prepare",
        tmp_path / "a.jsonl",
        "--text-field",
        "body",
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "data",
    ]
    assert run(*words, "--shard", "2/2") == 0
    assert "1 unit of another part is still missing" in capsys.readouterr().out
    assert run(*words, "--shard", "1/2") == 0
    assert "in 200 documents" in (out := capsys.readouterr().out)
    assert f"nanogpt train {tmp_path / 'data'}" in out
    assert run(*words, "--shard", "half") == 2
    assert "not of the form i/n: half" in capsys.readouterr().err
    for more in (["--steps", 4], ["--resume", "--steps", 6]):
        text = [] if "--resume" in more else [tmp_path / "data"]
        small = (
            [] if "--resume" in more else [word for word in SMALL if not word.startswith("--steps")]
        )
        assert (
            run("train", *text, *small, "--no-cross-documents", "--out", tmp_path / "run", *more)
            == 0
        )
    settings = (tmp_path / "run" / "config.toml").read_text()
    for expected in ('tokenizer = "byte"', 'text_field = "body"', "cross_documents = false"):
        assert expected in settings
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    # Positions after the end of a document are not counted.
    assert 0 < min(step["tokens"] for step in steps if "tokens" in step) < 4 * 16
