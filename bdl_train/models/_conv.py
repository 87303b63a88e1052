"""What residual networks share: their convolution and their last pooling."""

from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (a norm follows), padded to keep H and W at stride 1.

    Weights start at N(0, 2 / fan-in) (He et al., 2015, arXiv:1502.01852, equation 10).
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


class GlobalMean(nn.Module):
    """`[B, C, H, W]` to `[B, C]`, the mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))
