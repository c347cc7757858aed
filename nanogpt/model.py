"""A GPT and its key-value cache; nothing else.

In: token ids. Out: logits. One network in two shapes:

`classic` is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3): learned positions, LayerNorm
before attention and before a four times wider GELU feed-forward, biases, and a head that is the embedding's own matrix.
`modern` is Qwen3's (Yang et al. 2025, "Qwen3 Technical Report", section 2): rotary positions, RMSNorm, normalised queries and keys,
SwiGLU, no biases, key and value heads that may be shared, a head of its own, and, if asked for, a sliding window.

Memory is linear in the context: fused attention keeps no probabilities, any other attends for so many queries at a time, and so do the logits.

B batch, T time, C channels (n_embd), H query heads, K key and value heads, D channels per head, V vocabulary; S times that are attended to.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanogpt.config import ModelConfig
from nanogpt.sizes import QUERIES, SCORES, swiglu_width

EPSILON = 1e-6  # of RMSNorm, as in Qwen3


class KVCache:
    """Keys and values of the tokens a model has read, so that the next token costs one step instead of a whole window.

    Each row is a text of its own: `lengths` (rows,) says how many of its `context_length` places are taken. The room is reserved at once, and taken as it
    fills. cache[a:b] is some of the rows, in the same memory.
    """

    def __init__(self, k: Tensor, v: Tensor, lengths: np.ndarray):
        self.k, self.v, self.lengths = k, v, lengths  # (layers, B, K, S, D) each, (B,)

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        """Room for so many rows. What a mask hides is multiplied by 0, so it must be a number already."""
        shape = (config.n_layer, rows, config.n_kv_head or config.n_head, config.context_length, config.n_embd // config.n_head)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype), np.zeros(rows, np.int64))

    def __getitem__(self, rows: slice) -> "KVCache":
        return KVCache(self.k[:, rows], self.v[:, rows], self.lengths[rows])

    def take(self, T: int) -> Tensor:
        """Make room for T tokens behind those of each row, one where the rows differ in length; give their positions (B, T), or (1, T) for all rows."""
        self.end, self.level = int(self.lengths.max()) + T, len(set(self.lengths.tolist())) == 1
        assert T == 1 or self.level, "several tokens for rows of unequal lengths"
        assert self.end <= self.k.shape[3], "more tokens than the context holds"
        if self.level:
            positions = torch.arange(self.end - T, self.end, device=self.k.device).unsqueeze(0)
        else:
            positions = torch.from_numpy(self.lengths[:, None].copy()).to(self.k.device)
            self.places = torch.arange(len(positions), device=self.k.device), positions[:, 0]
        self.lengths += T  # in place: these may be some of the rows of a larger cache
        return positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the (B, K, T, D) of new tokens where `take` made room; give those of the layer, (B, K, S, D), up to the last place that any row has taken."""
        kept = self.k[layer], self.v[layer]
        for room, new in zip(kept, (k, v), strict=True):
            if self.level:
                room[:, :, self.end - new.shape[2] : self.end] = new
            else:
                rows, places = self.places
                room[rows, :, places] = new[:, :, 0]
        return kept[0][:, :, : self.end], kept[1][:, :, : self.end]


def dropout(x: Tensor, rate: float, key: Tensor | None) -> Tensor:
    """Zero a share `rate` of x (B, ...) and scale up the rest; key (B,) int32, one a row. Without a key x comes back untouched.

    Bits come from a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixing
    function is Ellis and Wellons' lowbias32): the mask is a pure function of the row's key and the element's place in the row, so the same rows
    give the same masks on every device and in every split of the batch, and there is no generator state to save. `rate` is rounded to 256ths.
    """
    zeros = round(rate * 256)
    if key is None or zeros == 0:
        return x
    counter = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device).view(x.shape[1:])
    bits = _mix32(key.view(-1, *(1,) * counter.dim()) + counter)  # (B, ...), wrapping at 32 bits
    return torch.where((bits & 0xFF) < zeros, 0.0, x * (256 / (256 - zeros))).type_as(x)


def dropout_keys(keys: Tensor, places: int) -> Tensor:
    """keys (B,) int32 -> (places, 3, B): a key for each row in each of the three places where a block drops."""
    number = torch.arange(1, 3 * places + 1, dtype=torch.int32, device=keys.device).view(places, 3, 1)
    return _mix32(keys + _mix32(number))


