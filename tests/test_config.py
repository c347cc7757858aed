"""Settings: one place, every problem at once, and a TOML file that is the whole of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.config import (
    TOKENIZERS,
    Config,
    MachineConfig,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    TrainingConfig,
    flatten,
    read_toml,
    resolve,
    resolve_sampling,
    to_toml,
)
from nanogpt.errors import UserError
from nanogpt.tokenizer import KINDS

SECTIONS = [ModelConfig, TextConfig, TrainingConfig, MachineConfig, SamplingConfig]
counts = st.integers(1, 10**12)
shares = st.floats(0, 0.99)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
words = st.none() | st.text(st.characters(exclude_categories=["Cs"]))

models = st.tuples(st.integers(1, 64), st.integers(1, 64)).flatmap(
    lambda shape: st.builds(ModelConfig, n_layer=counts, n_head=st.just(shape[0]), n_embd=st.just(shape[0] * shape[1]), context_length=counts, dropout=shares)
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
    text=st.builds(TextConfig, tokenizer=st.sampled_from([*KINDS, "a/b.json"]), vocab_size=st.none() | counts, encoding=words, val=words, val_bytes=counts),
    training=trainings,
    machine=st.builds(MachineConfig, threads=st.none() | st.integers(1, 1024)),
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
def test_any_configuration_comes_back_from_its_toml(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    assert resolve(read_toml(path)) == config


@given(configs)
def test_any_configuration_comes_back_from_its_settings(config):
    assert resolve(flatten(config)) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_the_toml_of_the_defaults_is_complete(toml):
    assert toml(to_toml(Config())) == {name: value for name, value in flatten(Config()).items() if value is not None}


def test_the_defaults_are_the_recipe_of_the_seed():
    assert resolve({}) == Config()
    expected = {
        "context_length": 256, "n_embd": 384, "n_head": 6, "n_layer": 6, "dropout": 0.2,
        "batch_size": 32, "learning_rate": 3e-4, "steps": 5000, "tokenizer": "char",
    }  # fmt: skip
    assert {name: flatten(Config())[name] for name in expected} == expected


def test_only_what_somebody_set_is_explicit():
    assert flatten(Config(), explicit=True) == {}
    assert flatten(resolve({"n_layer": 6, "threads": None}), explicit=True) == {"n_layer": 6, "threads": None}


def test_settings_cannot_be_changed_behind_anyones_back():
    with pytest.raises(ValueError, match="frozen"):
        Config().model.n_layer = 7


def test_names_are_unique_across_the_sections():
    names = [name for section in SECTIONS for name in section.model_fields]
    assert len(names) == len(set(names))
    assert not set(names) & set(Config.model_fields)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_help(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "]", ")")), name


def test_the_tokenizers_that_can_be_asked_for_are_those_there_are():
    assert tuple(KINDS) == TOKENIZERS


@pytest.mark.parametrize(("wrong", "right"), [("droput", "dropout"), ("n-layer", "n_layer"), ("lerning_rate", "learning_rate"), ("context", "context_length")])
def test_an_unknown_name_is_answered_with_the_nearest(wrong, right):
    assert problems({wrong: 1}) == [f"There is no setting {wrong!r}. Did you mean {right!r}?"]


def test_an_unknown_name_that_is_like_nothing_is_answered_too():
    assert problems({"zzz": 1}) == ["There is no setting 'zzz'."]


def test_all_problems_are_told_at_once():
    wrong = {"droput": 0.1, "n_layer": 0, "dropout": 1, "seed": -1, "device": "gpu", "steps": "many", "val_bytes": None, "zzz": 1}
    assert problems(wrong) == [
        "There is no setting 'droput'. Did you mean 'dropout'?",
        "There is no setting 'zzz'.",
        "n_layer = 0: input should be greater than or equal to 1.",
        "dropout = 1: input should be less than or equal to 0.99.",
        "val_bytes = None: input should be a valid integer.",
        "steps = 'many': input should be a valid integer, unable to parse string as an integer.",
        "seed = -1: input should be greater than or equal to 0.",
        "device = 'gpu': input should be 'auto', 'cpu', 'cuda' or 'mps'.",
    ]


def test_contradictions_are_told_with_the_other_problems():
    assert len(problems({"n_embd": 100, "dropout": 2})) == 2


@pytest.mark.parametrize(("n_embd", "n_head", "nearest"), [(100, 6, 102), (97, 6, 96), (99, 6, 96), (3, 6, 6), (1, 2, 2), (385, 384, 384)])
def test_a_width_that_the_heads_cannot_share_is_answered_with_the_nearest(n_embd, n_head, nearest):
    told = f"n_embd = {n_embd} cannot be shared among n_head = {n_head} heads. The nearest width is --n-embd {nearest}."
    assert problems({"n_embd": n_embd, "n_head": n_head}) == [told]


@given(st.integers(1, 5000), st.integers(1, 200))
def test_the_width_that_is_advised_can_be_shared_and_none_is_nearer(n_embd, n_head):
    try:
        resolve({"n_embd": n_embd, "n_head": n_head})
    except UserError as error:
        advised = int(str(error).partition("--n-embd ")[2].partition(".")[0])
        assert abs(advised - n_embd) == min(abs(width - n_embd) for width in range(n_head, n_embd + n_head + 1, n_head))
    else:
        assert n_embd % n_head == 0


def test_whole_numbers_are_taken_for_fractions_and_the_other_way_round():
    assert resolve({"dropout": 0}).model.dropout == 0.0
    assert resolve({"steps": 5e3}).training.steps == 5000
    assert problems({"steps": 2.5}) == ["steps = 2.5: input should be a valid integer, got a number with a fractional part."]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "grad_clip", "dropout"])
def test_what_is_not_a_number_is_refused(name):
    assert problems({name: float("nan")})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_infinity_is_refused(name):
    assert problems({name: float("inf")})


def test_a_dropout_that_rounds_to_everything_is_refused():
    assert problems({"dropout": 0.999})


def test_settings_stand_in_their_sections_or_at_the_top(toml):
    expected = {"n_layer": 3, "learning_rate": 0.01}
    assert toml("[model]\nn_layer = 3\n[training]\nlearning_rate = 1e-2\n") == expected
    assert toml("n_layer = 3\nlearning_rate = 1e-2\n") == expected
    assert toml("learning_rate = 1e-2\n[model]\nn_layer = 3\n") == expected
    assert toml("\ufeffn_layer = 3\r\nlearning_rate = 1e-2\r\n") == expected
    assert toml("") == {}


def test_unknown_names_in_a_file_are_found(toml):
    assert problems(toml("[model]\nn_leyer = 3\n[zzz]\nlr = 1\n")) == [
        "There is no setting 'n_leyer'. Did you mean 'n_layer'?",
        "There is no setting 'zzz'.",
    ]


@pytest.mark.parametrize("content", ["model = 3", "[[model]]\nn_layer = 3", "[model.x]\nn_layer = 3"])
def test_a_section_that_is_none_is_refused(toml, content):
    assert problems(toml(content))


def test_a_setting_that_stands_twice_is_refused(toml):
    with pytest.raises(UserError):
        resolve(toml("n_layer = 2\n[model]\nn_layer = 3\n"))


@pytest.mark.parametrize("content", ["n_layer 3", "n_layer = 3\nn_layer = 4", b"val = '\xe9'", "n_layer = "])
def test_what_is_no_toml_is_refused_with_its_path(toml, tmp_path, content):
    with pytest.raises(UserError, match=f"The settings in {tmp_path / 'settings.toml'} cannot be read: ."):
        toml(content)


def test_a_file_that_is_not_there_is_refused_with_its_path(tmp_path):
    for path in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(UserError, match=f"The settings in {path}.* cannot be read: ."):
            read_toml(path)


def test_sampling_has_the_same_manners():
    assert resolve_sampling({}) == SamplingConfig()
    assert resolve_sampling({"top_k": 3, "stop": ["a", "b"]}).stop == ("a", "b")
    with pytest.raises(UserError) as caught:
        resolve_sampling({"temprature": 1, "top_p": 0, "n_layer": 3})
    assert str(caught.value).splitlines()[:-1] == [
        "There is no setting 'temprature'. Did you mean 'temperature'?",
        "There is no setting 'n_layer'.",
        "top_p = 0: input should be greater than 0.",
    ]
