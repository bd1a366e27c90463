"""The parts of the queue, in their order."""

from experiments.gpu.epochs import epochs
from experiments.gpu.infinite_depth import infinite_depth
from experiments.gpu.jobs import Part, Settings
from experiments.gpu.momentum import fashion, momentum
from experiments.gpu.noise import noise
from experiments.gpu.solves import solves
from experiments.gpu.truth import truth


def all_parts(settings: Settings) -> list[Part]:
    return [make(settings) for make in (truth, solves, epochs, momentum, noise, infinite_depth, fashion)]
