"""A decoder-only transformer in plain torch: nothing in this file knows that it will be sharded.

Pre-norm blocks with rotary positions, causal attention and a squared-ReLU feed-forward layer, in fp32 on a CPU or
whatever dtype its parameters are given.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The sizes of a model; the defaults make 5.2 million parameters."""

    vocab_size: int = 4096
    context: int = 256  # tokens that attention can look back on
    layers: int = 4
    width: int = 256
    heads: int = 4


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to the stream that it read through a norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [batch, tokens, width] to the same shape."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())


class GPT(nn.Module):
    """Predict the next token at every position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        # After 150 steps of the example 1.94 bits per byte; 2.03 with torch's N(0, 1) and no norm.
        nn.init.normal_(self.embedding.weight, std=0.05)  # read through a norm: small values learn faster
        self.embedding_norm = nn.RMSNorm(config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy in nats when there are targets, else logits [batch, tokens, vocab]."""
        x = self.embedding_norm(self.embedding(tokens))
        cos, sin = rotary_angles(tokens.shape[1], self.config.width // self.config.heads, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotary_angles(num_tokens: int, head_width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head_width / 2] of the rotary position embedding (arXiv 2104.09864)."""
    frequencies = 10_000.0 ** -torch.arange(0, 1, 2 / head_width, device=like.device)
    angles = torch.outer(torch.arange(num_tokens, device=like.device), frequencies)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of x [batch, heads, tokens, head_width] by its position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, *, num_tokens: int, temperature: float, seed: int) -> Tensor:
    """Return `prompt` [tokens] continued by `num_tokens` sampled ones.

    The seed makes every rank draw the same tokens, so that all of them go on calling the sharded model together.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt
    for _ in range(num_tokens):
        logits = model(tokens[None, -model.config.context :])[0, -1].float().cpu()
        probabilities = torch.softmax(logits / temperature, dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator).to(tokens.device)))
    return tokens
