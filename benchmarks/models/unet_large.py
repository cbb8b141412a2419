"""The U-Net of ``unet.py`` of a size for one GPU."""

import torch
from torch import nn

from benchmarks.models.unet import UNet

WIDTH, SIZE, BATCH = 128, 128, 16


def model() -> nn.Module:
    return UNet(WIDTH)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, 4, SIZE, SIZE), torch.randn(BATCH, 4, SIZE, SIZE)
