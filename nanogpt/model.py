"""The GPT model and its key-value cache, in two architectures.

`gpt2` is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
section 2.3): learned positions, LayerNorm, GELU, biases, and tied embeddings.
`qwen3` is Qwen3 (Yang et al. 2025, "Qwen3 Technical Report", section 2): rotary positions,
RMSNorm, QK-norm, SwiGLU, no biases, and grouped-query attention.

Memory is linear in the context length: SDPA stores no attention matrix; attention with a mask and
the loss are computed in chunks.

Shapes: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D channels per
head, V vocabulary. S is the number of tokens that attention reads, cached ones included.
"""

import math
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt import ops
from nanogpt.config import ATTN_CHUNK_SIZE, MAX_LOGITS_PER_CHUNK, ModelConfig

RMS_NORM_EPS = 1e-6  # as in Qwen3


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the normalization of the residual stream."""
    if config.arch == "qwen3":
        return nn.RMSNorm(config.n_embd, RMS_NORM_EPS)
    return nn.LayerNorm(config.n_embd)


def rms_normalize(x: Tensor) -> Tensor:
    """Scale the last dimension of x to an RMS of 1."""
    return F.rms_norm(x, x.shape[-1:], eps=RMS_NORM_EPS)


def uninitialized_embedding(num_rows: int, width: int) -> nn.Embedding:
    """Return an embedding whose weight `init_weights` or a model file fills in.

    The constructor of `nn.Embedding` draws initial values. On the "meta" device, where models are
    built before their weights are read, that would also import PyTorch's compiler, which takes a
    second.
    """
    return nn.Embedding.from_pretrained(torch.empty(num_rows, width), freeze=False)


def gelu(x: Tensor) -> Tensor:
    """Apply the GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), as GPT-2 does."""
    if torch.compiler.is_compiling():
        # Compiled, the sigmoid form costs less: 0.5 x (1 + tanh(u)) = x sigmoid(2u), and the
        # factors of 2u are sqrt(8 / pi) and 0.044715 sqrt(8 / pi).
        return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    return F.gelu(x, approximate="tanh")


def rope_cos_sin(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Return the cosines and sines of rotary positions (Su et al. 2021, section 3.4.2).

    Args:
        positions: The position of each token, (..., T).
        head_dim: The number of channels per head, D.
        theta: The base of the frequencies.

    Returns:
        Cosines and sines, stacked: (2, ..., T, D / 2).
    """
    channels = torch.arange(0, head_dim, 2, device=positions.device)
    inv_freq = theta ** (-channels / head_dim)  # (D / 2,)
    angles = positions.unsqueeze(-1) * inv_freq  # (..., T, D / 2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary_emb(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D / 2) of x (B, H, T, D), as Qwen3 orders them.

    `cos_sin` is (2, 1 or B, 1, T, D / 2), the same for all heads.
    """
    cos, sin = cos_sin[0], cos_sin[1]
    x1, x2 = x.chunk(2, dim=3)  # (B, H, T, D / 2)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=3)


def ntk_scaled_rope_theta(theta: float, factor: float, head_dim: int) -> float:
    """Return the RoPE base that stretches the context by `factor`.

    This is "NTK-aware" scaling (Peng et al. 2023, definition 1). The slowest channel pair rotates
    `factor` times as slowly, so that its angles stay in the trained range. The fastest pair keeps
    its speed.
    """
    return theta * factor ** (head_dim / max(1, head_dim - 2))


class KVCache:
    """The keys and values of the tokens processed so far, for one sequence per row.

    Slices such as `cache[2:4]` are caches of some rows, in the same memory.
    """

    def __init__(self, k: Tensor, v: Tensor, lengths: np.ndarray):
        self.k = k  # (n_layer, B, K, context_length, D)
        self.v = v
        self.lengths = lengths  # (B,), the number of tokens in each row
        # `advance` sets these for the `update` calls of one forward pass.
        self.seq_len = 0  # S: the length of the longest row, new tokens included
        # Row and position of each new token, (B,) each; None if all rows have equal lengths.
        self.scatter_index: tuple[Tensor, Tensor] | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Return a cache without tokens, of `rows` rows of `context_length` tokens each."""
        head_shape = (config.num_kv_heads, config.context_length, config.head_size)
        shape = (config.n_layer, rows, *head_shape)
        # Zeros, not empty memory: a masked position is multiplied by 0, and 0 * NaN is NaN.
        k = torch.zeros(shape, device=device, dtype=dtype)
        v = torch.zeros(shape, device=device, dtype=dtype)
        return cls(k, v, np.zeros(rows, np.int64))

    def __getitem__(self, rows: slice) -> "KVCache":
        return KVCache(self.k[:, rows], self.v[:, rows], self.lengths[rows])

    def advance(self, T: int) -> Tensor:
        """Count T new tokens in every row; T must be 1 if the rows differ in length.

        Returns:
            The positions of the new tokens, (B, T), or (1, T) if they are equal in all rows.
        """
        is_aligned = len(set(self.lengths.tolist())) == 1
        self.seq_len = int(self.lengths.max()) + T
        assert T == 1 or is_aligned, "several tokens for rows of unequal lengths"
        assert self.seq_len <= self.k.shape[3], "more tokens than the context holds"
        device = self.k.device
        if is_aligned:
            self.scatter_index = None
            positions = torch.arange(self.seq_len - T, self.seq_len, device=device).unsqueeze(0)
        else:
            # A copy, because from_numpy shares memory and `lengths` changes below.
            positions = torch.from_numpy(self.lengths[:, None].copy()).to(device)
            self.scatter_index = (torch.arange(len(positions), device=device), positions[:, 0])
        self.lengths += T  # in place: this may be a slice of a larger cache
        return positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens of a layer, (B, K, T, D) each.

        Returns:
            The layer's keys and values of all tokens, (B, K, S, D) each.
        """
        for cached, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.scatter_index is None:
                cached[:, :, self.seq_len - new.shape[2] : self.seq_len] = new
            else:
                rows, positions = self.scatter_index  # (B,) each
                cached[rows, :, positions] = new[:, :, 0]  # (B, K, D)
        return self.k[layer, :, :, : self.seq_len], self.v[layer, :, :, : self.seq_len]


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2).

    In `qwen3`, queries and keys are normalized and rotated. Query heads may share key and value
    heads (GQA, Ainslie et al. 2023, section 2.2). With a sliding window, each token attends to the
    last `window` tokens only, itself included (Beltagy et al. 2020, section 3.1).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.n_kv_head = config.num_kv_heads
        self.head_dim = config.head_size
        self.window = config.attention_window
        self.is_qwen3 = config.arch == "qwen3"
        # Dropout of the attention probabilities. `qwen3` drops only the outputs of attention and
        # MLP, so that SDPA can be used in training.
        self.attn_dropout = 0.0 if self.is_qwen3 else config.dropout
        self.attn_implementation = "sdpa"
        num_qkv_heads = self.n_head + 2 * self.n_kv_head
        has_bias = not self.is_qwen3
        self.qkv_proj = nn.Linear(config.n_embd, num_qkv_heads * self.head_dim, bias=has_bias)
        self.o_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=has_bias)
        if self.is_qwen3:
            self.q_norm = nn.RMSNorm(self.head_dim, RMS_NORM_EPS)
            self.k_norm = nn.RMSNorm(self.head_dim, RMS_NORM_EPS)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor | None,
        mask: Tensor | None,
        dropout_seeds: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attend from each token to itself and the tokens before it.

        Args:
            x: The normalized residual stream, (B, T, C).
            cos_sin: The result of `rope_cos_sin`, for `qwen3`.
            mask: The mask of `ops.causal_mask`, (1 or B, 1, T, S). None if neither `needs_mask`
                nor rows of unequal lengths ask for one, and if T is above ATTN_CHUNK_SIZE: then
                `ops.chunked_attention` makes the masks.
            dropout_seeds: Seeds of the dropout of attention probabilities, (B,), or None.
            cache: A cache to extend by these tokens and to attend to, or None.

        Returns:
            The attention output, (B, T, C).
        """
        B, T, _ = x.shape
        q, k, v = self.project_qkv(x, cos_sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        if T == 1:
            # One query per head: put the query heads that share keys into the time dimension, so
            # that the keys and values need not be repeated.
            q = q.view(B, self.n_kv_head, -1, self.head_dim)  # (B, K, H / K, D)
            y = self.attend(q, k, v, mask, dropout_seeds, is_causal=False)
        else:
            k = self.repeat_kv(k)  # (B, H, S, D)
            v = self.repeat_kv(v)
            if T <= ATTN_CHUNK_SIZE or not self.needs_mask(T, k.shape[2], dropout_seeds):
                y = self.attend(q, k, v, mask, dropout_seeds)  # (B, H, T, D)
            else:
                y = ops.chunked_attention(
                    self.attend, (q, k, v), self.window, ATTN_CHUNK_SIZE, dropout_seeds
                )
        y = y.reshape(B, self.n_head, T, self.head_dim)  # undoes the view of T == 1
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_proj(y)

    def project_qkv(self, x: Tensor, cos_sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, T, C) to queries (B, H, T, D), keys and values (B, K, T, D).

        In `qwen3`, also normalize and rotate queries and keys.
        """
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2K, D)
        qkv = qkv.transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = qkv.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if cos_sin is not None:
            q = apply_rotary_emb(self.q_norm(q.float()), cos_sin).type_as(v)
            k = apply_rotary_emb(self.k_norm(k.float()), cos_sin).type_as(v)
        return q, k, v

    def repeat_kv(self, x: Tensor) -> Tensor:
        """Repeat keys or values (B, K, S, D) for the query heads that share them: (B, H, S, D)."""
        if self.n_kv_head == self.n_head:
            return x
        return x.repeat_interleave(self.n_head // self.n_kv_head, dim=1)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dropout_seeds: Tensor | None,
        is_causal: bool = True,
    ) -> Tensor:
        """Return softmax(q k^T / sqrt(D) + mask) v, in the shape of q.

        `is_causal` has an effect only in SDPA without a mask; eager attention ignores it.
        """
        if self.uses_sdpa(dropout_seeds):
            attn_mask = None if mask is None else mask.to(q.dtype)
            is_causal = is_causal and mask is None
            return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)
        probs = ops.attention_probs(q, k, mask)  # (B, H, T, S)
        return ops.dropout(probs, self.attn_dropout, dropout_seeds) @ v

    def uses_sdpa(self, dropout_seeds: Tensor | None) -> bool:
        """Return whether SDPA runs: its kernels cannot apply seeded dropout."""
        drops_probs = dropout_seeds is not None and self.attn_dropout > 0
        return self.attn_implementation == "sdpa" and not drops_probs

    def needs_mask(self, T: int, S: int, dropout_seeds: Tensor | None) -> bool:
        """Return whether attention from T queries to S keys needs an explicit mask.

        One query attends to every key of its row, and SDPA masks by itself for T == S. Rows of
        unequal lengths also need a mask, see `GPT.forward_hidden`.
        """
        if self.window is not None:
            return True
        return T > 1 and not (T == S and self.uses_sdpa(dropout_seeds))


class MLP(nn.Module):
    """The feed-forward network: a GELU in `gpt2`, a SwiGLU (Shazeer 2020, section 2) in `qwen3`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.is_qwen3 = config.arch == "qwen3"
        hidden = config.intermediate_size
        # In `qwen3` the gate and the up projection are stacked, in this order.
        up_features = 2 * hidden if self.is_qwen3 else hidden
        self.up_proj = nn.Linear(config.n_embd, up_features, bias=not self.is_qwen3)
        self.down_proj = nn.Linear(hidden, config.n_embd, bias=not self.is_qwen3)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x (B, T, C) separately."""
        x = self.up_proj(x)  # (B, T, hidden), or (B, T, 2 * hidden)
        if self.is_qwen3:
            gate, up = x.chunk(2, dim=2)  # (B, T, hidden)
            x = F.silu(gate) * up
        else:
            x = gelu(x)
        return self.down_proj(x)


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.ln_2 = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor | None,
        mask: Tensor | None,
        dropout_seeds: Tensor | tuple[None, None, None],
        cache: KVCache | None,
    ) -> Tensor:
        """Transform x (B, T, C); arguments as in `Attention.forward`.

        `dropout_seeds` is (3, B), or None three times.
        """
        attn_seed, resid_seed, mlp_seed = dropout_seeds
        attn_out = self.attn(self.ln_1(x), cos_sin, mask, attn_seed, cache)
        x = x + ops.dropout(attn_out, self.dropout, resid_seed)
        mlp_out = self.mlp(self.ln_2(x))
        return x + ops.dropout(mlp_out, self.dropout, mlp_seed)


class GPT(nn.Module):
    """A decoder-only transformer.

    In training, a `qwen3` model RMS-normalizes its token embeddings. Qwen3 does not; the
    normalization stabilizes training. Saving replaces the table with its normalized rows, which is
    equivalent, so that a model file is plain Qwen3. A model loaded from it has
    `normalize_embedding` False.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.is_qwen3 = config.arch == "qwen3"
        self.normalize_embedding = self.is_qwen3
        self.activation_checkpointing = False
        self.wte = uninitialized_embedding(vocab_size, config.n_embd)
        if not self.is_qwen3:
            self.wpe = uninitialized_embedding(config.context_length, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        if not config.has_tied_embeddings:
            self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)

    def forward(
        self, idx: Tensor, dropout_seeds: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the logits (B, T, V) of the token after each token of idx (B, T).

        Args:
            idx: Token ids, (B, T). With a cache they continue its sequences.
            dropout_seeds: One seed per row, (B,) int32. Without seeds there is no dropout; train()
                and eval() have no effect.
            cache: The key-value cache to read and extend, or None.
        """
        return self.compute_logits(self.forward_hidden(idx, dropout_seeds, cache))

    def forward_hidden(
        self, idx: Tensor, dropout_seeds: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the final hidden states (B, T, C); arguments as in `forward`."""
        T = idx.shape[1]
        if cache is None:
            assert self.config.context_length >= T, "more tokens than the context holds"
            S = T
            positions = torch.arange(T, device=idx.device).unsqueeze(0)  # (1, T)
        else:
            positions = cache.advance(T)  # (B, T), or (1, T)
            S = cache.seq_len

        attn = cast(Attention, self.blocks[0].attn)  # All blocks need the same mask.
        has_ragged_rows = len(positions) > 1  # rows of unequal lengths, see KVCache.advance
        mask = None
        if T <= ATTN_CHUNK_SIZE and (has_ragged_rows or attn.needs_mask(T, S, dropout_seeds)):
            mask = ops.causal_mask(positions, S, attn.window).unsqueeze(1)  # (B or 1, 1, T, S)

        # Three seeds per block and three for the embedding; `gpt2` uses one of the latter.
        num_groups = len(self.blocks) + 1
        seeds: Tensor | list[tuple[None, None, None]] = [(None, None, None)] * num_groups
        if dropout_seeds is not None:
            seeds = ops.split_dropout_seeds(dropout_seeds, num_groups)  # (num_groups, 3, B)

        x = self.wte(idx)  # (B, T, C)
        cos_sin = None
        if self.is_qwen3:
            if self.normalize_embedding:
                x = rms_normalize(x)
            c = self.config
            cos_sin = rope_cos_sin(positions.unsqueeze(1), c.head_size, c.rope_theta)
        else:
            x = ops.dropout(x + self.wpe(positions), self.config.dropout, seeds[0][0])

        for block, block_seeds in zip(self.blocks, seeds[1:], strict=True):
            inputs = (x, cos_sin, mask, block_seeds, cache)
            x = ops.recompute(block, *inputs) if self.activation_checkpointing else block(*inputs)
        return self.ln_f(x)

    def embedding_table(self) -> Tensor:
        """Return the token embeddings as the model reads them, (V, C)."""
        return rms_normalize(self.wte.weight) if self.normalize_embedding else self.wte.weight

    def head_weight(self) -> Tensor:
        """Return the matrix of the output layer, (V, C)."""
        if self.config.has_tied_embeddings:
            return self.embedding_table()
        return self.lm_head.weight

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Map final hidden states (..., C) to logits (..., V)."""
        return F.linear(hidden, self.head_weight())

    def last_token_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, V) of the token after the last one of idx (B, T)."""
        return self.compute_logits(self.forward_hidden(idx, cache=cache)[:, -1])

    def loss_sum(self, idx: Tensor, targets: Tensor, dropout_seeds: Tensor | None = None) -> Tensor:
        """Return the summed cross-entropy, in nats, of targets (B, T) after idx (B, T).

        Targets of -100 are ignored. The loss is a sum, so that those of micro-batches can be added
        before the division by the number of targets.
        """
        return self._cross_entropy(self.forward_hidden(idx, dropout_seeds), targets, "sum")

    def token_losses(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, in nats, of each target after idx (B, T): (B, T) float32."""
        return self._cross_entropy(self.forward_hidden(idx), targets, "none").view(targets.shape)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        hidden = hidden.flatten(0, 1)  # (B * T, C)
        chunk_size = max(1, MAX_LOGITS_PER_CHUNK // self.vocab_size)
        return ops.chunked_cross_entropy(
            self.compute_logits, hidden, targets.flatten(), chunk_size, reduction
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the initial weights, a pure function of the generator's state.

        `gpt2` is initialized as GPT-2: standard deviation 0.02, and residual projections divided by
        sqrt(2 n_layer). In `qwen3` embeddings have standard deviation 1 and matrices
        1 / sqrt(inputs), which preserves the scale of their input. Residual projections start at
        zero, so that each block starts as the identity (Zhang et al. 2019, "Fixup", section 3). An
        untied output layer starts at zero too: the first prediction is uniform.
        """
        for name, parameter in self.named_parameters():
            self.init_param(name, parameter, generator)

    def init_param(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initialize one parameter.

        Each call advances the generator, so call it in the order of `named_parameters`.
        """
        is_residual_proj = name.endswith(("o_proj.weight", "down_proj.weight"))
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            if name == "ln_f.weight" and self.is_qwen3 and self.config.has_tied_embeddings:
                # Hidden states and the rows of the tied table have norm sqrt(C) each, so their
                # products reach C: 1 / C keeps the first logits within 1.
                parameter.div_(self.config.n_embd)
        elif not self.is_qwen3:
            divisor = math.sqrt(2 * self.config.n_layer) if is_residual_proj else 1.0
            parameter.normal_(0.0, 0.02 / divisor, generator=generator)
        elif is_residual_proj or name == "lm_head.weight":
            parameter.zero_()
        else:
            std = 1.0 if name == "wte.weight" else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)

    def muon_param_splits(self) -> dict[str, list[int]]:
        """Return, by the name of each matrix of the blocks, the number of rows of its parts.

        Muon orthogonalizes each part separately: queries, keys and values; gate and up.
        """
        config = self.config
        qkv_heads = (config.n_head, config.num_kv_heads, config.num_kv_heads)
        up_splits = [config.intermediate_size] * (2 if self.is_qwen3 else 1)
        splits = {}
        for layer in range(config.n_layer):
            prefix = f"blocks.{layer}"
            splits[f"{prefix}.attn.qkv_proj.weight"] = [n * config.head_size for n in qkv_heads]
            splits[f"{prefix}.attn.o_proj.weight"] = [config.n_embd]
            splits[f"{prefix}.mlp.up_proj.weight"] = up_splits
            splits[f"{prefix}.mlp.down_proj.weight"] = [config.n_embd]
        return splits

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Use "sdpa" or "eager" attention; eager can be faster on a CPU."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.attn_implementation = attn_implementation
