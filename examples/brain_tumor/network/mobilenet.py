"""MobileNet v1 in TF-slim's or timm's layout, ImageNet weights, and the paper's output network."""

from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..settings import NetworkSettings

Layout = Literal["slim", "timm"]  # whose weights fit: they differ in names, padding and epsilon

# (output channels at width 1.0, stride) of the thirteen depthwise separable blocks.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
BATCH_NORM_EPSILON = {"slim": 1e-3, "timm": 1e-5}  # what the ImageNet weights were trained with

FIRST_TENSOR = {"slim": "stem.conv.weight", "timm": "conv_stem.weight"}
TIMM_LAYERS = {
    ("stem", "conv"): "conv_stem",
    ("stem", "bn"): "bn1",
    ("depthwise", "conv"): "conv_dw",
    ("depthwise", "bn"): "bn1",
    ("pointwise", "conv"): "conv_pw",
    ("pointwise", "bn"): "bn2",
}


def first_centre(side: int, layout: Layout) -> int:
    """Return the pixel on which the first 3 x 3 window of stride 2 is centred, along one side.

    timm pads a side at both ends: the centres are 0, 2, 4 .... TF-slim's "SAME" padding does so if
    the side is odd; an even one grows at its end only, and the centres are 1, 3, 5 ....
    """
    return 1 - side % 2 if layout == "slim" else 0


class Stem(nn.Module):
    """The first layer: a 3 x 3 convolution with stride 2 of the colour channels."""

    def __init__(self, out_channels: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.conv = nn.Conv2d(3, out_channels, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPSILON[layout])

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 3, h, w) to (n, out_channels, ceil(h / 2), ceil(w / 2))."""
        top, left = (first_centre(side, self.layout) for side in images.shape[2:])
        images = F.pad(images, (1 - left, 1, 1 - top, 1))
        return F.relu6(self.bn(self.conv(images)))


class DepthwiseConvolution(nn.Module):
    """A 3 x 3 convolution of each channel apart, with stride 1 or 2."""

    def __init__(self, channels: int, stride: int, layout: Layout) -> None:
        super().__init__()
        self.stride = stride
        self.layout = layout
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON[layout])

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, channels, h, w) to (n, channels, ceil(h / stride), ceil(w / stride))."""
        top, left = (first_centre(side, self.layout) for side in features.shape[2:])
        features = self.conv(features)
        if self.stride == 2:
            # All windows are computed and every other one kept, because differentiating a strided
            # bfloat16 convolution takes a CPU several times as long.
            features = features[:, :, top::2, left::2]
            features = features.contiguous(memory_format=torch.channels_last)
        return F.relu6(self.bn(features))


def separable_block(
    in_channels: int, out_channels: int, stride: int, layout: Layout
) -> nn.Sequential:
    """Return MobileNet's cheap 3 x 3 convolution: each channel apart, then a mixture of them.

    It maps (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride)).
    """
    depthwise = DepthwiseConvolution(in_channels, stride, layout)
    mixture = {
        "conv": nn.Conv2d(in_channels, out_channels, 1, bias=False),
        "bn": nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPSILON[layout]),
        "relu6": nn.ReLU6(),
    }
    pointwise = nn.Sequential(OrderedDict(mixture))
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class MobileNetV1(nn.Module):
    """The convolutional part of MobileNet v1 (Howard et al., 2017, arXiv:1704.04861).

    `width` multiplies all channel counts; the ImageNet weights are for 1.0. `layout` says whose
    weights fit: "slim" TF-slim's, with "SAME" padding and an epsilon of 1e-3; "timm" timm's, with
    symmetric padding and 1e-5.
    """

    def __init__(self, width: float = 1.0, layout: Layout = "slim") -> None:
        super().__init__()
        self.width = width
        self.layout = layout
        channels = int(32 * width)
        self.stem = Stem(channels, layout)
        self.blocks = nn.Sequential()
        for base_channels, stride in BLOCKS:
            in_channels, channels = channels, int(base_channels * width)
            self.blocks.append(separable_block(in_channels, channels, stride, layout))
        self.out_channels = channels  # of the features: 1024 * width

    def forward(self, images: Tensor, blocks: int | None = None) -> Tensor:
        """Map RGB images (n, 3, h, w) in [-1, 1] to (n, out_channels, h / 32, w / 32) features.

        With `blocks` they are those after so many blocks.
        """
        features = self.stem(images)
        for block in list(self.blocks)[:blocks]:
            features = block(features)
        return features


