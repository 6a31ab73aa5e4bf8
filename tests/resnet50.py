"""ResNet-50 v1.5 (He et al. 2016; strides in the 3x3 convolutions), for counting on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """25,502,912 conv and linear weights; ``pad_twice`` pads conv1 twice, as RigL's count of its FLOPs does."""

    def __init__(self, pad_twice: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=6 if pad_twice else 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], 64
        for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
            for block in range(blocks):
                stages.append(_Bottleneck(channels, width, 2 if stage and not block else 1, project=not block))
                channels = 4 * width
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1000) of images (N, 3, 224, 224)."""
        x = torch.relu(self.bn1(self.conv1(x)))[:, :, :112, :112]
        return self.fc(self.blocks(self.pool(x)).mean((2, 3)))
