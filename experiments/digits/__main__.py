"""How the recipe of `make demo` was chosen: by accuracy on the validation images, never on the test images.

A seed chooses the weights, the order of the batches and the 144 images that are held out.
"""

from functools import partial

import pytorch_lightning as pl

from continuum.training import Classifier, Digits, Nesterov, OneCycle
from continuum.zoo import odenet
from experiments.common import Experiment, Row, spread, table


def validated(recipe: Row, seed: int) -> Row:
    """Accuracy in % and loss on the held-out images after training."""
    pl.seed_everything(seed, verbose=False)
    tolerance = recipe["tolerance"]
    network = odenet(width=16, downsample=False, solver=f"dopri5:rtol={tolerance},atol={tolerance}")
    trainer = pl.Trainer(
        max_epochs=recipe["epochs"],
        accelerator="cpu",
        check_val_every_n_epoch=recipe["epochs"],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    classifier = Classifier(network, partial(Nesterov, lr=recipe["learning_rate"]), schedule=OneCycle(recipe["warmup"]))
    trainer.fit(classifier, Digits(batch_size=recipe["batch_size"], seed=seed))
    found = trainer.callback_metrics
    return {"accuracy": round(100 * float(found["val/accuracy"]), 2), "loss": round(float(found["val/loss"]), 4)}


def report(experiment: Experiment) -> str:
    rows = []
    for recipe in experiment.settings["recipes"]:
        runs = experiment.chosen(**recipe)
        measures = (("accuracy", 2), ("loss", 3), ("seconds", 0))
        rows.append([*map(str, recipe.values()), *(spread([run[name] for run in runs], digits) for name, digits in measures)])
    names = [name.replace("_", " ") for name in experiment.settings["recipes"][0]]
    return table([*names, "validation accuracy (%)", "loss", "seconds"], rows)


def main() -> None:
    experiment = Experiment(__file__, __doc__)
    for seed in experiment.settings["seeds"]:
        for recipe in experiment.settings["recipes"]:
            experiment.run({**recipe, "seed": seed}, partial(validated, recipe, seed))
    experiment.publish(report(experiment))


if __name__ == "__main__":
    main()