def _mix32(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D  # the masks make torch's shift, which copies the sign, a logical one
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2).

    In `modern`, queries and keys are normalised and turned by their position, `n_kv_head` heads of keys and values may serve several queries each
    (Ainslie et al. 2023, section 2.2), and with a window each token sees only the last so many (Beltagy et al. 2020, section 3.1).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.modern = layer, config.arch == "modern"
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=not self.modern)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=not self.modern)
        if self.modern:
            self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, EPSILON), nn.RMSNorm(self.head_dim, EPSILON)
        self.dropout = 0.0 if self.modern else config.dropout
        self.window = config.window if config.window is not None and config.window < config.context_length else None
        self.fused = True

    def is_fused(self, key: Tensor | None) -> bool:
        """Whether one kernel does it all. Where probabilities are dropped it cannot: the kernels have their own random numbers."""
        return self.fused and (key is None or not self.dropout)

    def forward(self, x: Tensor, turn: Tensor | None, mask: Tensor | None, key: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `turn` is that of `turns`, for modern; `mask` that of `causal_mask`, None where none is needed; key (B,) for dropout;
        with a cache, the T tokens also attend to what it holds."""
        B, T, C = x.shape
        q, k, v = self.heads(x, turn)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D)
        if T == 1:
            q = q.view(B, self.n_kv_head, -1, self.head_dim)  # queries that share keys go together, like tokens that all see the same: (B, K, H / K, D)
        else:
            k, v = self.share(k), self.share(v)  # (B, H, S, D)
        at_once = T <= QUERIES or self.is_causal(T, k.shape[2], key)
        y = self.attend(q, k, v, mask, key, causal=T > 1) if at_once else self.attend_by_blocks(q, k, v, key)
        return self.proj(y.reshape(B, self.n_head, T, self.head_dim).transpose(1, 2).reshape(B, T, C))

    def heads(self, x: Tensor, turn: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> queries (B, H, T, D), keys and values (B, K, T, D), normalised and turned where the shape is modern."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if turn is not None:
            q, k = (rotate(norm(part.float()), turn).type_as(v) for part, norm in ((q, self.q_norm), (k, self.k_norm)))
        return q, k, v

    def share(self, part: Tensor) -> Tensor:
        """Keys or values (B, K, S, D), each repeated for the queries that it serves: (B, H, S, D)."""
        return part if self.n_kv_head == self.n_head else part.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

    def is_causal(self, T: int, S: int, key: Tensor | None) -> bool:
        """Whether T queries and S keys need no mask: a kernel knows which come before which, or all do."""
        return self.window is None and (T == 1 or (self.is_fused(key) and T == S))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: Tensor | None, causal: bool) -> Tensor:
        """q (B, H, T, D), k and v (B, H, S, D), mask (T, S) or, for each row or all, (B, 1, T, S) -> (B, H, T, D). Without a mask each token sees what came
        before it if `causal`, else all."""
        if self.is_fused(key):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype), is_causal=causal and mask is None)
        return dropout(self.weights(q, k, mask), self.dropout, key) @ v

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """How much of each of S tokens each of T queries takes, (B, H, T, S): rows sum to one."""
        scores = (q * self.head_dim**-0.5) @ k.transpose(2, 3)
        seen = scores if mask is None else scores.float() + mask
        return seen.softmax(dim=3).type_as(scores)

    def attend_by_blocks(self, q: Tensor, k: Tensor, v: Tensor, key: Tensor | None) -> Tensor:
        """The same for many queries, which are the last of the S tokens, some at a time: with all keys, or with a window, with those that one of them can see.

        Masks and probabilities are made again in the backward pass, so that never more than those of a block are there. Blocks are of one size, and nothing
        of them stays but in one tensor: else the allocator of a CPU leaves holes between what stays that are too small for the next block.
        """

        def attend(q: Tensor, k: Tensor, v: Tensor, first: int, key: Tensor | None) -> Tensor:
            positions = torch.arange(first, first + q.shape[2], device=q.device)
            return self.attend(q, k, v, causal_mask(positions, k.shape[2], self.window), key, causal=True)

        y, T, S = torch.empty_like(q), q.shape[2], k.shape[2]
        rows = QUERIES if self.window is not None else max(1, QUERIES**2 // S)
        blocks = range(0, T, rows)
        keys = [None] * len(blocks) if key is None else _mix32(key + torch.arange(len(blocks), dtype=torch.int32, device=key.device).unsqueeze(1)).unbind()
        for begin, own in zip(blocks, keys, strict=True):
            block = q[:, :, begin : begin + rows]  # (B, H, rows, D)
            end = S - T + begin + block.shape[2]
            first, last = (0, S) if self.window is None else (max(0, end - block.shape[2] - self.window + 1), end)
            inputs = block, k[:, :, first:last], v[:, :, first:last], end - block.shape[2] - first, own
            y[:, :, begin : begin + rows] = made_again(attend, *inputs)
        return y


def made_again(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass (Chen et al. 2016, section 3)."""
    if not torch.is_grad_enabled():  # nothing is kept, and PyTorch's function would first import the compiler, which takes a second and 100 MB
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def causal_mask(positions: Tensor, S: int, window: int | None = None) -> Tensor:
    """(..., T, S), to be added to scores: tokens at positions (..., T) each see themselves (0) and what came before, or its last `window` - 1, and
    nothing else (-inf)."""
    back = positions.unsqueeze(-1) - torch.arange(S, device=positions.device)  # (..., T, S)
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, -math.inf)


