"""Two towers without a common operator until each pair of samples is scored."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

FEATURES, WIDTH, BATCH = 512, 1024, 512


def tower() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, WIDTH),
        nn.GELU(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, FEATURES),
    )


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.item = tower(), tower()
        self.score = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))

    def forward(
        self, queries: torch.Tensor, items: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        return F.mse_loss(self.score(self.query(queries) * self.item(items)), target)


def model() -> nn.Module:
    return TwoTowers()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, FEATURES), torch.randn(BATCH, FEATURES), torch.randn(BATCH, 8)
