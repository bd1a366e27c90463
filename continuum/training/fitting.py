"""Whether a network and the images it is given fit each other, which is asked before anything is trained or tested."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from continuum.models import Network
from continuum.models.archive import one_line
from continuum.solvers import SolveError
from continuum.solvers.base import evaluating
from continuum.training.data import ImageData
from continuum.training.images import DataError

SIDES = (8, 16, 28, 32, 64, 96, 128, 224)


def check_fit(network: Network, data: ImageData) -> None:
    """Let one test image pass, to say in words what training would stumble over.

    Raises:
        DataError: `network` takes another number of channels, no images of this size, or has not one output a class.
    """
    name, channels, size = type(data).__name__, data.shape[0], " x ".join(map(str, data.shape[1:]))
    first_part = network if isinstance(network.stem, nn.Identity) else network.stem
    first = next((module for module in first_part.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != channels:
        raise DataError(
            f"the images of {name} have {_counted(channels, 'channel')} and this network takes {first.in_channels}: build it "
            f"with in_channels={channels}"
        )
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return  # it would be compiled once more, for a single image
    images, _ = next(data.test_batches(1))
    try:
        logits = _logits(network, images)
    except SolveError:  # a matter of the weights, which training reports
        return
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        needed = "" if "are needed" in reason else _needed(network, images)
        raise DataError(
            f"this network cannot take the images of {name}, {_counted(channels, 'channel')} of {size} pixels: {reason}{needed}"
        ) from None
    if logits.shape[1:] != (data.num_classes,):
        outputs = " x ".join(map(str, logits.shape[1:]))
        raise DataError(
            f"{name} has {_counted(data.num_classes, 'class', 'es')} and this network {outputs} outputs: build it with "
            f"num_classes={data.num_classes}"
        )


def _logits(network: Network, images: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(network):
        return network(images.to(next(network.parameters(), images)))


def _needed(network: Network, images: Tensor) -> str:
    """Which of the usual sizes the network takes, as the end of a sentence."""
    for side in SIDES:
        try:
            _logits(network, images.new_zeros(1, images.shape[1], side, side))
        except SolveError:
            pass
        except (RuntimeError, ValueError):
            continue
        return f"; it takes {side} x {side} pixels"
    return "; it takes no images of other sizes either"


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def check_metrics(metrics: nn.ModuleDict, classes: int) -> None:
    """Take each metric of one image a class.

    Raises:
        DataError: one cannot be taken of so many classes, or is not a single number.
    """
    for name, metric in metrics.items():
        assert isinstance(metric, Metric)
        try:
            found = metric.clone().cpu()(torch.eye(classes), torch.arange(classes))
        except Exception as error:  # whatever a metric says of what it cannot be taken of
            raise DataError(f"the metric {name} cannot be taken of {classes} classes: {one_line(error)}") from None
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise DataError(f"the metric {name} is not one number, as a log needs it: give it an average, such as macro")
