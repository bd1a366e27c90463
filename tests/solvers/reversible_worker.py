"""One of two processes that train a reversible flow together: `python reversible_worker.py RANK FOLDER`."""

import os
import sys

import torch
from torch import nn

from continuum import Autonomous, Coupled, Flow, PiecewiseConstant


def half() -> Autonomous:
    return Autonomous(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))


def main(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    field = PiecewiseConstant(Coupled(half(), half()).scaled(0.1) for _ in range(5))
    model = nn.Sequential(nn.Linear(4, 6), Flow(field, "coupling:gradient=reversible", 5), nn.Linear(6, 2)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    if rank == 0:
        model(x).square().mean().backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/alone.pt")
        model.zero_grad()

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # a second step, because DistributedDataParallel rebuilds its buckets after the first
        model.zero_grad()
        parallel(x[4 * rank : 4 * rank + 4]).square().mean().backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    # One process must not take the group down, nor end, while the other still talks to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    # Once in some forty runs a thread of torch aborts the interpreter at its exit, when all is done and saved.
    os._exit(0)
