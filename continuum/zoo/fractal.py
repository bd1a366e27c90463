"""FractalNet, whose blocks change the size: no flow, but a network to compare with `fractal_resnet`."""

from collections.abc import Sequence

from torch import nn

from continuum.models.fractal import FractalBlock, FractalStages
from continuum.models.network import Network, builder
from continuum.models.parts import PlainHead


@builder
def fractalnet(
    columns: int = 3,
    widths: Sequence[int] = (64, 128, 256, 512, 512),
    dropout: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4),
    drop_path: float = 0.15,
    num_classes: int = 10,
    in_channels: int = 3,
) -> Network:
    """FractalNet (arXiv 1605.07648): blocks of so many `columns`, each followed by max pooling, and a linear map.

    A block has 2^columns - 1 convolutions, and the longest path of the network len(widths) * 2^(columns - 1). `dropout` is the
    rate of each block. A block maps between different numbers of channels, so it is no step of an equation and has no solver;
    `fractal_resnet` has blocks that are. Images need a height and width of 2^len(widths) or more.

    Args:
        columns: depth of a block: 2^columns - 1 convolutions.
        widths: channels of each block.
        dropout: rate in each block, in [0, 1).
        drop_path: rate at which an input of a join is dropped, in [0, 1).
        num_classes: number of logits.
        in_channels: channels of the images.

    Raises:
        ValueError: no column, another number of dropout rates than widths, or a rate outside [0, 1).
    """
    if columns < 1 or not widths or len(dropout) != len(widths):
        raise ValueError(f"one column or more and a dropout rate for each width; got {columns}, {dropout} and {widths}")
    if not all(0 <= rate < 1 for rate in (*dropout, drop_path)):
        raise ValueError(f"rates lie in [0, 1); got dropout {dropout} and drop_path {drop_path}")
    inputs = (in_channels, *widths[:-1])
    blocks = [FractalBlock(columns, *sizes) for sizes in zip(inputs, widths, dropout, strict=True)]
    head = PlainHead(widths[-1], num_classes, nn.AdaptiveAvgPool2d(1))
    return Network(nn.Identity(), [FractalStages(blocks, drop_path)], head)
