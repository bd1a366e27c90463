"""Networks as programs that run without this library: torch.export's, or ONNX; checked before the file appears."""

import copy
import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from continuum.files import whole_file
from continuum.models.network import Network
from continuum.types import Images, Logits

SUFFIXES = (".pt2", ".onnx")
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """An exported program that does not compute what the network computes; no file was written."""


def export(network: Network, path: str | os.PathLike[str], images: Images) -> float:
    """Write `network` in evaluation mode to `path`, as a program for any number of images of the size of `images`.

    The suffix decides: .pt2 is a program of torch.export, .onnx an ONNX model (which needs the extra `export`). What was
    written is read again and run on `images` and on batches of other sizes. Returns the largest difference from the network's
    own logits, relative to the largest logit.

    Raises:
        ValueError: another suffix, or no images.
        TypeError: an adaptive solver, whose steps depend on the images.
        ImportError: the packages for ONNX are not installed.
        ExportError: a relative difference of more than 1e-4.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"an export is a file {' or '.join(SUFFIXES)}, not {str(path)!r}")
    if not len(images):
        raise ValueError("an export needs one image or more, to be traced and checked with")
    for index, flow in enumerate(network.flows):
        if flow.solver.steps(0.0, flow.depth) is None:
            raise TypeError(
                f"flow {index} of this network is solved by {flow.solver}, whose steps depend on the images: export "
                "network.frozen(images), or the network under a solver with fixed steps, such as 'rk4:h=0.25'"
            )
    if suffix == ".onnx":
        _require_onnx()
    network = copy.deepcopy(network).eval()  # tracing leaves its mark on what it traced
    several = images if len(images) > 1 else images.repeat_interleave(2, dim=0)  # a batch of one would be taken for a constant
    batches = (images, images[:1], torch.cat([several, images[:1]]))
    with torch.no_grad(), whole_file(path) as temporary:
        run = (_torch_program if suffix == ".pt2" else _onnx_program)(network, temporary, several)
        difference = max(_difference(run(batch), network(batch)) for batch in batches)
        if not difference <= TOLERANCE:  # nor is it where it is not a number
            raise ExportError(f"the export to {path} differs from the network by {difference:.2g}, more than {TOLERANCE:g}")
    return difference


def _difference(logits: Tensor, expected: Tensor) -> float:
    if logits.shape != expected.shape:
        return float("inf")
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((logits.to(expected.device) - expected).abs().max() / largest)


def _torch_program(network: Network, path: Path, images: Images) -> Callable[[Images], Logits]:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    written = io.BytesIO()  # torch's writer of files ends the process where the disk is full
    torch.export.save(program, written)
    path.write_bytes(written.getbuffer())
    return torch.export.load(path).module()


def _onnx_program(network: Network, path: Path, images: Images) -> Callable[[Images], Logits]:
    import onnxruntime

    torch.onnx.export(
        network,
        (images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,  # a second file would be left behind when the first is renamed to its place
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.cpu().numpy()})[0])


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"an ONNX file needs {' and '.join(missing)}: pip install 'continuum-ode[export]'")
