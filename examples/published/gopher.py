"""Gopher 280B (Rae et al., arXiv 2112.11446, table 1): RMSNorm, and attention with
relative positions (Dai et al., arXiv 1901.02860)."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

LAYERS, WIDTH, HEADS, HEAD_WIDTH, VOCABULARY = 80, 16384, 128, 128, 32000
BATCH, LENGTH = 1536, 2048  # three million tokens, those of the first part of the training


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(WIDTH)
        self.query = nn.Linear(WIDTH, HEADS * HEAD_WIDTH)
        self.key = nn.Linear(WIDTH, HEADS * HEAD_WIDTH)
        self.value = nn.Linear(WIDTH, HEADS * HEAD_WIDTH)
        self.places = nn.Linear(WIDTH, HEADS * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(HEADS * HEAD_WIDTH, WIDTH)
        self.norm_2 = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x), distances)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))

    def attention(self, x: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, HEADS, HEAD_WIDTH).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        r = self.places(distances).view(length, HEADS, HEAD_WIDTH).transpose(0, 1)
        scores = (q @ k.transpose(2, 3) + shifted(q @ r.transpose(1, 2))) * HEAD_WIDTH**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = F.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_WIDTH))


def shifted(scores: torch.Tensor) -> torch.Tensor:
    """From (query, distance) to (query, key): row i moves to the left by what it is short of the
    last one."""
    batch, heads, length, _ = scores.shape
    padded = F.pad(scores, (1, 0)).view(batch, heads, length + 1, length)
    return padded[:, :, 1:]


class Gopher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        length = tokens.shape[1]
        far = torch.arange(length - 1, -1, -1, device=x.device, dtype=torch.float32)
        rates = 10000.0 ** (-torch.arange(0, WIDTH, 2, device=x.device) / WIDTH)
        angles = far[:, None] * rates
        distances = torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)
        for block in self.blocks:
            x = block(x, distances)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def model() -> nn.Module:
    return Gopher()


def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    return {"tokens": tokens, "targets": tokens}