def turns(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Cosines and sines (2, ..., T, D / 2) by which each position (..., T) turns each pair of channels (Su et al. 2021, section 3.4.2)."""
    pairs = torch.arange(0, head_dim, 2, device=positions.device)
    angles = positions.unsqueeze(-1) * base ** (-pairs / head_dim)  # (..., T, D / 2)
    return torch.stack([angles.cos(), angles.sin()])


def stretched_base(base: float, factor: float, head_dim: int) -> float:
    """The base with which a model of rotary positions can look back `factor` times as far ("NTK-aware", Peng et al. 2023, definition 1).

    The slowest pair of channels turns `factor` times as slowly, and so stays within the angles it has learned; the fastest turns as before.
    """
    return base * factor ** (head_dim / max(1, head_dim - 2))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, H, T, D) with channel i and channel i + D / 2 turned as a pair, which is the order of Llama's and Qwen's weights."""
    a, b = x.chunk(2, dim=3)
    cos, sin = turn[0], turn[1]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=3)


class FeedForward(nn.Module):
    """Two linear layers: in `classic` around a GELU (its tanh form, as in GPT-2), in `modern` around a SwiGLU (Shazeer 2020, section 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.modern = config.arch == "modern"
        hidden = swiglu_width(config.n_embd) if self.modern else 4 * config.n_embd
        self.fc = nn.Linear(config.n_embd, 2 * hidden if self.modern else hidden, bias=not self.modern)  # modern: gate, then value
        self.proj = nn.Linear(hidden, config.n_embd, bias=not self.modern)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C), every position for itself."""
        if self.modern:
            gate, value = self.fc(x).chunk(2, dim=2)
            return self.proj(F.silu(gate) * value)
        return self.proj(gelu(self.fc(x)))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, section 2).

    A compiler gets it with a sigmoid, which costs less: since tanh(u) = 2 sigmoid(2u) - 1, it is the same function.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))  # sqrt(8 / pi), and 0.044715 times it
    return F.gelu(x, approximate="tanh")


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1, self.ln_2 = norm(config), norm(config)
        self.attn, self.mlp = Attention(config, layer), FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, turn: Tensor | None, mask: Tensor | None, keys: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C); keys (3, B); the rest as in `Attention`."""
        on_attention, after_attention, after_mlp = keys if keys is not None else (None, None, None)
        x = x + dropout(self.attn(self.ln_1(x), turn, mask, on_attention, cache), self.dropout, after_attention)
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, after_mlp)


def norm(config: ModelConfig) -> nn.Module:
    """The normalisation of the stream."""
    return nn.RMSNorm(config.n_embd, EPSILON) if config.arch == "modern" else nn.LayerNorm(config.n_embd)


def embedding(rows: int, width: int) -> nn.Embedding:
    """Without numbers in it yet: on the meta device, drawing them would import the compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class GPT(nn.Module):
    """The whole network.

    The `modern` embedding is brought to unit size as it is read, which steadies training and is the same as an embedding whose
    rows have that size: so it is exported.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.checkpoints = False
        self.wte = embedding(vocab_size, config.n_embd)
        if config.arch == "classic":
            self.wpe = embedding(config.context_length, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        if config.arch == "modern":
            self.head = nn.Linear(config.n_embd, vocab_size, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The initial weights: norms and biases at rest, embeddings and matrices random.

        `classic` has GPT-2's: standard deviation 0.02, residual projections scaled down by sqrt(2 n_layer). In `modern`, matrices keep the size of what
        goes through them; residual projections and the head begin at zero, so that each block begins as the identity (Zhang et
        al. 2019, "Fixup", section 3.2).
        """
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter, generator)

    def init_weight(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """The initial values of one of the parameters, which are drawn in their order."""
        into_stream = name.endswith("proj.weight")
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif self.config.arch == "classic":
            parameter.normal_(0.0, 0.02 / (math.sqrt(2 * self.config.n_layer) if into_stream else 1.0), generator=generator)
        elif into_stream or name == "head.weight":
            parameter.zero_()
        else:
            parameter.normal_(0.0, 1.0 if name == "wte.weight" else parameter.shape[1] ** -0.5, generator=generator)

    def matrices(self) -> dict[str, list[int]]:
        """The names of the blocks' matrices, each with the rows of the separate matrices that are stacked in it: queries, keys, values; gate, value."""
        rows = {}
        for name, module in self.blocks.named_modules(prefix="blocks"):
            if isinstance(module, Attention):
                rows[f"{name}.qkv.weight"] = [heads * module.head_dim for heads in (module.n_head, module.n_kv_head, module.n_kv_head)]
            elif isinstance(module, FeedForward):
                rows[f"{name}.fc.weight"] = [module.fc.out_features // (1 + module.modern)] * (1 + module.modern)
            elif name.endswith("proj"):
                rows[f"{name}.weight"] = [self.config.n_embd]
        return rows

    def fuse_attention(self, yes: bool) -> None:
        """Whether attention is one fused kernel, or a softmax between two products, which can be faster on a CPU; the function is the same."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = yes

    def checkpoint_activations(self, yes: bool) -> None:
        """Whether a training step keeps only what goes into each block, and computes the rest again in the backward pass (Chen et al. 2016, section 3);
        the function is the same, and so are its gradients."""
        self.checkpoints = yes

    def trunk(self, idx: Tensor, keys: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> the stream after the last normalisation, (B, T, C). With a cache, idx continues what it holds."""
        T, attn = idx.shape[1], cast(Attention, self.blocks[0].attn)  # all are alike
        assert cache is not None or self.config.context_length >= T, "more tokens than the context holds"
        positions = torch.arange(T, device=idx.device).unsqueeze(0) if cache is None else cache.take(T)  # (B, T), or (1, T) for all rows
        S = T if cache is None else cache.end
        is_causal = len(positions) == 1 and attn.is_causal(T, S, keys)
        mask = causal_mask(positions, S, attn.window).unsqueeze(1) if T <= QUERIES and not is_causal else None  # (B or 1, 1, T, S)
        on_embedding, *places = [None] * (len(self.blocks) + 1) if keys is None else dropout_keys(keys, len(self.blocks) + 1)  # of (3, B) each
        x, turn = self.wte(idx), None  # (B, T, C)
        if self.config.arch == "classic":
            x = dropout(x + self.wpe(positions), self.config.dropout, None if on_embedding is None else on_embedding[0])
        else:
            x, turn = F.rms_norm(x, x.shape[2:], eps=EPSILON), turns(positions.unsqueeze(1), self.config.n_embd // self.config.n_head, self.config.rope_base)
        for block, place in zip(self.blocks, places, strict=True):
            inputs = x, turn, mask, place, cache
            x = made_again(block, *inputs) if self.checkpoints else block(*inputs)
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """The stream x (..., C) -> logits (..., V)."""
        return F.linear(x, self.wte.weight if self.config.arch == "classic" else self.head.weight)

    def forward(self, idx: Tensor, keys: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V). Dropout acts only where there are keys (B,) int32, one a row (see `data.batch`)."""
        return self.logits(self.trunk(idx, keys, cache))

    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """idx (B, T) -> logits of the token after the last, (B, V)."""
        return self.logits(self.trunk(idx, cache=cache)[:, -1])

    def nats(self, idx: Tensor, targets: Tensor, keys: Tensor | None = None) -> Tensor:
        """The summed cross-entropy, in nats, of targets (B, T), -100 for none, after idx (B, T): a sum, so that parts can be added before dividing."""
        return torch.stack(self._cross_entropies(self.trunk(idx, keys), targets, "sum")).sum()

    def nats_of_each(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy, in nats, of each of the targets (B, T) after idx (B, T): (B, T) float32."""
        return torch.cat(self._cross_entropies(self.trunk(idx), targets, "none")).view(targets.shape)

    def _cross_entropies(self, x: Tensor, targets: Tensor, reduction: str) -> list[Tensor]:
        """Those of the stream x (B, T, C), in pieces: where the logits are many, only some at a time are there, and again in the backward pass."""

        def of(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.logits(x).float(), targets, reduction=reduction)  # () or (N,)

        x, targets, rows = x.flatten(0, 1), targets.flatten(), max(1, SCORES // self.vocab_size)  # (N, C), (N,)
        if len(x) <= rows:
            return [of(x, targets)]
        pieces = zip(x.split(rows), targets.split(rows), strict=True)
        return [made_again(of, *piece) for piece in pieces]
