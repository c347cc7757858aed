"""A textbook GPT: the baseline of every claim about speed, measured in the same run.

Plain float32 PyTorch, as in a good tutorial: `torch.nn` blocks with the shape of the preset nano
(6 layers, 6 heads, 384 channels, context 256, dropout 0.2), AdamW, batch 32, and generation that
recomputes the full window for every character. No compiler, mixed precision, KV cache or malloc
tuning. Run as a program, it times its own training step and generation:

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

from nanogpt.data.sources import resolve_sources

app = App(help=__doc__)


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention and an MLP."""

    def __init__(self, n_head: int, n_embd: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.dropout = dropout
        self.norm_1 = nn.LayerNorm(n_embd)
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.out = nn.Linear(n_embd, n_embd)
        self.drop = nn.Dropout(dropout)
        self.norm_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd),
            nn.GELU(),
            nn.Linear(4 * n_embd, n_embd),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm_1(x)).split(C, dim=2)  # (B, T, C)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)
        x = x + self.drop(self.out(y))
        return x + self.mlp(self.norm_2(x))


class Textbook(nn.Module):
    """A GPT: token and position embeddings, blocks, a LayerNorm and a linear output layer."""

    def __init__(
        self,
        vocab_size: int,
        n_layer: int = 6,
        n_head: int = 6,
        n_embd: int = 384,
        context_length: int = 256,
        dropout: float = 0.2,
    ):
        super().__init__()
        self.context_length = context_length
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(context_length, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_head, n_embd, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, idx: Tensor) -> Tensor:
        """Compute the logits (B, T, V) of token ids (B, T)."""
        x = self.dropout(self.tokens(idx) + self.positions(torch.arange(idx.shape[1])))
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def generate(self, idx: Tensor, count: int) -> Tensor:
        """Append `count` tokens to idx (1, T), recomputing the window for each."""
        self.eval()
        for _ in range(count):
            logits = self(idx[:, -self.context_length :])[:, -1]
            idx = torch.cat([idx, torch.multinomial(logits.softmax(dim=1), 1)], dim=1)
        return idx


def read(text: str) -> tuple[Tensor, int]:
    """Return a text as character ids (N,), and the number of distinct characters."""
    content = "".join(
        chunk for document in resolve_sources([text]) for chunk in document.iter_text()
    )
    char_ids = {char: i for i, char in enumerate(sorted(set(content)))}
    return torch.tensor([char_ids[char] for char in content]), len(char_ids)


def train_step(
    model: Textbook, optimizer: torch.optim.Optimizer, data: Tensor, batch_size: int = 32
) -> float:
    """Run one training step on random windows; return the loss."""
    model.train()
    T = model.context_length
    starts = torch.randint(len(data) - T, (batch_size,)).tolist()
    x = torch.stack([data[start : start + T] for start in starts])  # (B, T)
    y = torch.stack([data[start + 1 : start + 1 + T] for start in starts])
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def seconds(work: Callable[[], object], runs: int, warmup: int = 2) -> list[float]:
    """Return the seconds of each of `runs` calls, after `warmup` untimed calls."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def spread(times: Iterable[float]) -> str:
    """Format the median and the extremes."""
    times = sorted(times)
    return f"{statistics.median(times):.3f} s ({times[0]:.3f} to {times[-1]:.3f})"


def peak_memory() -> float:
    """Return the peak memory of this process in MiB; nan on Windows."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@app.default
def main(
    *, text: str = "shakespeare", steps: int = 5, tokens: int = 64, threads: int | None = None
) -> None:
    """Time the textbook loop with the preset nano."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(1337)
    data, vocab_size = read(text)
    model = Textbook(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)
    times = seconds(lambda: train_step(model, optimizer, data), steps)
    train_rate = 32 * 256 / statistics.median(times)
    threads_used = torch.get_num_threads()
    print(f"textbook step      {spread(times)}, {train_rate:,.0f} tokens/s, {threads_used} threads")
    window = data[None, : model.context_length]
    decode_times = seconds(lambda: model.generate(window, tokens), 3, warmup=1)
    decode_rate = tokens / statistics.median(decode_times)
    print(f"textbook decoding  {decode_rate:,.1f} tokens/s with a full window")
    print(f"textbook memory    {peak_memory():,.0f} MiB peak")


if __name__ == "__main__":
    app()
