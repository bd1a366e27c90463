"""Two threads: each gets from a network what it gives one alone, and afterwards the network is as it was."""

import threading

import networks
import pytest
import torch

from continuum import Brownian, Flow
from continuum.bases import Hat
from continuum.fields import MLP, Autonomous
from continuum.noise import StochasticDepth
from continuum.solvers import PerImage
from continuum.weights import Expansion


def together(first, second, repeats):
    """What two functions return when each is called so often by a thread of its own, starting at the same time."""
    found, start = ([], []), threading.Barrier(2)

    def run(function, results):
        start.wait()
        for _ in range(repeats):
            try:
                results.append(function())
            except Exception as error:
                results.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip((first, second), found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def check(solve, x, parts, repeats=15):
    others = torch.flip(x, [0]) * 0.5
    expected = [solve(x), solve(others)]
    before = [tensor for module in parts.modules() for tensor in (*module._parameters.values(), *module._buffers.values())]
    for results, wanted in zip(together(lambda: solve(x), lambda: solve(others), repeats), expected, strict=True):
        for result in results:
            assert not isinstance(result, Exception), result
            assert torch.equal(result, wanted)
    after = [tensor for module in parts.modules() for tensor in (*module._parameters.values(), *module._buffers.values())]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert torch.equal(solve(x), expected[0])


@pytest.mark.parametrize("name", networks.SMALL)
def test_a_network_in_evaluation(name):
    network, images = networks.build(name)
    check(torch.no_grad()(network.eval().forward), images, network)  # which is a mode of each thread


def expansion():
    torch.manual_seed(0)
    return Expansion([MLP(3, hidden=8) for _ in range(4)], Hat(4, depth=2))


FLOWS = {
    "expansion, euler": lambda: Flow(expansion(), "euler:h=0.25", 2),
    "expansion, dopri5": lambda: Flow(expansion(), "dopri5", 2),
    "expansion, torchdiffeq": lambda: Flow(expansion(), "dopri5:engine=torchdiffeq", 2),
    "norm": lambda: Flow(Autonomous(torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Tanh())), "rk4:h=0.5", 2),
    "noise, evaluated": lambda: Flow(StochasticDepth(MLP(3, hidden=4), 0.5), Brownian(h=0.5), 2),
    "scipy": lambda: Flow(MLP(3, hidden=4), "scipy_solver", 2),
}


@pytest.mark.parametrize("way", ["end", "between"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_in_evaluation(name, way):
    torch.manual_seed(0)
    flow = FLOWS[name]().eval()
    times = [0.0, 0.5, 2.0] if "noise" in name else [0.0, 0.3, 1.1, 2.0]
    solve = flow.forward if way == "end" else lambda x: flow.trajectory(x, times)
    check(torch.no_grad()(solve), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), flow)


def test_steps_for_each_image():
    pytest.importorskip("torchode")
    torch.manual_seed(0)
    flow = Flow(Autonomous(torch.nn.Linear(3, 3)), PerImage(), 1).eval()
    check(torch.no_grad()(flow.forward), torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), flow)


def test_gradients_with_respect_to_the_state():
    """Weights are common to the threads; the graph of each is its own."""
    flow = Flow(expansion().requires_grad_(False), "rk4:h=0.5", 2).eval()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(flow(x).square().sum(), x)[0]

    check(gradient, torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), flow)
