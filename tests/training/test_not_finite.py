"""What is no number is found before a weight changes, and said and counted where networks are evaluated."""

import csv
from pathlib import Path

import pytest
import torch
from runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from continuum.analysis.compare import compare_solvers
from continuum.cli import main
from continuum.models import Network
from continuum.solvers import SolveError, parse
from continuum.training import Classifier
from continuum.zoo import odenet, preresnet


def images(scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8)


def fails_at_the_last_batch(model: Classifier, last: tuple[Tensor, Tensor], message: str) -> None:
    """Two batches are trained on; weights and statistics stay those from before the second."""
    (first, labels), (second, others) = images(), last
    loader = DataLoader(TensorDataset(torch.cat([first, second]), torch.cat([labels, others])), batch_size=8)
    states = []
    model.on_train_batch_start = lambda *_: states.append(  # type: ignore[method-assign, assignment]
        {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    )
    with pytest.raises(SolveError, match=message):
        quiet_trainer(max_epochs=1).fit(model, loader)
    assert len(states) == 2
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, states[1][name]), name


class RootLoss(nn.Module):
    """A loss whose value is finite everywhere, and whose gradient is not at a label of zero alone."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.square().mean() * labels.sum()).sqrt()


def test_a_gradient() -> None:
    torch.manual_seed(0)
    model = Classifier(preresnet(14, width=4))
    model.loss = RootLoss()  # type: ignore[assignment]
    fails_at_the_last_batch(model, (images()[0], torch.zeros(8, dtype=torch.int64)), r"the gradient of \S+ is not finite")


def test_statistics() -> None:
    torch.manual_seed(0)
    fails_at_the_last_batch(Classifier(preresnet(14, width=4)), images(1e20), r"the statistics \S+running_var are not finite")


def broken_network() -> Network:
    torch.manual_seed(0)
    network = odenet(width=8, in_channels=1, downsample=False)
    with torch.no_grad():
        next(network.head.parameters()).fill_(float("nan"))
    return network


def test_evaluation_says_how_many() -> None:
    model, data = Classifier(broken_network()), TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 10)
    loader = DataLoader(data, batch_size=5)
    with pytest.warns(UserWarning, match="12 of 12 images are not finite"):
        quiet_trainer().validate(model, loader, verbose=False)
    with pytest.raises(SolveError, match="12 of 12 images are not finite"):
        quiet_trainer().test(model, loader, verbose=False)
    with pytest.raises(SolveError, match="12 of 12 images are not finite"):
        quiet_trainer().predict(model, loader)
    batches = [(torch.randn(3, 1, 8, 8), torch.arange(3))]
    with pytest.raises(SolveError, match="3 of 3 images are not finite"):
        list(compare_solvers(broken_network().eval(), batches, [parse("euler")], torch.device("cpu")))


@pytest.mark.usefixtures("command_line")
def test_the_command_line_ends_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    main(["fit", *quiet, "--trainer.max_steps", "1"])
    path = Path("checkpoints/last.ckpt")
    content = torch.load(path, weights_only=True)
    *_, bias = (tensor for name, tensor in content["state_dict"].items() if name.startswith("network.head"))
    bias.fill_(float("nan"))
    torch.save(content, path)
    for command in (["test", *quiet, "--ckpt_path", str(path)], ["predict", *quiet, "--ckpt_path", str(path)]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 1
        assert "of 359 images are not finite" in capsys.readouterr().err
    with open("checkpoints/predictions.csv") as file:
        assert {row["class"] for row in csv.DictReader(file)} == {""}
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(path), "--solver", "euler:h=1"])
    assert ended.value.code == 1
    assert "images are not finite" in capsys.readouterr().err
