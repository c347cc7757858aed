"""The plan's formulas are those of the real network: its parameters, and what its backward pass keeps."""

import pytest
import torch

from nanogpt import checkpoint, plan
from nanogpt.config import PRESETS, ModelConfig, preset_settings, resolve
from nanogpt.errors import UserError
from nanogpt.optim import Optimizer

HERE = plan.Cluster("here", 1e12, 16e9)
SHAPES = [
    {"arch": "classic", "n_layer": 3, "n_head": 4, "n_embd": 32, "context_length": 24},
    {"arch": "modern", "n_layer": 2, "n_head": 4, "n_embd": 48, "context_length": 24},
    {"arch": "modern", "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "context_length": 16},
]


def foresee(settings, vocab_size=65, cluster=HERE, **more):
    config = resolve(settings)
    return plan.plan(config.model, config.training, config.machine, vocab_size, cluster, **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_network(shape):
    config = ModelConfig(**shape)
    assert sum(plan.parameters(config, 65).values()) == sum(p.numel() for p in checkpoint.empty_model(config, 65, "meta").parameters())


@pytest.mark.parametrize(("preset", "count"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_gpt2_has_as_many_parameters_as_was_published_and_twenty_tokens_for_each(preset, count):
    config = resolve(preset_settings(preset))
    assert sum(p.numel() for p in checkpoint.empty_model(config.model, 50257, "meta").parameters()) == count
    assert sum(plan.parameters(config.model, 50257).values()) == count
    assert config.training.steps * config.training.batch_size * 1024 / count == pytest.approx(20, rel=0.06)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_whole(preset):
    config = resolve(preset_settings(preset))
    assert checkpoint.empty_model(config.model, 65, "meta").blocks[config.model.n_layer - 1].attn.head_dim == 64
    assert config.model.context_length == (1024 if "gpt2" in preset else 256)


def test_flops_of_the_seeds_recipe_by_hand():
    """6 for each of the 6 x 12 x 384^2 numbers in the matrices of the blocks and the 65 x 384 of the head, and 12 x 6 x 256 x 384 for attention."""
    assert plan.flops_per_token(ModelConfig(), 65) == 6 * (6 * 12 * 384**2 + 65 * 384) + 12 * 6 * 256 * 384


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_memory_is_what_the_backward_pass_keeps(shape, half, fused, dropout):
    config = resolve(shape | {"n_embd": 192, "context_length": 128, "dropout": dropout, "batch_size": 2, "steps": 1})
    model = checkpoint.empty_model(config.model, 65, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    model.fuse_attention(fused)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # which also keeps its address from being used again
        return tensor

    ids = torch.zeros(2, 128, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model.nats(ids, ids, torch.zeros(2, dtype=torch.int32))
    assert loss.requires_grad
    parts = plan.memory(config.model, config.training, 65, 2, half=half, fused=fused)
    expected = parts["activations"] + parts["logits"] + parts["weights"] - 4 * sum(p.numel() for p in model.parameters())
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(expected, rel=0.2)


def test_time_is_arithmetic_over_speed():
    made = foresee({"steps": 100})
    assert made.step.seconds == pytest.approx(32 * 256 * made.flops_per_token / (plan.SHARE * 1e12))
    assert made.seconds == pytest.approx(100 * made.step.seconds)


def test_minutes_are_turned_into_steps():
    made = foresee({"minutes": 2.0})
    assert made.seconds == pytest.approx(120, abs=made.step.seconds)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizers_memory_is_that_of_its_state(shape, optimizer):
    config = resolve(shape | {"optimizer": optimizer, "steps": 1})
    model = checkpoint.empty_model(config.model, 65, "cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    real = Optimizer(model, config.training, model.matrices())
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model.nats(ids, ids).backward()
    real.step(1.0)
    kept = sum(tensor.nbytes for name, tensor in real.state_tensors().items() if not name.endswith(".step"))
    assert plan.memory(config.model, config.training, 65, 1, half=False, fused=True)["optimizer"] == kept


@pytest.mark.parametrize(("tokens", "advice"), [(10**9, "as good as new text"), (4 * 10**6, "each reading teaches less"), (10**5, "more text")])
def test_how_often_a_text_is_read_is_judged(tokens, advice):
    assert advice in foresee({"steps": 5000}, corpus=plan.corpus_of(tokens, "char", 65)).hints[-1]


def test_an_unknown_gpu_is_answered_with_those_like_it():
    with pytest.raises(UserError, match=r"no GPU 'H10'.* Did you mean h100"):
        plan.cluster_of("H10")


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match=r"32 windows cannot be shared among 3 devices.\n.*--batch-size 33"):
        foresee({"steps": 1}, cluster=plan.cluster_of("h100", 3))


@pytest.mark.parametrize(("number", "text"), [(0.000123456, "0.000123"), (1.5, "1.50"), (123.4, "123"), (98_765.0, "98,800"), (0.0, "0")])
def test_numbers_keep_three_digits(number, text):
    assert plan.rounded(number) == text


def test_checkpointed_activations_leave_one_layer_and_what_goes_into_the_others():
    config = resolve(SHAPES[0] | {"n_layer": 8, "context_length": 128, "dropout": 0.2, "steps": 1})
    deep, one = (config.model.model_copy(update={"n_layer": layers}) for layers in (8, 1))
    how, tokens = {"half": False, "fused": False}, 4 * 128
    checkpointed = config.training.model_copy(update={"checkpoint_activations": True})
    kept = plan.memory(deep, checkpointed, 65, 4, **how)["activations"] - plan.memory(one, config.training, 65, 4, **how)["activations"]
    assert kept == 8 * tokens * 4 * deep.n_embd


def test_a_batch_is_halved_until_it_fits_and_then_activations_are_checkpointed():
    config = resolve({"n_layer": 8, "steps": 1, "batch_size": 24})
    how = {"half": False, "fused": True}

    def needed(rows, checkpoints=False):
        training = config.training.model_copy(update={"checkpoint_activations": checkpoints})
        return 1.2 * sum(plan.memory(config.model, training, 65, rows, **how).values())

    def chosen(room, **given):
        found, _ = plan.fit(config.model, config.training.model_copy(update=given), 65, 24, room, **how)
        return found.micro_batch_size, found.checkpoint_activations

    assert chosen(None) == chosen(needed(24)) == (24, False)
    assert chosen(needed(24) - 1) == chosen(needed(12)) == (12, False)
    assert [chosen(needed(rows)) for rows in (6, 3, 2, 1)] == [(6, False), (3, False), (2, False), (1, False)]
    assert needed(1, True) < needed(1)
    assert chosen(needed(1) - 1) == (next(rows for rows in (24, 12, 6, 3, 2, 1) if needed(rows, True) < needed(1)), True)
    assert chosen(0) == (1, True)
    assert chosen(needed(2), micro_batch_size=6) == (6, True)
    assert chosen(0, micro_batch_size=6, checkpoint_activations=False) == (6, False)
    assert chosen(None, micro_batch_size=99) == (24, False)


def test_long_contexts_take_memory_in_proportion():
    for more in ({"arch": "modern", "dropout": 0.0}, {"arch": "modern", "dropout": 0.0, "window": 100}, {"dropout": 0.2}):
        near, far = (resolve(more | {"context_length": T, "batch_size": 1, "steps": 1}) for T in (8192, 16384))
        sizes = [sum(plan.memory(c.model, c.training, 65, 1, half=False, fused=True).values()) for c in (near, far)]
        fixed = 16 * sum(plan.parameters(far.model, 65).values())
        assert (sizes[1] - fixed) / (sizes[0] - fixed) < 2.1
