"""Noise during training, discrete and as an SDE, on JPEG CIFAR-10: accuracy, loss and the gap between training and test.

Two networks of 14 layers, each with its published noise, with that noise's SDE, and without any; three seeds each:

    OMP_NUM_THREADS=1 python experiments/noise.py --root data/cifar10 --out experiments/results/noise

Finished runs are kept in the file, and an interrupted call goes on with the next. `--network` runs one of the two.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import continuum
from continuum.files import write_json
from continuum.training import Classifier, ImageFolder, OneCycle
from continuum.training.images import LabelledImages

EPOCHS = 10
depth = partial(continuum.zoo.stochastic_depth_resnet, 14, width=8)
shake = partial(continuum.zoo.shake_shake, 14, width=8)
BROWNIAN = "euler_maruyama:increments=brownian,h="
CONFIGURATIONS: dict[str, dict[str, Callable[[], continuum.Network]]] = {
    "stochastic depth": {
        "no noise": partial(depth, last=1.0),
        "discrete": depth,
        "SDE, h = 1": partial(depth, solver=BROWNIAN + "1"),
        "SDE, h = 1/2": partial(depth, solver=BROWNIAN + "0.5"),
    },
    "shake-shake": {
        "no noise": partial(shake, forward_mode="even", backward_mode="even"),
        "discrete": shake,
        "SDE, h = 1": partial(shake, backward_mode="keep", solver=BROWNIAN + "1"),
    },
}


def run(network: str, noise: str, seed: int, root: str, images: int) -> dict[str, Any]:
    start = time.process_time()
    pl.seed_everything(seed)
    model = Classifier(CONFIGURATIONS[network][noise](), learning_rate=0.2, weight_decay=5e-4, schedule=OneCycle())
    data = ImageFolder(root, validation=0.1, train_size=images, seed=seed)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    seconds = time.process_time() - start
    model.network.eval()
    assert data.train_images is not None
    assert data.test_images is not None
    train_accuracy, train_loss = evaluated(model.network, data, data.train_images, data.train_indices)
    accuracy, loss = evaluated(model.network, data, data.test_images, torch.arange(len(data.test_images)))
    return {
        "network": network,
        "noise": noise,
        "seed": seed,
        "accuracy": accuracy,
        "loss": loss,
        "train_accuracy": train_accuracy,
        "train_loss": train_loss,
        "seconds": seconds,
    }


@torch.no_grad()
def evaluated(network: continuum.Network, data: ImageFolder, images: LabelledImages, indices: Tensor) -> tuple[float, float]:
    """Accuracy and loss of the drift on these images as they are, neither shifted nor mirrored."""
    right, loss = 0.0, 0.0
    for batch in indices.split(500):
        inputs, labels = data.on_after_batch_transfer(images[batch, -1], 0)
        logits = network(inputs)
        right += float((logits.argmax(1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
    return right / len(indices), loss / len(indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data/cifar10", help="JPEG CIFAR-10 in class folders")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/noise"), help="folder for a file a network")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--network", choices=CONFIGURATIONS, help="run this one only")
    options = parser.parse_args()
    for network in [options.network] if options.network else CONFIGURATIONS:
        runs(network, options.root, options.images, options.out / f"{network.replace(' ', '_')}.json")


def runs(network: str, root: str, images: int, path: Path) -> None:
    """Every configuration of one network, with three seeds each, into the file at `path`; what it holds already is kept."""
    facts = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "images": images,
        "epochs": EPOCHS,
    }
    content = json.loads(path.read_text()) if path.exists() else {**facts, "runs": []}
    done = {(row["noise"], row["seed"]) for row in content["runs"]}
    for seed in range(3):
        for noise in CONFIGURATIONS[network]:
            if (noise, seed) not in done:
                content["runs"].append(run(network, noise, seed, root, images))
                write_json(content, path)
                print(json.dumps(content["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
