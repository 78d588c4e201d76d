"""The twelve BatchNorm shapes of ResNet-50, some of (N, C) inputs, and one so small that only the call is left."""

from typing import NamedTuple

DEFAULT_BATCH = 32


class Shape(NamedTuple):
    """One BatchNorm input, without its batch dimension."""

    name: str
    channels: int
    height: int
    width: int

    def size(self, batch: int) -> tuple[int, ...]:
        """Put the batch size before the rest: (N, C, H, W)."""
        return (batch, self.channels, self.height, self.width)


# Every distinct input of ResNet-50's 53 BatchNorm layers at 224 x 224. The stride sits in a block's
# 3x3 convolution (torchvision's "v1.5"), so the first BatchNorm of a layer still sees the plane of
# the layer before.
RESNET50 = (
    Shape("stem_64x112x112", 64, 112, 112),
    Shape("layer1_64x56x56", 64, 56, 56),
    Shape("layer1_256x56x56", 256, 56, 56),
    Shape("layer2_128x56x56", 128, 56, 56),
    Shape("layer2_128x28x28", 128, 28, 28),
    Shape("layer2_512x28x28", 512, 28, 28),
    Shape("layer3_256x28x28", 256, 28, 28),
    Shape("layer3_256x14x14", 256, 14, 14),
    Shape("layer3_1024x14x14", 1024, 14, 14),
    Shape("layer4_512x14x14", 512, 14, 14),
    Shape("layer4_512x7x7", 512, 7, 7),
    Shape("layer4_2048x7x7", 2048, 7, 7),
)

# (N, C), as BatchNorm1d gets them: between fully connected layers, in projection heads, of points or of graphs' nodes.
ROWS = ((32, 1024), (256, 4096), (4096, 512), (65536, 64))

# So small that only the cost of the call itself is left.
OVERHEAD = Shape("overhead_4x2x2", 4, 2, 2)
OVERHEAD_BATCH = 2
