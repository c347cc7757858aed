"""The recipe: more time buys a bigger model, what was given stays, and whatever it chooses is a valid configuration."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import machine, recipe
from nanogpt.config import resolve
from nanogpt.plan import parameters


@pytest.fixture
def speed(monkeypatch):
    """A machine as fast as the test says."""

    def set_to(flops):
        monkeypatch.setattr(recipe, "training_speed", lambda place: flops)

    set_to(1e11)
    return set_to


def config(choices, given=()):
    return resolve(dict(given) | {choice.name: choice.value for choice in choices})


def size(choices, vocab_size=65):
    return sum(parameters(config(choices).model, vocab_size).values())


def test_more_time_or_a_faster_machine_buys_a_bigger_model(place, speed):
    sizes = [size(recipe.choose(minutes, 10**8, 65, place, {})) for minutes in (0.25, 1, 5, 30, 300)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 20 * sizes[0]
    slow = size(recipe.choose(5, 10**8, 65, place, {}))
    speed(1e14)
    assert size(recipe.choose(5, 10**8, 65, place, {})) > 5 * slow


def test_a_small_text_gets_more_dropout(place, speed):
    rates = [config(recipe.choose(30, tokens, 65, place, {})).model.dropout for tokens in (10**9, 10**6, 5 * 10**4)]
    assert rates == sorted(rates)
    assert rates[0] == 0 < rates[-1]


def test_every_choice_has_a_reason(place, speed):
    choices = recipe.choose(5, 10**6, 65, place, {})
    assert all(choice.reason for choice in choices)
    assert {choice.name for choice in choices} >= {"n_layer", "n_embd", "batch_size", "learning_rate", "dropout", "weight_decay"}


GIVEN = {
    "arch": st.sampled_from(["classic", "modern"]),
    "n_layer": st.integers(1, 30),
    "n_head": st.integers(1, 24),
    "n_embd": st.integers(1, 300).map(lambda n: 2 * n),
    "context_length": st.integers(1, 2000),
    "batch_size": st.integers(1, 64),
    "optimizer": st.sampled_from(["adamw", "muon"]),
    "dropout": st.floats(0, 0.5),
    "learning_rate": st.floats(1e-5, 1e-2),
}


@given(
    st.fixed_dictionaries({}, optional=GIVEN).filter(lambda chosen: not {"n_head", "n_embd"} <= chosen.keys()),
    st.floats(0.01, 1000), st.integers(2, 10**12), st.integers(2, 100_000), st.floats(1e8, 1e16),
)  # fmt: skip
def test_it_completes_any_settings_and_changes_none(given, minutes, tokens, vocab_size, flops):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "training_speed", lambda place: flops)
        given = {"minutes": minutes} | given
        choices = recipe.choose(minutes, tokens, vocab_size, PLACE, given)
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


def test_speed_is_measured_once(place, monkeypatch):
    first = recipe.training_speed(place)
    assert first > 0
    monkeypatch.setattr(recipe.checkpoint, "empty_model", None)  # it would be called to measure again
    assert recipe.training_speed(place) == first


def test_shapes_grow():
    sizes = [n_layer * n_embd**2 for n_layer, n_embd in recipe.SHAPES]
    assert all(small < large for small, large in itertools.pairwise(sizes))
