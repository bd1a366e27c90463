"""Fields with an integral beside the state: dx/dt = f(t, x), da/dt = g(t, x, dx/dt), solved as one equation."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from continuum.fields import Field
from continuum.fields.base import checked
from continuum.types import State, States, Time

Integrand: TypeAlias = Callable[[Time, State, State], Tensor]
"""What `Flow.integral` sums up: (t, x, dx/dt) -> one number an image, (batch,)."""


class Augmented(Field):
    """The field of (x, a): dx/dt = f(t, x), da/dt = integrand(t, x, dx/dt)."""

    takes_number = True

    def __init__(self, field: Field, integrand: Integrand) -> None:
        super().__init__()
        self.field = field
        self.integrand = integrand
        self.knots, self.extent = field.knots, field.extent
        self.training = field.training  # not train(), which would set the modes of the field's parts too

    def forward(self, t: Time, x: States) -> States:  # pyright: ignore[reportIncompatibleMethodOverride]
        state, differentiable = x[0], torch.is_grad_enabled()
        # Solvers evaluate without gradients where they can; the integrand may need one all the same.
        with torch.inference_mode(False), torch.enable_grad():
            if not (differentiable and state.requires_grad):
                state = state.detach().clone().requires_grad_()
            # Compiled fields have one derivative only, so they are evaluated as they were written.
            field = self.field if self.field._compiled_call_impl is None else self.field.forward
            slope = checked(field(t, state), state)
            rate = self.integrand(t, state, slope)
        if rate.shape != state.shape[:1]:
            raise ValueError(
                f"an integrand returns one number an image, shape ({len(state)},), not {tuple(rate.shape)}: sum or average "
                "over all axes but the first"
            )
        return (slope, rate) if differentiable else (slope.detach(), rate.detach())


def augmented(field: Field, integrand: Integrand) -> Field:
    """The field of (x, a); of layers, layer by layer, so that whoever asks for layers finds them."""
    return field.mapped(lambda layer: Augmented(layer, integrand))
