"""Optimizers and the schedule against direct computations."""

import pytest
import torch

from nanogpt.config import TrainingConfig
from nanogpt.optim import (
    ADAM_BETAS,
    MIN_LR_RATIO,
    MUON_MOMENTUM,
    Optimizer,
    lr_multiplier,
    orthogonalize,
)


def test_lr_multiplier_rises_linearly_and_falls_along_a_cosine_to_a_tenth():
    assert [lr_multiplier(p / 100, 0.1, 0.0) for p in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert lr_multiplier(0.55, 0.1, 0.0) == pytest.approx((1 + MIN_LR_RATIO) / 2)
    assert lr_multiplier(1.0, 0.1, 0.0) == pytest.approx(MIN_LR_RATIO) == 0.1
    falling = [lr_multiplier(p / 100, 0.1, 0.0) for p in range(10, 101)]
    assert falling == sorted(falling, reverse=True)
    assert lr_multiplier(0.001, 0.0, 0.0) == pytest.approx(1.0, abs=1e-4)


def test_lr_multiplier_with_a_cooldown_holds_and_falls_linearly_to_zero():
    progress = (0.05, 0.1, 0.6, 0.8, 1.0)
    multipliers = [lr_multiplier(p, 0.1, 0.4) for p in progress]
    assert multipliers == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert lr_multiplier(1.1, 0.1, 0.4) == 0.0  # a step that ends after the time limit


def fill_gradients(model, seed):
    """Set random gradients, and return copies of them by name."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def clone_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_adamw_step_decays_matrices_only(make_model):
    model = make_model()
    settings = TrainingConfig(weight_decay=0.5, learning_rate=0.2)
    optimizer = Optimizer(model, settings, model.muon_param_splits())
    before = clone_parameters(model)
    gradients = fill_gradients(model, 2)
    optimizer.step(0.5)
    for name, p in model.named_parameters():
        # In the first step both bias-corrected moments are those of the gradient.
        decayed = before[name] * (1 - 0.1 * 0.5 * (p.dim() >= 2))
        expected = decayed - 0.1 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, atol=1e-5, rtol=1e-4)
    moments = {name: value.clone() for name, value in optimizer.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    after = optimizer.state_dict()
    for name in before:
        for key, beta in zip(("exp_avg", "exp_avg_sq"), ADAM_BETAS, strict=True):
            torch.testing.assert_close(after[f"{name}.{key}"], moments[f"{name}.{key}"] * beta)


def test_step_equals_adamw_of_torch_bit_for_bit(make_model):
    model, peer = make_model(arch="qwen3"), make_model(arch="qwen3")
    settings = TrainingConfig(weight_decay=0.5, learning_rate=0.2)
    optimizer = Optimizer(model, settings, {})
    groups = [
        {"params": [p for p in peer.parameters() if p.dim() >= 2], "weight_decay": 0.5},
        {"params": [p for p in peer.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=0.2, betas=ADAM_BETAS, eps=1e-8, fused=True)
    for seed in range(3):
        fill_gradients(model, seed)
        fill_gradients(peer, seed)
        optimizer.step(1.0)
        theirs.step()
    pairs = zip(model.parameters(), peer.parameters(), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in pairs)


def test_zero_grad_drops_all_gradients_and_step_then_changes_nothing(make_model):
    model = make_model()
    optimizer = Optimizer(model, TrainingConfig(), {})
    fill_gradients(model, 2)
    optimizer.step(1.0)
    optimizer.zero_grad()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = clone_parameters(model)
    optimizer.step(1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_second_moment_averages_over_a_hundred_steps(make_model):
    """Constant gradients fill the second moment to 1 - 1/e after 100 steps."""
    model = make_model()
    optimizer = Optimizer(model, TrainingConfig(), {})
    for _ in range(100):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(0.0)
    second_moment = optimizer.state_dict()["wte.weight.exp_avg_sq"]
    expected = torch.full_like(second_moment, 1 - 1 / torch.e)
    torch.testing.assert_close(second_moment, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (2, 16, 48)])
def test_orthogonalize_keeps_singular_vectors_and_sets_singular_values_to_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    # Diagonal if the singular vectors are kept.
    aligned = u.mT @ orthogonalize(x).float() @ vh.mT
    singular_values = aligned.diagonal(dim1=1, dim2=2)
    is_strong = s > 0.02 * s.amax(dim=1, keepdim=True)
    assert singular_values[is_strong].min() > 0.75
    assert singular_values.max() < 1.2
    assert (aligned - torch.diag_embed(singular_values)).abs().max() < 0.1
    scaled = orthogonalize(x * 1e-4).float()
    torch.testing.assert_close(scaled, orthogonalize(x).float(), atol=0.05, rtol=0)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_muon_updates_each_stacked_matrix_separately_and_adamw_the_rest(make_model, arch):
    model = make_model(arch=arch, n_head=4, n_kv_head=2 if arch == "qwen3" else None)
    settings = TrainingConfig(
        optimizer="muon", muon_learning_rate=0.1, learning_rate=0.2, weight_decay=0.5
    )
    splits = model.muon_param_splits()
    parameters = dict(model.named_parameters())
    assert all(sum(rows) == parameters[name].shape[0] for name, rows in splits.items())
    assert set(splits) == {
        name for name, p in parameters.items() if name.startswith("blocks") and p.dim() == 2
    }
    if arch == "qwen3":
        assert splits["blocks.0.attn.qkv_proj.weight"] == [16, 8, 8]
    optimizer = Optimizer(model, settings, splits, torch.float32)
    before = clone_parameters(model)
    gradients = fill_gradients(model, 4)
    optimizer.step(0.5)
    for name, p in parameters.items():
        gradient = gradients[name]
        if name not in splits:
            expected = before[name] * (1 - 0.1 * 0.5 * (p.dim() >= 2)) - 0.1 * gradient.sign()
            torch.testing.assert_close(p.detach(), expected, atol=1e-4, rtol=1e-4)
            continue
        momentum = (1 - MUON_MOMENTUM) * gradient
        nesterov = gradient * (1 - MUON_MOMENTUM) + MUON_MOMENTUM * momentum
        matrices = (tensor.split(splits[name]) for tensor in (before[name], nesterov, p.detach()))
        for old, direction, new in zip(*matrices, strict=True):
            lr = 0.05 * max(1, old.shape[0] / old.shape[1]) ** 0.5
            expected = old * (1 - 0.05 * 0.5) - lr * orthogonalize(direction[None])[0].float()
            torch.testing.assert_close(new, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_load_state_dict_is_bit_exact(make_model, kind):
    settings = TrainingConfig(optimizer=kind)
    model, other = make_model(arch="qwen3"), make_model(arch="qwen3")
    optimizer = Optimizer(model, settings, model.muon_param_splits())
    restored = Optimizer(other, settings, other.muon_param_splits())
    fill_gradients(model, 5)
    optimizer.step(1.0)
    other.load_state_dict(model.state_dict())
    state = {name: value.clone() for name, value in optimizer.state_dict().items()}
    restored.load_state_dict(state)
    for net, its_optimizer in ((model, optimizer), (other, restored)):
        fill_gradients(net, 6)
        its_optimizer.step(0.5)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    with pytest.raises(KeyError):
        restored.load_state_dict({"blocks.9.mlp.up_proj.weight.momentum": torch.zeros(1)})
