"""Refinement during training against training at full depth, on JPEG CIFAR-10: accuracy and time, three seeds each.

`preresnet(14)` has four layers in its flows; refined twice by 2 it has sixteen, each scaled by a quarter.

    OMP_NUM_THREADS=1 python experiments/refine.py --root data/cifar10 --out experiments/results/refine.json

Finished runs are kept in the file, and an interrupted call goes on with the next.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import continuum
from continuum.files import write_json
from continuum.training import Classifier, ImageFolder, OneCycle, Refine

EPOCHS = 10
SCHEDULES = {
    "shallow throughout": None,
    "refined at epochs 4 and 7": Refine([4, 7]),
    "deep from the start": Refine([0], factor=4),
}


class Clock(pl.Callback):
    """Seconds of processor time that each training epoch takes: on one thread, whatever else the machine is doing."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.process_time() - self.start)


def run(name: str, seed: int, root: str, images: int) -> dict[str, Any]:
    pl.seed_everything(seed)
    model = Classifier(continuum.zoo.preresnet(14, width=8), learning_rate=0.2, weight_decay=5e-4, schedule=OneCycle())
    data = ImageFolder(root, validation=0.1, train_size=images, seed=seed)
    refine, clock = SCHEDULES[name], Clock()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[clock, *([refine] if refine else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    tested = trainer.test(model, data, verbose=False)[0]
    return {
        "schedule": name,
        "seed": seed,
        "accuracy": tested["test/accuracy"],
        "loss": tested["test/loss"],
        "seconds": clock.seconds,
        "layers": sum(int(flow.depth) for flow in model.network.flows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data/cifar10", help="JPEG CIFAR-10 in class folders")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/refine.json"))
    parser.add_argument("--images", type=int, default=10_000)
    options = parser.parse_args()
    facts = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "images": options.images,
        "epochs": EPOCHS,
    }
    content = json.loads(options.out.read_text()) if options.out.exists() else {**facts, "runs": []}
    done = {(row["schedule"], row["seed"]) for row in content["runs"]}
    for seed in range(3):
        for name in SCHEDULES:
            if (name, seed) not in done:
                content["runs"].append(run(name, seed, options.root, options.images))
                write_json(content, options.out)
                print(json.dumps(content["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
