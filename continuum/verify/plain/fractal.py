"""FractalNet as a plain loop."""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from continuum.verify.plain.parts import Arguments, Layer, Weights, conv, linear, norm


def fractalnet(w: Weights, arguments: Arguments, images: Tensor) -> Iterator[Layer]:
    """f_1(x) = conv(x), f_{C+1}(x) = join(conv(x), f_C(f_C(x))), and max pooling behind each block.

    In training half of the passes go through one column, the others drop inputs of joins, with draws in the network's order.
    """
    x, columns, drop, column = images, arguments["columns"], 0.0, None
    yield "stem", x
    if w.training and arguments["drop_path"]:
        if torch.rand(()) < 0.5:
            column = int(torch.randint(columns, ()))
        else:
            drop = arguments["drop_path"]
    for number, rate in enumerate(arguments["dropout"]):
        place = f"stages.0.blocks.{number}"
        x = F.max_pool2d(_fractal_block(w.at(place), x, columns, rate, drop, column), 2)
        yield place, x
    yield "head", linear(w.at("head.linear"), F.adaptive_avg_pool2d(x, 1).flatten(1))


def _fractal_block(w: Weights, x: Tensor, columns: int, rate: float, drop: float, only: int | None) -> Tensor:
    used = Counter[int]()

    def unit(column: int, x: Tensor) -> Tensor:
        """The next conv-dropout-BN-ReLU of a column."""
        v = w.at(f"columns.{column}.{used[column]}")
        used[column] += 1
        return F.relu(norm(v.at("norm"), F.dropout(conv(v.at("conv"), x), rate, w.training)))

    def meeting(column: int, x: Tensor) -> list[tuple[int, Tensor]]:
        """The columns whose ends meet behind f, of this column and all deeper ones, with the states before their last unit."""
        if column == columns - 1:
            return [(column, x)]
        return [(column, x), *meeting(column + 1, join(meeting(column + 1, x)))]

    def join(ends: list[tuple[int, Tensor]]) -> Tensor:
        paths = [unit(column, x) for column, x in ends]
        if drop and len(paths) > 1:
            live = torch.rand(len(paths)) >= drop
            if not live.any():
                live[torch.randint(len(paths), ())] = True
            paths = [path for path, lives in zip(paths, live.tolist(), strict=True) if lives]
        return sum(paths[1:], start=paths[0]) / len(paths)

    if only is None:
        return join(meeting(0, x))
    for _ in range(2**only):
        x = unit(only, x)
    return x
