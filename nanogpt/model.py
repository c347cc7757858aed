"""A GPT and its key-value cache; nothing else.

In: token ids. Out: logits. The shape is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.3): learned positions, blocks that normalise before attention and before a four times wider GELU feed-forward, each
added to the residual stream, a last LayerNorm, and a head that shares the embedding's weights.

B batch, T time, C channels (n_embd), H heads, D channels per head, V vocabulary; S times that are attended to.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.config import ModelConfig


class KVCache:
    """Keys and values of the tokens a model has read, so that the next token costs one step instead of a whole window.

    Room for `context_length` tokens in each of `batch` rows is taken at once; `length` of them are filled.
    """

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch, config.n_head, config.context_length, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (layers, B, H, S, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the (B, H, T, D) of new tokens behind the others; give all (B, H, length + T, D) of the layer."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Dropout(nn.Module):
    """Dropout whose mask is a pure function of each row's key, of this place in the network and of the position.

    Bits come from a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixing
    function is Ellis and Wellons' lowbias32), four elements to a hash: the same rows give the same masks on every device, in
    every split of the batch, and there is no generator state to save. `rate` is rounded to 256ths; what stays is scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float, place: int):
        super().__init__()
        self.zeros, self.place = round(rate * 256), place
        self.salt = (place * 0x3C6EF372 + 2**31) % 2**32 - 2**31  # as a signed 32-bit integer

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x (B, ...) and keys (B,) int32; without keys x comes back untouched."""
        if keys is None or self.zeros == 0:
            return x
        size = x[0].numel()
        counter = torch.arange(-(-size // 4), dtype=torch.int32, device=x.device)
        bits = _mix32(_mix32(keys + self.salt)[:, None] + counter)  # (B, size / 4), wrapping at 32 bits
        mask = bits.view(torch.uint8)[:, :size].view(x.shape) < self.zeros
        return x.masked_fill(mask, 0.0) * (256 / (256 - self.zeros))


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D  # the masks make torch's shift, which copies the sign, a logical one
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout, place=3 * layer + 1)

    def forward(self, x: Tensor, keys: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); keys (B,) for dropout; with a cache, the T tokens also attend to what it holds."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, D)
        S = k.shape[2]
        if keys is None or self.dropout.zeros == 0:
            mask = None if T in (1, S) else _causal(T, S, x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)
        else:  # the fused kernels have their own random numbers; dropout on the probabilities needs the probabilities
            scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
            probabilities = scores.masked_fill_(~_causal(T, S, x.device), -math.inf).softmax(dim=3)
            y = self.dropout(probabilities, keys) @ v  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


def _causal(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S) bool: the last T of S tokens each see themselves and what came before."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class FeedForward(nn.Module):
    """Two linear layers around a GELU (its tanh form, as in GPT-2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C), every position for itself."""
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.drop_1 = Dropout(config.dropout, place=3 * layer + 2)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = FeedForward(config)
        self.drop_2 = Dropout(config.dropout, place=3 * layer + 3)

    def forward(self, x: Tensor, keys: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); keys and cache as in `Attention`."""
        x = x + self.drop_1(self.attn(self.ln_1(x), keys, cache), keys)
        return x + self.drop_2(self.mlp(self.ln_2(x)), keys)


class GPT(nn.Module):
    """The whole network. The head is the token embedding's own matrix."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.drop = Dropout(config.dropout, place=0)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """GPT-2's initialisation: standard deviation 0.02, residual projections scaled down by sqrt(2 n_layer), norms and biases at rest."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                narrow = math.sqrt(2 * self.config.n_layer) if name.endswith("proj.weight") else 1.0
                parameter.normal_(0.0, 0.02 / narrow, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)

    def trunk(self, idx: Tensor, keys: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> the stream after the last LayerNorm, (B, T, C). With a cache, idx continues what it holds."""
        start, T = cache.length if cache is not None else 0, idx.shape[1]
        assert start + T <= self.config.context_length, "more tokens than the context holds"
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions), keys)  # (B, T, C)
        for block in self.blocks:
            x = block(x, keys, cache)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def forward(self, idx: Tensor, keys: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V). Dropout acts only where there are keys (B,) int32, one a row (see `data.batch`)."""
        return F.linear(self.trunk(idx, keys, cache), self.wte.weight)

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> logits of the token after the last, (B, V)."""
        return F.linear(self.trunk(idx, cache=cache)[:, -1], self.wte.weight)

    def nats(self, idx: Tensor, targets: Tensor, keys: Tensor | None = None) -> Tensor:
        """The summed cross-entropy, in nats, of targets (B, T) after idx (B, T): a sum, so that parts can be added before dividing."""
        logits = self(idx, keys)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
