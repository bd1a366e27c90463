"""Data modules made ready, and folders of random images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from continuum.training import ImageData


def ready(data: ImageData) -> Any:
    data.prepare_data()
    data.setup()
    return data


def write_images(root: Path, counts: dict[str, int], height: int = 8, width: int = 8) -> None:
    """Random images `<root>/<folder>/<number>.png`, so many in each folder."""
    generator = torch.Generator().manual_seed(len(str(root)))
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / folder / f"{number}.png")