class EmbeddingNetwork(nn.Module):
    """The paper's network: MobileNet v1, global average pooling and the output network."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.input_range = settings.input_range
        self.backbone = MobileNetV1(settings.width, settings.layout)
        size = settings.embedding_size
        self.output = nn.Sequential(
            nn.Linear(self.backbone.out_channels, size),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(size, size),
            nn.BatchNorm1d(size),
        )
        nn.init.kaiming_normal_(self.output[3].weight)  # as He et al. (2015) do
        nn.init.zeros_(self.output[3].bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map grey images (n, 1, h, w) in [0, 1] to embeddings (n, embedding_size)."""
        return self.output(self.pooled(images))

    def pooled(self, images: Tensor, blocks: int | None = None) -> Tensor:
        """Map the same to MobileNet's features (n, channels), averaged over each image.

        They are those after so many `blocks`, or after all.
        """
        if self.input_range == "imagenet":
            images = images * 2 - 1
        return self.backbone(images.expand(-1, 3, -1, -1), blocks).mean((2, 3))


def load_imagenet_weights(network: MobileNetV1, path: Path) -> None:
    """Copy MobileNet v1's ImageNet weights into a network of width 1.0, all of them or none.

    The safetensors file holds TF-slim's weights (keys `stem`, `blocks`, `classifier`) or timm's
    `mobilenetv1_100` (keys `conv_stem`, `bn1`, `blocks`, `classifier`).

    Raises:
        UserError: The file is missing or damaged, or holds another network's weights.
    """
    if network.width != 1.0:
        raise UserError(
            f"{path}: these weights are for width 1.0, but the network has {network.width}"
        )
    layout = weights_layout(path)
    if layout != network.layout:
        raise UserError(
            f"{path}: these weights have {layout}'s layout, but the network has {network.layout}'s;"
            f" set --layout {layout} to use them"
        )
    weights, state = load_file(path), network.state_dict()
    for name, own in state.items():
        if name.endswith("num_batches_tracked"):  # torch's counter: unused, and unknown elsewhere
            continue
        source = timm_name(name) if layout == "timm" else name
        if source not in weights:
            raise UserError(f"{path}: no tensor named {source}; not MobileNet v1's weights")
        state[name] = found = weights[source]
        if found.shape != own.shape:
            raise UserError(
                f"{path}: {source} has shape {list(found.shape)}, expected {list(own.shape)}"
            )
        if not found.is_floating_point() or not found.isfinite().all():
            raise UserError(
                f"{path}: {source} holds values that are not finite floating-point numbers"
            )
    network.load_state_dict(state)


def weights_layout(path: Path) -> Layout:
    """Return whose layout a file of ImageNet weights has.

    Raises:
        UserError: The file is missing or damaged, or holds another network's weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file") from error
    for layout, first in FIRST_TENSOR.items():
        if first in names:
            return layout
    raise UserError(f"{path}: neither TF-slim's nor timm's weights of MobileNet v1")


def timm_name(name: str) -> str:
    """Return what timm calls a tensor of ours: `stem.bn.bias` is `bn1.bias` there."""
    *place, module, layer, term = name.split(".")
    block = f"{timm_block(int(place[1]))}." if place else ""
    return f"{block}{TIMM_LAYERS[module, layer]}.{term}"


def timm_block(index: int) -> str:
    """Return what timm calls a block of ours: it numbers them anew from each one of stride 2."""
    strides = [stride for _, stride in BLOCKS[: index + 1]]
    since = strides[::-1].index(2) if 2 in strides else index
    return f"blocks.{strides.count(2)}.{since}"
