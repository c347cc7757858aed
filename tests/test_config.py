"""Settings: validation with all problems at once, and TOML files."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import (
    TOKENIZERS,
    Config,
    DataConfig,
    ModelConfig,
    SamplingConfig,
    TrainDeviceConfig,
    TrainingConfig,
    flatten,
    read_toml,
    resolve,
    resolve_sampling,
    to_toml,
)
from nanogpt.errors import UserError
from nanogpt.presets import PRESETS, QWEN3_SETTINGS, preset_settings
from nanogpt.tokenizer.trainers import TRAINERS

SECTIONS = [ModelConfig, DataConfig, TrainingConfig, TrainDeviceConfig, SamplingConfig]
counts = st.integers(1, 10**12)
shares = st.floats(0, 0.99)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
words = st.none() | st.text(st.characters(exclude_categories=["Cs"]))

models = st.tuples(st.integers(1, 64), st.integers(1, 64)).flatmap(
    lambda shape: st.builds(
        ModelConfig,
        n_layer=counts,
        n_head=st.just(shape[0]),
        n_embd=st.just(shape[0] * shape[1]),
        context_length=counts,
        dropout=shares,
    )
)
trainings = st.builds(
    TrainingConfig,
    **dict.fromkeys(["batch_size", "steps", "eval_every"], counts),
    **dict.fromkeys(["warmup_steps", "patience"], st.integers(0, 10**12)),
    **dict.fromkeys(["weight_decay", "grad_clip"], positive | st.just(0.0)),
    learning_rate=positive,
    seed=st.integers(0, 2**31 - 1),
)
configs = st.builds(
    Config,
    model=models,
    data=st.builds(
        DataConfig,
        tokenizer=st.sampled_from([*TRAINERS, "a/b.json"]),
        vocab_size=st.none() | counts,
        encoding=words,
        val_text=words,
        max_val_bytes=counts,
    ),
    training=trainings,
    device=st.builds(TrainDeviceConfig, threads=st.none() | st.integers(1, 1024)),
)


@pytest.fixture
def toml(tmp_path):
    def read(content):
        path = tmp_path / "settings.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_toml(path)

    return read


def problems(given: dict[str, object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        resolve(given)
    *found, fix = str(caught.value).splitlines()
    assert "--help" in fix
    return found


@settings(deadline=None)
@given(configs)
def test_to_toml_round_trips_any_configuration(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert resolve(read_toml(path)) == config


@given(configs)
def test_flatten_and_json_round_trip_any_configuration(config):
    assert resolve(flatten(config)) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_to_toml_of_the_defaults_is_complete(toml):
    assert toml(to_toml(Config())) == {
        name: value for name, value in flatten(Config()).items() if value is not None
    }


def test_defaults_are_the_nano_preset():
    assert resolve({}) == Config()
    expected = {
        "context_length": 256, "n_embd": 384, "n_head": 6, "n_layer": 6, "dropout": 0.2,
        "batch_size": 32, "learning_rate": 3e-4, "steps": 5000, "tokenizer": "char",
    }  # fmt: skip
    assert {name: flatten(Config())[name] for name in expected} == expected


def test_flatten_explicit_has_only_the_settings_that_were_set():
    assert flatten(Config(), explicit=True) == {}
    assert flatten(resolve({"n_layer": 6, "threads": None}), explicit=True) == {
        "n_layer": 6,
        "threads": None,
    }


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.n_layer = 7


def test_names_are_unique_across_the_sections():
    names = [name for section in SECTIONS for name in section.model_fields]
    assert len(names) == len(set(names))
    # A section and a setting are both called `device`; in a TOML file one is a table.
    assert set(names) & set(Config.model_fields) == {"device"}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_help(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "]", ")")), name


def test_tokenizers_are_those_that_can_be_trained():
    assert tuple(TRAINERS) == TOKENIZERS


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("droput", "dropout"),
        ("n-layer", "n_layer"),
        ("lerning_rate", "learning_rate"),
        ("context", "context_length"),
    ],
)
def test_unknown_setting_suggests_the_nearest_name(wrong, right):
    assert problems({wrong: 1}) == [f"There is no setting {wrong!r}. Did you mean {right!r}?"]


def test_unknown_setting_without_a_similar_name():
    assert problems({"zzz": 1}) == ["There is no setting 'zzz'."]


def test_resolve_reports_all_problems_at_once():
    wrong = {
        "droput": 0.1,
        "n_layer": 0,
        "dropout": 1,
        "seed": -1,
        "device": "gpu",
        "steps": "many",
        "max_val_bytes": None,
        "zzz": 1,
    }
    assert problems(wrong) == [
        "There is no setting 'droput'. Did you mean 'dropout'?",
        "There is no setting 'zzz'.",
        "n_layer = 0: input should be greater than or equal to 1.",
        "dropout = 1: input should be less than or equal to 0.99.",
        "max_val_bytes = None: input should be a valid integer.",
        "steps = 'many': input should be a valid integer, unable to parse string as an integer.",
        "seed = -1: input should be greater than or equal to 0.",
        "device = 'gpu': input should be 'auto', 'cpu', 'cuda' or 'mps'.",
    ]


def test_resolve_reports_contradictions_with_the_other_problems():
    assert len(problems({"n_embd": 100, "dropout": 2})) == 2


@pytest.mark.parametrize(
    ("n_embd", "n_head", "nearest"),
    [(100, 6, 102), (97, 6, 96), (99, 6, 96), (3, 6, 6), (1, 2, 2), (385, 384, 384)],
)
def test_indivisible_width_suggests_the_nearest(n_embd, n_head, nearest):
    problem = (
        f"n_embd = {n_embd} is not divisible by n_head = {n_head}. "
        f"The nearest width is n_embd = {nearest}."
    )
    assert problems({"n_embd": n_embd, "n_head": n_head}) == [problem]


def test_head_dim_is_free_in_qwen3_only():
    model = resolve({"arch": "qwen3", "n_embd": 100, "n_head": 6, "head_dim": 64}).model
    assert model.head_size == 64
    assert resolve({"n_embd": 96, "n_head": 6, "head_dim": 16}).model.head_size == 16
    for wrong in (
        {"n_embd": 96, "n_head": 6, "head_dim": 32},
        {"arch": "qwen3", "n_embd": 96, "n_head": 6, "head_dim": 15},
    ):
        (problem,) = problems(wrong)
        assert "head_dim" in problem


def test_model_config_derives_sizes_from_its_settings():
    gpt2, qwen3 = ModelConfig(), ModelConfig(arch="qwen3", n_kv_head=2, sliding_window=100)
    assert (gpt2.num_kv_heads, gpt2.head_size, gpt2.intermediate_size) == (6, 64, 1536)
    assert (qwen3.num_kv_heads, qwen3.head_size, qwen3.intermediate_size) == (2, 64, 1024)
    assert (gpt2.attention_window, qwen3.attention_window) == (None, 100)
    assert ModelConfig(arch="qwen3", sliding_window=256).attention_window is None
    assert (gpt2.has_tied_embeddings, qwen3.has_tied_embeddings) == (True, False)
    for tied in (True, False):
        assert ModelConfig(tie_word_embeddings=tied).has_tied_embeddings is tied


def test_an_invalid_device_is_reported_with_the_other_problems():
    assert len(problems({"device": "gpu", "n_layer": 0})) == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_settings_with_arch_qwen3_suit_qwen3(preset):
    settings = preset_settings(preset, "qwen3")
    assert QWEN3_SETTINGS.items() <= settings.items()
    assert resolve(settings | {"arch": "qwen3"}).training.optimizer == "muon"
    assert preset_settings(preset, "gpt2") == preset_settings(preset) == PRESETS[preset]


def test_preset_settings_without_a_preset_are_empty():
    assert preset_settings(None) == preset_settings(None, "qwen3") == {}
    with pytest.raises(UserError, match=r"no preset 'modern'.\nPresets: nano, gpt2,"):
        preset_settings("modern")


@given(st.integers(1, 5000), st.integers(1, 200))
def test_suggested_width_is_divisible_and_nearest(n_embd, n_head):
    try:
        resolve({"n_embd": n_embd, "n_head": n_head})
    except UserError as error:
        advised = int(str(error).partition("width is n_embd = ")[2].partition(".")[0])
        assert abs(advised - n_embd) == min(
            abs(width - n_embd) for width in range(n_head, n_embd + n_head + 1, n_head)
        )
    else:
        assert n_embd % n_head == 0


def test_integers_and_floats_convert_if_exact():
    assert resolve({"dropout": 0}).model.dropout == 0.0
    assert resolve({"steps": 5e3}).training.steps == 5000
    assert problems({"steps": 2.5}) == [
        "steps = 2.5: input should be a valid integer, got a number with a fractional part."
    ]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "grad_clip", "dropout"])
def test_nan_is_refused(name):
    assert problems({name: float("nan")})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_infinity_is_refused(name):
    assert problems({name: float("inf")})


def test_a_dropout_that_rounds_to_everything_is_refused():
    assert problems({"dropout": 0.999})


def test_read_toml_accepts_settings_in_sections_or_at_the_top_level(toml):
    expected = {"n_layer": 3, "learning_rate": 0.01}
    assert toml("[model]\nn_layer = 3\n[training]\nlearning_rate = 1e-2\n") == expected
    assert toml("n_layer = 3\nlearning_rate = 1e-2\n") == expected
    assert toml("learning_rate = 1e-2\n[model]\nn_layer = 3\n") == expected
    assert toml("\ufeffn_layer = 3\r\nlearning_rate = 1e-2\r\n") == expected
    assert toml("") == {}


def test_read_toml_keeps_unknown_names_for_the_error(toml):
    assert problems(toml("[model]\nn_leyer = 3\n[zzz]\nlr = 1\n")) == [
        "There is no setting 'n_leyer'. Did you mean 'n_layer'?",
        "There is no setting 'zzz'.",
    ]


@pytest.mark.parametrize(
    "content", ["model = 3", "[[model]]\nn_layer = 3", "[model.x]\nn_layer = 3"]
)
def test_invalid_section_is_refused(toml, content):
    assert problems(toml(content))


def test_read_toml_refuses_a_setting_given_twice(toml):
    with pytest.raises(UserError):
        resolve(toml("n_layer = 2\n[model]\nn_layer = 3\n"))


@pytest.mark.parametrize(
    "content", ["n_layer 3", "n_layer = 3\nn_layer = 4", b"val = '\xe9'", "n_layer = "]
)
def test_read_toml_refuses_invalid_toml_with_its_path(toml, tmp_path, content):
    with pytest.raises(
        UserError, match=f"The settings in {tmp_path / 'settings.toml'} cannot be read: ."
    ):
        toml(content)


def test_read_toml_refuses_a_missing_file_with_its_path(tmp_path):
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(UserError, match=f"The settings in {path}.* cannot be read: ."):
            read_toml(path)


def test_resolve_sampling_reports_all_problems_at_once():
    assert resolve_sampling({}) == SamplingConfig()
    assert resolve_sampling({"top_k": 3, "stop": ["a", "b"]}).stop == ("a", "b")
    with pytest.raises(UserError) as caught:
        resolve_sampling({"temprature": 1, "top_p": 0, "n_layer": 3})
    assert str(caught.value).splitlines()[:-1] == [
        "There is no setting 'temprature'. Did you mean 'temperature'?",
        "There is no setting 'n_layer'.",
        "top_p = 0: input should be greater than 0.",
    ]
