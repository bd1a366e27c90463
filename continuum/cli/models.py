"""`continuum models`: every network of the zoo, and the published configurations with their numbers of parameters."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from torch.overrides import TorchFunctionMode

from continuum import zoo
from continuum.cli.parser import Parser, parser_of
from continuum.models import Network
from continuum.zoo import BUILDERS

ELSEWHERE = {"num_classes", "in_channels", "solver"}
"""Arguments of almost all builders, not listed with the defaults."""

CIFAR, IMAGENET, MNIST = (10, 100), (1000,), (10,)
Configuration = tuple[str, str, dict[str, Any], tuple[int, ...]]
"""A name, the builder and its arguments, and the numbers of classes."""

LARGER = {"widths": (32, 64, 128)}
BOTTLENECK = {"block": "bottleneck"}
CONFIGURATIONS: tuple[Configuration, ...] = (
    *((f"ResNet-{depth}", "resnet", {"depth": depth}, CIFAR) for depth in (20, 32, 44, 56, 110)),
    *((f"pre-activation ResNet-{depth}", "preresnet", {"depth": depth}, CIFAR) for depth in (20, 110)),
    *((f"pre-activation ResNet-{depth}", "preresnet", {"depth": depth, **BOTTLENECK}, CIFAR) for depth in (164, 1001)),
    *(
        (f"WRN-{depth}-{widen}", "wide_resnet", {"depth": depth, "widen": widen}, CIFAR)
        for depth, widen in ((16, 8), (28, 10), (40, 4), (22, 8), (40, 10))
    ),
    *((f"ResNeXt-29 {groups}x64d", "resnext", {"depth": 29, "cardinality": groups}, CIFAR) for groups in (8, 16)),
    *((f"LM-ResNet-{depth}", "lm_resnet", {"depth": depth}, CIFAR) for depth in (20, 32, 44, 56, 110)),
    ("LM-ResNet-164", "lm_resnet", {"depth": 164, **BOTTLENECK}, CIFAR),
    ("FractalNet", "fractalnet", {"columns": 3}, CIFAR),
    ("RevNet-38", "revnet", {"depth": 38}, CIFAR),
    ("RevNet-110", "revnet", {"depth": 110, **LARGER}, CIFAR),
    ("Hamiltonian-74", "hamiltonian", {"depth": 74}, CIFAR),
    ("Hamiltonian-218", "hamiltonian", {"depth": 218, **LARGER}, CIFAR),
    ("MidPoint-26", "midpoint", {"depth": 26}, CIFAR),
    ("MidPoint-62", "midpoint", {"depth": 62, **LARGER}, CIFAR),
    ("Leapfrog-26", "leapfrog", {"depth": 26}, CIFAR),
    *((f"ContinuousNet {size}-{size}-{size}", "continuous_resnet", {"size": size}, CIFAR) for size in (2, 8)),
    ("ODE-Net", "odenet", {"stages": 1}, MNIST),
    ("stochastic depth ResNet-110", "stochastic_depth_resnet", {"depth": 110}, CIFAR),
    *((f"shake-shake 26 2x{width}d", "shake_shake", {"depth": 26, "width": width}, CIFAR) for width in (32, 64, 96, 112)),
    ("stochastic LM-ResNet-110", "stochastic_lm_resnet", {"depth": 110}, CIFAR),
    *((f"ResNet-{depth}", "imagenet_resnet", {"depth": depth}, IMAGENET) for depth in (18, 34, 50, 101, 152)),
    ("ResNeXt-50 32x4d", "imagenet_resnet", {"depth": 50, "groups": 32, "group_width": 4}, IMAGENET),
    ("wide ResNet-50-2", "imagenet_resnet", {"depth": 50, "group_width": 128}, IMAGENET),
)
"""Networks whose numbers of parameters are published, or follow from the papers."""


def models_parser() -> Parser:
    return parser_of("models")


def models_command(arguments: list[str]) -> None:
    """`continuum models`: two tables, of the builders and of the configurations."""
    models_parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    headings, *builders = documented()
    table = _table("the zoo: continuum.zoo.NAME(...)", [*headings, "defaults", "parameters"])
    for name, *words in builders:
        table.add_row(name, *words, defaults(name), f"{size_of(build(name, {})):,}")
    console.print(table)
    classes = (*CIFAR, *IMAGENET)
    columns = ["network", "built by", *map(str, classes), "statistics"]
    table = _table("published configurations: parameters by classes, and running statistics of BatchNorm", columns)
    for name, builder, chosen, numbers in CONFIGURATIONS:
        network = build(builder, {**chosen, "num_classes": numbers[0]})
        call = f"{builder}({', '.join(f'{key}={value!r}' for key, value in chosen.items())})"
        sizes = {number: size_of(network) + (number - numbers[0]) * size_of_class(network) for number in numbers}
        cells = [f"{sizes[number]:,}" if number in sizes else "" for number in classes]
        table.add_row(name, call, *cells, f"{statistics_of(network):,}")
    console.print(table)


def documented() -> Iterator[list[str]]:
    """The rows of the table at the top of `continuum.zoo`, the headings first."""
    for line in (zoo.__doc__ or "").splitlines():
        if line.startswith("| ") and not line.startswith("| -"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def defaults(name: str) -> str:
    """The defaults of a builder's arguments, without those that stand ELSEWHERE."""
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    return ", ".join(f"{p.name}={p.default}" for p in parameters if p.name not in ELSEWHERE and p.default is not None)


class Uninitialised(TorchFunctionMode):
    """Draws no weights: their memory is never touched, and networks of hundreds of layers are built to be counted at once.

    On the "meta" device they would have no memory, but torch would import its compiler.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith(("normal_", "uniform_")):  # methods, and functions of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build(name: str, arguments: dict[str, Any]) -> Network:
    """A network to be counted, whose weights are whatever there is in memory."""
    with Uninitialised():
        return BUILDERS[name](**arguments)


def size_of(network: nn.Module) -> int:
    """The numbers that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def size_of_class(network: Network) -> int:
    """The numbers that one more class would add: a row of the last linear map."""
    *_, last = (module for module in network.head.modules() if isinstance(module, nn.Linear))
    return size_of(last) // last.out_features


def statistics_of(network: Network) -> int:
    return sum(buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in headings:
        number = heading.isdigit() or heading in ("parameters", "statistics")
        table.add_column(heading, justify="right" if number else "left", no_wrap=heading == "function")
    return table
