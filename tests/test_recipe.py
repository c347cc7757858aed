"""The recipe: more time buys a bigger model, what was given stays, and whatever it chooses is a valid configuration."""

import csv
import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import machine, recipe
from nanogpt.config import ModelConfig, resolve
from nanogpt.plan import flops_per_token, parameters

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    """A machine as fast as the test says."""

    def set_to(flops):
        monkeypatch.setattr(recipe, "token_seconds", tokens_at(flops))

    set_to(1e11)
    return set_to


def tokens_at(flops):
    return lambda model, vocab_size, place: flops_per_token(model, vocab_size) / flops


def config(choices, given=()):
    return resolve(dict(given) | {choice.name: choice.value for choice in choices})


def size(choices, vocab_size=65):
    return sum(parameters(config(choices).model, vocab_size).values())


def test_more_time_or_a_faster_machine_buys_a_bigger_model(place, speed):
    sizes = [size(recipe.choose(60 * minutes, 10**8, 65, place, {})) for minutes in (0.25, 1, 5, 30, 300)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 20 * sizes[0]
    slow = size(recipe.choose(300, 10**8, 65, place, {}))
    speed(1e14)
    assert size(recipe.choose(300, 10**8, 65, place, {})) > 5 * slow


def test_a_small_text_is_not_read_too_often_nor_by_too_large_a_model(place, speed):
    large, small, tiny = (config([*recipe.choose(1800, tokens, 65, place, {})], {"minutes": 30.0}) for tokens in (10**9, 2 * 10**5, 5 * 10**4))
    assert large.training.steps is None
    for found, tokens in ((small, 2 * 10**5), (tiny, 5 * 10**4)):
        assert found.training.steps * found.training.batch_size * found.model.context_length <= (recipe.MOST_EPOCHS + 1) * tokens
        assert sum(parameters(found.model, 1).values()) < 20 * tokens


@pytest.mark.parametrize("tokens", [100, 5000, 45_000, 226_000, 900_000])
def test_what_is_read_often_is_forgotten_within_a_reading(place, speed, tokens):
    speed(1e13)
    found = config(recipe.choose(1800, tokens, 65, place, {}), {"minutes": 30.0})
    settings, step = found.training, found.training.batch_size * found.model.context_length
    assert settings.steps * step > recipe.OFTEN * tokens
    kept = (1 - settings.matrix_learning_rate * settings.weight_decay) ** max(recipe.FEWEST_STEPS, tokens / step)
    assert 0.2 < kept < 0.27  # e^-1.4, nearly
    assert found.model.dropout == 0


def test_for_adamw_what_is_read_often_gets_dropout_instead(place, speed):
    speed(1e13)
    found = config(recipe.choose(1800, 226_000, 65, place, {"optimizer": "adamw"}), {"minutes": 30.0, "optimizer": "adamw"})
    assert (found.model.dropout, found.training.weight_decay) == (recipe.DROPOUT, recipe.DECAY)


@pytest.mark.parametrize(("seconds", "tokens"), [(1800, 10**8), (2, 200_000)])
def test_what_is_seldom_read_is_kept(place, speed, seconds, tokens):
    assert config(recipe.choose(seconds, tokens, 65, place, {})).training.weight_decay == recipe.DECAY


def test_every_choice_has_a_reason(place, speed):
    choices = recipe.choose(300, 10**6, 65, place, {})
    assert all(choice.reason for choice in choices)
    assert {choice.name for choice in choices} >= {"n_layer", "n_embd", "batch_size", "learning_rate", "dropout", "weight_decay"}


GIVEN = {
    "arch": st.sampled_from(["classic", "modern"]),
    "n_layer": st.integers(1, 30),
    "n_head": st.integers(1, 24),
    "n_kv_head": st.integers(1, 4),
    "n_embd": st.integers(1, 300).map(lambda n: 2 * n),
    "context_length": st.integers(1, 2000),
    "batch_size": st.integers(1, 64),
    "optimizer": st.sampled_from(["adamw", "muon"]),
    "dropout": st.floats(0, 0.5),
    "learning_rate": st.floats(1e-5, 1e-2),
}


def possible(given):
    """Whether the settings can go together; the rest is for `resolve` to refuse."""
    shared = given.get("n_kv_head", 1)
    if {"n_head", "n_embd"} <= given.keys() or ("n_kv_head" in given and given.get("arch") == "classic"):
        return False
    return given.get("n_head", shared) % shared == 0 and given.get("n_embd", 2 * shared) % (2 * shared) == 0


@given(
    st.fixed_dictionaries({}, optional=GIVEN).filter(possible),
    st.floats(0.01, 1000), st.integers(2, 10**12), st.integers(2, 100_000), st.floats(1e8, 1e16),
)  # fmt: skip
def test_it_completes_any_settings_and_changes_none(given, minutes, tokens, vocab_size, flops):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "token_seconds", tokens_at(flops))
        given = {"minutes": minutes} | given
        choices = recipe.choose(60 * minutes, tokens, vocab_size, PLACE, given)
    assert not {choice.name for choice in choices} & given.keys()
    settled = config(choices, given)
    settings = settled.model.model_dump() | settled.training.model_dump()
    assert all(settings[name] == value for name, value in given.items())


PLACE = machine.Machine(torch.device("cpu"), torch.float32, 1)


@pytest.mark.parametrize("n_embd", range(2, 700, 2))
def test_heads_share_the_width(n_embd):
    heads = recipe.heads_for(n_embd)
    assert n_embd % heads == 0
    assert n_embd // heads % 2 == 0
    assert n_embd // heads >= 32 or heads == 1 or n_embd % 32


def test_a_shape_is_timed_once(place, monkeypatch):
    model = ModelConfig(arch="modern", n_layer=1, n_head=1, n_embd=16, context_length=8)
    first = recipe.token_seconds(model, 65, place)
    assert first > 0
    monkeypatch.setattr(recipe.checkpoint, "empty_model", None)  # it would be called to measure again
    assert recipe.token_seconds(model, 70, place) == first


def test_the_law_is_the_one_that_fits_the_table():
    """The constants in recipe.py are those that benchmarks/recipe.py finds in its table."""
    sys.path.insert(0, str(BENCHMARKS))
    from recipe import fit

    with (BENCHMARKS / "recipe.csv").open() as file:
        law = fit(list(csv.DictReader(file)))
    assert [law[name] for name in ("A", "a", "B", "b", "R")] == pytest.approx([recipe.A, recipe.a, recipe.B, recipe.b, recipe.REREADING], rel=0.01)


def test_shapes_grow():
    sizes = [n_layer * n_embd**2 for n_layer, n_embd in recipe.SHAPES]
    assert all(small < large for small, large in itertools.pairwise(sizes))
