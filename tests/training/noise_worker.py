"""One of two processes that train a stochastic network together: `python noise_worker.py RANK FOLDER`.

Lightning starts one process a rank from these variables, as torchrun would; the ranks write what they drew and learnt.
"""

import os
import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from runs import quiet_trainer

import continuum
from continuum.training import Classifier, Digits, Nesterov


class Watched(Classifier):
    """Keeps which layers were dropped, and the numbers that torch's generator gave inside a step."""

    drawn: list[list[bool]]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.drawn.append(torch.rand(8).lt(0.5).tolist())
        return super().forward(images)


def main(rank: int, folder: Path, solver: str, port: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    pl.seed_everything(0)
    network = continuum.zoo.stochastic_depth_resnet(14, width=8, in_channels=1, solver=solver)
    model = Watched(network, partial(Nesterov, lr=0.01))
    model.drawn = []
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer = quiet_trainer(max_steps=4, devices=2, strategy=strategy, limit_val_batches=0)
    trainer.fit(model, Digits(batch_size=16, train_size=128, crop=0))
    weights = {name: p.detach() for name, p in network.named_parameters()}
    torch.save({"drawn": model.drawn, "weights": weights}, folder / f"{rank}.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
    os._exit(0)  # threads of torch may abort the interpreter at its exit, when all is done and saved
