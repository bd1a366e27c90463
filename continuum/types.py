"""The types of the library: a depth t and a batch of states x, as in dx/dt = f(t, x)."""

import threading
from typing import Annotated, TypeAlias, TypeVar

from torch import Tensor, nn

Time: TypeAlias = float | Annotated[Tensor, "0-dim"]
"""A depth, counted in layers: a Python float, or the 0-dim tensor that torchdiffeq passes."""

State: TypeAlias = Annotated[Tensor, "batch ..."]
"""A batch of states of any shape; axis 0 runs over the samples, axis 1 over features or channels."""

States: TypeAlias = State | tuple[State, ...]
"""One state, or several that move by each other, of one batch size."""

StateOrStates = TypeVar("StateOrStates", State, tuple[State, ...])
"""What goes in as a tensor comes out as a tensor, and a tuple as a tuple."""

Images: TypeAlias = Annotated[Tensor, "batch channels height width"]
Logits: TypeAlias = Annotated[Tensor, "batch classes"]

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""What normalises by the statistics of the batch, and keeps running ones."""

REPLACING = threading.RLock()
"""Held while tensors of a module are replaced for a moment, so that no other thread evaluates with the replacements."""
