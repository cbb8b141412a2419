"""PaLM 540B (Chowdhery et al., arXiv 2204.02311, section 2 and table 1): parallel layers, one head
of keys and values for all queries, SwiGLU, rotary positions, shared embeddings, no biases."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 118, 18432, 48, 256
HIDDEN = 4 * WIDTH
VOCABULARY = 256_008  # 256,000, padded to what 12-way model parallelism divides
BATCH, LENGTH = 2048, 2048  # sequences of the last third of the training, section 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.query = nn.Linear(WIDTH, HEADS * HEAD_WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, HEAD_WIDTH, bias=False)
        self.value = nn.Linear(WIDTH, HEAD_WIDTH, bias=False)
        self.out = nn.Linear(HEADS * HEAD_WIDTH, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        # both halves read y, and their results are added to each other first: one sum over devices
        return x + (self.attention(y, cos, sin) + self.mlp(y))

    def mlp(self, y: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(y)) * self.up(y))

    def attention(self, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = y.shape
        q = self.query(y).view(batch, length, HEADS, HEAD_WIDTH).transpose(1, 2)
        k = self.key(y).view(batch, length, 1, HEAD_WIDTH).transpose(1, 2)
        v = self.value(y).view(batch, length, 1, HEAD_WIDTH).transpose(1, 2)
        scores = rotated(q, cos, sin) @ rotated(k, cos, sin).transpose(2, 3) * HEAD_WIDTH**-0.5
        later = torch.ones(length, length, dtype=torch.bool, device=y.device).triu(1)
        mixed = F.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, HEADS * HEAD_WIDTH))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class PaLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        places = torch.arange(tokens.shape[1], device=x.device, dtype=torch.float32)
        rates = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2, device=x.device) / HEAD_WIDTH)
        angles = (places[:, None] * rates).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def model() -> nn.Module:
    return PaLM()


def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    return {"tokens": tokens, "targets": tokens}
