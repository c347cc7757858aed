"""The textbook loop that speed is measured against works as a textbook says."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from baseline import Textbook, read, spread, train_step


def test_it_has_the_seed_s_shape_learns_and_generates(story):
    torch.manual_seed(0)
    data, vocab_size = read(str(story))
    assert sum(p.numel() for p in Textbook(65).parameters()) == 10_795_841
    model = Textbook(vocab_size, n_layer=2, n_head=2, n_embd=32, context_length=16, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_step(model, optimizer, data, batch_size=8) for _ in range(40)]
    assert losses[-1] < losses[0] - 0.8
    assert model.generate(data[None, :3], 20).shape == (1, 23)
    assert spread([1.0, 3.0, 2.0]) == "2.000 s (1.000 to 3.000)"
