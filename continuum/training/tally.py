"""What the training steps since the last reading found, added up where the network is, so that no step waits for it.

    broken <- broken or not isfinite(loss, statistics, gradients);  statistics <- old where broken, else new

The optimiser looks at `found_inf` itself: a broken step and all that follow leave weights, momentum and statistics as they
were, until somebody reads.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

Batch = tuple[Tensor, Tensor]
"""Images, (batch, channels, height, width) in float32, and labels, (batch,) in int64."""


class Tally:
    """Adds up what training steps of `network` find, and takes back what a broken one did to the buffers.

    Args:
        network: what is trained; its buffers stay the same tensors.
        batch: a first batch.
        names: of what is added up.
    """

    def __init__(self, network: nn.Module, batch: Batch, names: Sequence[str]) -> None:
        self.network, self.names, device = network, names, batch[0].device
        groups: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            words = _words(buffer)
            groups.setdefault(words.dtype, []).append(words)
        self.groups = list(groups.values())
        self.saved = [torch.cat(group) for group in self.groups]
        self.statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point() and buffer.numel()]
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        # The images and labels of the first broken step; those of each size stay where a captured step writes them.
        self.suspects: dict[torch.Size, Batch] = {}
        self.take(batch)
        # Zero, and no number from the first broken step on; whether it is none, and so for the optimiser.
        self.excess, self.found_inf = torch.zeros(2, dtype=torch.float32, device=device).unbind()
        self.broken = torch.zeros_like(self.excess, dtype=torch.bool)
        # The sums, and the good steps behind them.
        self.one = torch.ones_like(self.excess)
        self.sums = torch.zeros(len(names) + 1, dtype=torch.promote_types(batch[0].dtype, torch.float32), device=device)

    def take(self, batch: Batch) -> None:
        """Expect batches of this size from now on, after a reading."""
        shape = batch[0].shape
        if shape not in self.suspects:
            self.suspects[shape] = torch.empty_like(batch[0]), torch.empty_like(batch[1])
        self.suspect = self.suspects[shape]

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        return [weight.grad for weight in self.weights if weight.grad is not None]

    @torch.no_grad()
    def begin(self) -> None:
        """Take the buffers as they are for good ones."""
        for saved, group in zip(self.saved, self.groups, strict=True):
            torch.cat(group, out=saved)

    @torch.no_grad()
    def judge(self, batch: Batch, loss: Tensor, found: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Look at a step before its update; under several ranks, all of them are broken where one is.

        Args:
            batch: the images and labels of the step.
            loss: what was differentiated.
            found: a mean over the images for each of the names.
            gradients: those to look at.
        """
        for kept, new in zip(self.suspect, batch, strict=True):
            torch.where(self.broken, kept, new, out=kept)
        self.excess.add_(0 * get_total_norm([loss, *self.statistics, *gradients], float("inf")))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.excess)
        torch.ne(self.excess, 0, out=self.broken)
        self.found_inf.copy_(self.broken)
        for saved, group in zip(self.saved, self.groups, strict=True):
            torch.where(self.broken, saved, torch.cat(group), out=saved)
            self._write(saved, group)
        self.sums.add_(torch.stack([*found, self.one]).masked_fill_(self.broken, 0))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers the values from behind the last good step."""
        for saved, group in zip(self.saved, self.groups, strict=True):
            self._write(saved, group)

    def read(self) -> tuple[int, dict[str, float], bool]:
        """The good steps since the last reading, their means, and whether a broken one came behind them; begins anew.

        This waits for the device.
        """
        *sums, good, broken = torch.cat([self.sums, self.found_inf[None]]).tolist()
        self.sums.zero_()
        return int(good), {name: total / max(good, 1) for name, total in zip(self.names, sums, strict=True)}, bool(broken)

    @staticmethod
    def _write(values: Tensor, group: list[Tensor]) -> None:
        parts = values.split([buffer.numel() for buffer in group])
        torch._foreach_copy_(group, parts)  # pyright: ignore[reportPrivateImportUsage]


def _words(buffer: Tensor) -> Tensor:
    """A view of a dense buffer with one axis, as words of 32 bits where it consists of such: all types are copied as one."""
    flat = buffer.as_strided((buffer.numel(),), (1,))
    return flat if flat.element_size() % 4 else flat.view(torch.int32)
