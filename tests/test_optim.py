"""The optimiser and its schedule do what the literature says, against direct computations."""

import math

import pytest
import torch

from nanogpt.optim import BETAS, FLOOR, make_optimizer, schedule


def test_the_rate_rises_linearly_and_falls_along_a_cosine_to_a_tenth():
    assert [schedule(p / 100, 0.1) for p in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule(0.55, 0.1) == pytest.approx((1 + FLOOR) / 2)
    assert schedule(1.0, 0.1) == pytest.approx(FLOOR) == 0.1
    falling = [schedule(p / 100, 0.1) for p in range(10, 101)]
    assert falling == sorted(falling, reverse=True)
    assert schedule(0.001, 0.0) == pytest.approx(1.0, abs=1e-4)


def test_an_update_is_adamw_with_decay_on_matrices_alone(make_model):
    model = make_model()
    optimizer = make_optimizer(model, weight_decay=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for name, p in model.named_parameters():  # the first step: both moments are the gradient's, once corrected for their bias
        decayed = before[name] * (1 - 0.1 * 0.5 * (p.dim() >= 2))
        torch.testing.assert_close(p.detach(), decayed - 0.1 * p.grad / (p.grad.abs() + 1e-8), atol=1e-5, rtol=1e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    moments = {name: (optimizer.state[p]["exp_avg"].clone(), optimizer.state[p]["exp_avg_sq"].clone()) for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], moments[name][0] * BETAS[0])
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], moments[name][1] * BETAS[1])


def test_betas_average_over_about_a_hundred_steps():
    assert BETAS == (0.9, 0.99)
    assert math.isclose(1 / (1 - BETAS[1]), 100)
