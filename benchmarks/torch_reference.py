"""The three models in PyTorch, written on their own as a course participant would: the peer in `throughput.py`.

ResNet18 is torchvision's layer for layer and the ViT that of the UvA tutorial 15; the names of parameters are those of
`flax_dlvc.interop`. Images are (B, C, H, W).
"""

import torch
import torch.nn.functional as F
from torch import nn


class CNN(nn.Module):
    """Convolution, ReLU and 2x2 max pooling three times, a hidden layer, dropout and the classifier."""

    def __init__(self, dropout_rate: float):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.dropout = nn.Dropout(dropout_rate)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 32, 32) to logits (B, 10)."""
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class ResNet18(nn.Module):
    """ResNet18 with the ImageNet stem and dropout before the classifier."""

    def __init__(self, dropout_rate: float):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage in range(4):
            width = 64 * 2**stage
            blocks = [BasicBlock(channels, width, 2 if stage else 1), BasicBlock(width, width, 1)]
            setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
            channels = width
        self.dropout = nn.Dropout(dropout_rate)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to logits (B, 10)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_heads: int, dropout_rate: float):
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, dropout=dropout_rate, batch_first=True)
        self.layer_norm_2 = nn.LayerNorm(embed_dim)
        self.linear = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout_rate),
            nn.Linear(hidden_dim, embed_dim),
            nn.Dropout(dropout_rate),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D) to tokens (B, N, D)."""
        y = self.layer_norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.linear(self.layer_norm_2(x))


class ViT(nn.Module):
    """The report's vision transformer."""

    def __init__(self, dropout_rate: float):
        super().__init__()
        embed_dim, self.patch_size = 256, 4
        self.input_layer = nn.Linear(3 * self.patch_size**2, embed_dim)
        self.transformer = nn.Sequential(*(AttentionBlock(embed_dim, 512, 8, dropout_rate) for _ in range(6)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, 10))
        self.dropout = nn.Dropout(dropout_rate)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + (32 // self.patch_size) ** 2, embed_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 32, 32) to logits (B, 10)."""
        patches = F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, C P P)
        x = self.input_layer(patches)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embedding
        x = self.transformer(self.dropout(x))
        return self.mlp_head(x[:, 0])


MODELS = {'cnn': CNN, 'resnet18': ResNet18, 'vit': ViT}
