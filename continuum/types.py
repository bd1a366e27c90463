"""The shapes of the library: a depth t and a batch of states x, as in dx/dt = f(t, x)."""

from typing import Annotated, TypeAlias

from torch import Tensor

Time: TypeAlias = float | Annotated[Tensor, "0-dim"]
"""A depth, counted in layers: a Python float, or the 0-dim tensor that torchdiffeq passes."""

State: TypeAlias = Annotated[Tensor, "batch ..."]
"""A batch of states of any shape; axis 0 runs over the samples, axis 1 over features or channels."""

Images: TypeAlias = Annotated[Tensor, "batch channels height width"]
Logits: TypeAlias = Annotated[Tensor, "batch classes"]
