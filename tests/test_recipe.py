"""Tests of the recipe: model size grows with time, given settings stay, choices are valid."""

import csv
import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt import checkpoint
from nanogpt.config import ModelConfig, resolve
from nanogpt.device.device import Machine
from nanogpt.plan.model_size import flops_per_token, num_parameters
from nanogpt.training import recipe

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = Machine(torch.device("cpu"), torch.float32, 1)


@pytest.fixture
def set_speed(monkeypatch):
    """Set the speed of the machine in FLOP/s; 1e11 at first."""

    def set_to(flops):
        monkeypatch.setattr(recipe, "seconds_per_token", seconds_per_token_at(flops))

    set_to(1e11)
    return set_to


def seconds_per_token_at(flops):
    return lambda model, vocab_size, machine: flops_per_token(model, vocab_size) / flops


def choose(seconds, train_tokens, user_settings=()):
    return recipe.choose_settings(seconds, train_tokens, 65, CPU, dict(user_settings))


def config_of(choices, user_settings=()):
    return resolve(dict(user_settings) | {choice.name: choice.value for choice in choices})


def model_size(choices, vocab_size=65):
    return sum(num_parameters(config_of(choices).model, vocab_size).values())


def test_more_time_or_a_faster_machine_buys_a_larger_model(set_speed):
    sizes = [model_size(choose(60 * minutes, 10**8)) for minutes in (0.25, 1, 5, 30, 300)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 20 * sizes[0]
    slow = model_size(choose(300, 10**8))
    set_speed(1e14)
    assert model_size(choose(300, 10**8)) > 5 * slow


def test_small_text_limits_epochs_and_model_size(set_speed):
    large, small, tiny = (
        config_of(choose(1800, tokens), {"minutes": 30.0})
        for tokens in (10**9, 2 * 10**5, 5 * 10**4)
    )
    assert large.training.steps is None
    for config, tokens in ((small, 2 * 10**5), (tiny, 5 * 10**4)):
        step_tokens = config.training.batch_size * config.model.context_length
        assert config.training.steps * step_tokens <= (recipe.MAX_EPOCHS + 1) * tokens
        assert sum(num_parameters(config.model, 1).values()) < 20 * tokens


@pytest.mark.parametrize("tokens", [100, 5000, 45_000, 226_000, 900_000])
def test_muon_weight_decay_scales_with_the_epoch_over_many_epochs(set_speed, tokens):
    set_speed(1e13)
    config = config_of(choose(1800, tokens), {"minutes": 30.0})
    training = config.training
    step_tokens = training.batch_size * config.model.context_length
    assert training.steps * step_tokens > recipe.MULTI_EPOCH_THRESHOLD * tokens
    steps_per_epoch = max(recipe.MIN_STEPS_PER_EPOCH, tokens / step_tokens)
    shrinkage = (1 - training.muon_learning_rate * training.weight_decay) ** steps_per_epoch
    # Close to e^-1.4.
    assert 0.2 < shrinkage < 0.27
    assert config.model.dropout == 0


def test_adamw_uses_dropout_over_many_epochs(set_speed):
    set_speed(1e13)
    optimizer = {"optimizer": "adamw"}
    config = config_of(choose(1800, 226_000, optimizer), {"minutes": 30.0} | optimizer)
    assert config.model.dropout == recipe.DROPOUT
    assert config.training.weight_decay == recipe.WEIGHT_DECAY


@pytest.mark.parametrize(("seconds", "tokens"), [(1800, 10**8), (2, 200_000)])
def test_weight_decay_is_the_usual_one_for_few_epochs(set_speed, seconds, tokens):
    training = config_of(choose(seconds, tokens)).training
    assert training.weight_decay == recipe.WEIGHT_DECAY


def test_every_choice_has_a_reason(set_speed):
    choices = choose(300, 10**6)
    assert all(choice.reason for choice in choices)
    assert {choice.name for choice in choices} >= {
        "n_layer",
        "n_embd",
        "batch_size",
        "learning_rate",
        "dropout",
        "weight_decay",
    }


USER_SETTINGS = {
    "arch": st.sampled_from(["gpt2", "qwen3"]),
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


def is_consistent(settings):
    """Return True if `resolve` accepts the settings together."""
    n_kv_head = settings.get("n_kv_head", 1)
    if {"n_head", "n_embd"} <= settings.keys():
        return False
    if "n_kv_head" in settings and settings.get("arch") == "gpt2":
        return False
    return (
        settings.get("n_head", n_kv_head) % n_kv_head == 0
        and settings.get("n_embd", 2 * n_kv_head) % (2 * n_kv_head) == 0
    )


@given(
    st.fixed_dictionaries({}, optional=USER_SETTINGS).filter(is_consistent),
    st.floats(0.01, 1000), st.integers(2, 10**12), st.integers(2, 100_000), st.floats(1e8, 1e16),
)  # fmt: skip
def test_choices_complete_any_settings_and_change_none(
    settings, minutes, tokens, vocab_size, flops
):
    settings = {"minutes": minutes} | settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "seconds_per_token", seconds_per_token_at(flops))
        choices = recipe.choose_settings(60 * minutes, tokens, vocab_size, CPU, settings)
    assert not {choice.name for choice in choices} & settings.keys()
    config = config_of(choices, settings)
    resolved = config.model.model_dump() | config.training.model_dump()
    assert all(resolved[name] == value for name, value in settings.items())


@pytest.mark.parametrize("n_embd", range(2, 700, 2))
def test_num_heads_divides_the_width(n_embd):
    heads = recipe.num_heads_for(n_embd)
    assert n_embd % heads == 0
    assert n_embd // heads % 2 == 0
    assert n_embd // heads >= 32 or heads == 1 or n_embd % 32


def test_seconds_per_token_is_measured_once(machine, monkeypatch):
    model = ModelConfig(arch="qwen3", n_layer=1, n_head=1, n_embd=16, context_length=8)
    first = recipe.seconds_per_token(model, 65, machine)
    assert first > 0
    # A second measurement would call it.
    monkeypatch.setattr(checkpoint, "build_uninitialized", None)
    assert recipe.seconds_per_token(model, 70, machine) == first


def test_scaling_law_is_the_fit_of_the_table():
    """The constants in recipe.py are those that benchmarks/recipe.py fits to its table."""
    sys.path.insert(0, str(BENCHMARKS))
    from recipe import fit

    with (BENCHMARKS / "recipe.csv").open() as file:
        law, _ = fit(list(csv.DictReader(file)))
    names = ("A", "alpha", "B", "beta", "repeat_decay")
    expected = [getattr(recipe.LAW, name) for name in names]
    assert [getattr(law, name) for name in names] == pytest.approx(expected, rel=0.01)


def test_candidate_shapes_grow():
    sizes = [n_layer * n_embd**2 for n_layer, n_embd in recipe.CANDIDATE_SHAPES]
    assert all(small < large for small, large in itertools.pairwise(sizes))
