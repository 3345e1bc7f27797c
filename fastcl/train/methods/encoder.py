"""The encoder that every method trains."""

from torch import nn


class Encoder(nn.Sequential):
    """A small convolutional net: images float32 ``[B, C, H, W]`` in [0, 1] -> features ``[B, features]``.

    Halves the image until it is at most 4 pixels high or wide, then averages over it. GroupNorm, because BatchNorm's
    shared statistics would leak from one view to the other.
    """

    def __init__(self, channels: int, height: int, width: int, base: int = 32, widest: int = 256) -> None:
        depth, layers = base, self._block(channels, base, 1)
        while min(height, width) > 4 or depth == base:
            wider = min(2 * depth, widest)
            layers += self._block(depth, wider, 2) + self._block(wider, wider, 1)
            depth, height, width = wider, (height + 1) // 2, (width + 1) // 2
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.features = depth

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.GroupNorm(8, outputs), nn.ReLU()]
