"""A U-Net: two levels with skips, group norms, a transposed convolution."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

CHANNELS, SIZE, BATCH = 32, 32, 16


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1),
        nn.GroupNorm(8, out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, padding=1),
        nn.GroupNorm(8, out),
        nn.SiLU(),
    )


class UNet(nn.Module):
    def __init__(self, width: int = CHANNELS) -> None:
        super().__init__()
        self.down_1 = block(4, width)
        self.down_2 = block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.widen_2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up_2 = block(4 * width, 2 * width)
        self.widen_1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up_1 = block(2 * width, width)
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, noisy: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        first = self.down_1(noisy)
        second = self.down_2(F.max_pool2d(first, 2))
        x = self.widen_2(self.bottom(F.max_pool2d(second, 2)))
        x = self.widen_1(self.up_2(torch.cat([x, second], dim=1)))
        return F.mse_loss(self.out(self.up_1(torch.cat([x, first], dim=1))), target)


def model() -> nn.Module:
    return UNet()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, 4, SIZE, SIZE), torch.randn(BATCH, 4, SIZE, SIZE)
