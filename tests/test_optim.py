"""The optimisers and the schedule do what the literature says, against direct computations."""

import math

import pytest
import torch

from nanogpt.config import TrainingConfig
from nanogpt.optim import BETAS, FLOOR, MOMENTUM, Optimizer, orthogonalize, schedule


def test_the_rate_rises_linearly_and_falls_along_a_cosine_to_a_tenth():
    assert [schedule(p / 100, 0.1, 0.0) for p in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(0.55, 0.1, 0.0) == pytest.approx((1 + FLOOR) / 2)
    assert schedule(1.0, 0.1, 0.0) == pytest.approx(FLOOR) == 0.1
    falling = [schedule(p / 100, 0.1, 0.0) for p in range(10, 101)]
    assert falling == sorted(falling, reverse=True)
    assert schedule(0.001, 0.0, 0.0) == pytest.approx(1.0, abs=1e-4)


def test_with_a_cooldown_the_rate_holds_and_falls_linearly_to_zero():
    assert [schedule(p, 0.1, 0.4) for p in (0.05, 0.1, 0.6, 0.8, 1.0)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert schedule(1.1, 0.1, 0.4) == 0.0  # a step that ends after the time


def fill_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_update_is_adamw_with_decay_on_matrices_alone(make_model):
    model = make_model()
    optimizer = Optimizer(model, TrainingConfig(weight_decay=0.5, learning_rate=0.2), model.matrices())
    before, gradients = copies(model), fill_gradients(model, 2)
    optimizer.step(0.5)
    for name, p in model.named_parameters():  # the first step: both moments are the gradient's, once corrected for their bias
        decayed = before[name] * (1 - 0.1 * 0.5 * (p.dim() >= 2))
        torch.testing.assert_close(p.detach(), decayed - 0.1 * gradients[name] / (gradients[name].abs() + 1e-8), atol=1e-5, rtol=1e-4)
        assert p.grad is None
    moments = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.5)
    after = optimizer.state_tensors()
    for name in before:
        torch.testing.assert_close(after[f"{name}.exp_avg"], moments[f"{name}.exp_avg"] * BETAS[0])
        torch.testing.assert_close(after[f"{name}.exp_avg_sq"], moments[f"{name}.exp_avg_sq"] * BETAS[1])


def test_betas_average_over_about_a_hundred_steps():
    assert BETAS == (0.9, 0.99)
    assert math.isclose(1 / (1 - BETAS[1]), 100)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (2, 16, 48)])
def test_orthogonalize_keeps_directions_and_evens_out_their_lengths(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    aligned = u.mT @ orthogonalize(x).float() @ vh.mT  # diagonal where the singular vectors are kept
    lengths = aligned.diagonal(dim1=1, dim2=2)
    strong = s > 0.02 * s.amax(dim=1, keepdim=True)
    assert lengths[strong].min() > 0.75
    assert lengths.max() < 1.2
    assert (aligned - torch.diag_embed(lengths)).abs().max() < 0.1
    torch.testing.assert_close(orthogonalize(x * 1e-4).float(), orthogonalize(x).float(), atol=0.05, rtol=0)


@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_muon_moves_each_matrix_of_the_blocks_by_itself_and_adamw_the_rest(make_model, arch):
    model = make_model(arch=arch, n_head=4, n_kv_head=2 if arch == "modern" else None)
    settings = TrainingConfig(optimizer="muon", matrix_learning_rate=0.1, learning_rate=0.2, weight_decay=0.5)
    rows = model.matrices()
    assert all(sum(rows[name]) == p.shape[0] for name, p in model.named_parameters() if name in rows)
    assert set(rows) == {name for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2}
    if arch == "modern":
        assert rows["blocks.0.attn.qkv.weight"] == [16, 8, 8]
    optimizer = Optimizer(model, settings, rows, torch.float32)
    before, gradients = copies(model), fill_gradients(model, 4)
    optimizer.step(0.5)
    for name, p in model.named_parameters():
        if name not in rows:
            decayed = before[name] * (1 - 0.1 * 0.5 * (p.dim() >= 2))
            torch.testing.assert_close(p.detach(), decayed - 0.1 * gradients[name].sign(), atol=1e-4, rtol=1e-4)
            continue
        nesterov = gradients[name] * (1 - MOMENTUM) + MOMENTUM * (1 - MOMENTUM) * gradients[name]
        parts = zip(before[name].split(rows[name]), nesterov.split(rows[name]), p.detach().split(rows[name]), strict=True)
        for old, direction, new in parts:
            step = 0.05 * max(1, old.shape[0] / old.shape[1]) ** 0.5
            expected = old * (1 - 0.05 * 0.5) - step * orthogonalize(direction[None])[0].float()
            torch.testing.assert_close(new, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_state_goes_on_bit_for_bit(make_model, kind):
    settings = TrainingConfig(optimizer=kind)
    one, other = make_model(arch="modern"), make_model(arch="modern")
    first, second = (Optimizer(model, settings, model.matrices()) for model in (one, other))
    fill_gradients(one, 5)
    first.step(1.0)
    other.load_state_dict(one.state_dict())
    second.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    for model, optimizer in ((one, first), (other, second)):
        fill_gradients(model, 6)
        optimizer.step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(KeyError):
        second.load_state_tensors({"blocks.9.fc.weight.momentum": torch.zeros(1)})
