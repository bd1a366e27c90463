"""FractalNet's blocks, f_1(z) = conv(z), f_{C+1}(z) = join(f_C(f_C(z)), conv(z)), and its drop-path (arXiv 1605.07648).

A join is the mean of all paths that meet; joins that meet are one. Column c of C has 2^(c-1) convolutions, each of which
spans 2^(C-c) rows of the deepest column.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FractalUnit(nn.Module):
    """conv3x3-dropout-BN-ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        nn.init.xavier_uniform_(self.conv.weight)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.dropout(self.conv(x))))


class FractalBlock(nn.Module):
    """f_C with C columns, from in_channels to out_channels.

    `forward(x, column=None, drop=0)`: the mean of all paths at each join, each input dropped with probability `drop` (at
    least one stays); or only the column of that number, 0 being the shallowest.
    """

    def __init__(self, columns: int, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.columns = nn.ModuleList(
            nn.ModuleList(
                FractalUnit(in_channels if index == 0 else out_channels, out_channels, dropout) for index in range(2**column)
            )
            for column in range(columns)
        )

    def forward(self, x: Tensor, column: int | None = None, drop: float = 0.0) -> Tensor:
        if column is not None:
            for unit in self._units(column):
                x = unit(x)
            return x
        deepest = len(self.columns) - 1
        inputs = [x] * len(self.columns)
        for row in range(1, 2**deepest + 1):
            # The columns of which a unit ends at this row; their outputs meet, and are the input of the next unit of each.
            ending = [c for c in range(len(self.columns)) if row % 2 ** (deepest - c) == 0]
            x = join([self._units(c)[row // 2 ** (deepest - c) - 1](inputs[c]) for c in ending], drop)
            for c in ending:
                inputs[c] = x
        return x

    def _units(self, column: int) -> nn.ModuleList:
        units = self.columns[column]
        assert isinstance(units, nn.ModuleList)
        return units


def join(paths: Sequence[Tensor], drop: float = 0.0) -> Tensor:
    """The mean of the paths, each dropped with probability `drop`; if all are, one drawn evenly stays."""
    if drop and len(paths) > 1:
        stays = torch.rand(len(paths)) >= drop
        if not stays.any():
            stays[torch.randint(len(paths), ())] = True
        paths = [path for path, stay in zip(paths, stays.tolist(), strict=True) if stay]
    return sum(paths[1:], start=paths[0]) / len(paths)


class FractalStages(nn.Module):
    """Fractal blocks, each followed by 2x2 max pooling.

    In training, half of the mini-batches go through a single column, the same in all blocks, and the others drop inputs of
    joins with probability `drop_path`; without drop_path all paths are always there, as they are in evaluation.
    """

    def __init__(self, blocks: Sequence[FractalBlock], drop_path: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.MaxPool2d(2)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        column, drop = None, 0.0
        if self.training and self.drop_path:
            if torch.rand(()) < 0.5:
                first = self.blocks[0]
                assert isinstance(first, FractalBlock)
                column = int(torch.randint(len(first.columns), ()))
            else:
                drop = self.drop_path
        for block in self.blocks:
            x = self.pool(block(x, column, drop))
        return x
