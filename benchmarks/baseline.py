"""The textbook GPT: what every claim of speed here is measured against, in the same run.

Plain float32 PyTorch as a good tutorial has it: `torch.nn` blocks of the seed's shape (6 layers, 6 heads, 384 wide, context 256, dropout 0.2), AdamW, batch
32, and generation that reads the whole window again for every character. No compiler, no mixed precision, no cache, and the memory
allocator as it comes. As a program it times its own training step and generation (step.py times its step beside nanogpt's):

    python benchmarks/baseline.py [--text shakespeare] [--steps 5] [--threads N]
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from cyclopts import App
from torch import Tensor, nn

from nanogpt.corpus import expand

app = App(help=__doc__)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, n_head: int, n_embd: int, dropout: float):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.feed_forward = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(C, dim=2))
        rate = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate).transpose(1, 2).reshape(B, T, C)
        x = x + self.drop(self.out(y))
        return x + self.feed_forward(self.norm_2(x))


class Textbook(nn.Module):
    """Token and position embeddings, blocks, a LayerNorm, a linear layer onto the vocabulary."""

    def __init__(self, vocab_size: int, n_layer: int = 6, n_head: int = 6, n_embd: int = 384, context_length: int = 256, dropout: float = 0.2):
        super().__init__()
        self.context_length = context_length
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(context_length, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_head, n_embd, dropout) for _ in range(n_layer)))
        self.norm, self.head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> logits (B, T, V)."""
        x = self.dropout(self.tokens(idx) + self.positions(torch.arange(idx.shape[1])))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, idx: Tensor, count: int) -> Tensor:
        """Continue idx (1, T) by `count` tokens, reading the window anew for each."""
        self.eval()
        for _ in range(count):
            logits = self(idx[:, -self.context_length :])[:, -1]
            idx = torch.cat([idx, torch.multinomial(logits.softmax(dim=1), 1)], dim=1)
        return idx


def read(text: str) -> tuple[Tensor, int]:
    """The text as character numbers (N,), and how many different characters it has."""
    content = "".join(chunk for document in expand([text]) for chunk in document.chunks())
    number = {letter: i for i, letter in enumerate(sorted(set(content)))}
    return torch.tensor([number[letter] for letter in content]), len(number)


def train_step(model: Textbook, optimizer: torch.optim.Optimizer, data: Tensor, batch_size: int = 32) -> float:
    """One update on windows from random places; gives the loss."""
    model.train()
    T = model.context_length
    starts = torch.randint(len(data) - T, (batch_size,)).tolist()
    x, y = (torch.stack([data[start + shift : start + shift + T] for start in starts]) for shift in (0, 1))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def seconds(work: Callable[[], object], runs: int, warmup: int = 2) -> list[float]:
    """How long each of `runs` calls takes, after some that do not count."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def spread(times: Iterable[float]) -> str:
    """Median, and the extremes."""
    times = sorted(times)
    return f"{statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})"


def peak_memory() -> float:
    """The most memory this process has had, in MiB; not a number where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@app.default
def main(*, text: str = "shakespeare", steps: int = 5, tokens: int = 64, threads: int | None = None) -> None:
    """Time the textbook loop on the seed's recipe."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(1337)
    data, vocab_size = read(text)
    model = Textbook(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    times = seconds(lambda: train_step(model, optimizer, data), steps)
    print(f"textbook step     {spread(times)}, {32 * 256 / statistics.median(times):,.0f} tokens/s, {torch.get_num_threads()} threads")
    window = data[None, : model.context_length]
    pace = seconds(lambda: model.generate(window, tokens), 3, warmup=1)
    print(f"textbook writes   {tokens / statistics.median(pace):,.1f} tokens/s with a full window")
    print(f"textbook memory   {peak_memory():,.0f} MiB at its peak")


if __name__ == "__main__":
    app()
