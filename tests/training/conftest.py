"""A folder of images."""

from pathlib import Path

import pytest
from pictures import write_images


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Twenty training images and six test images of two classes."""
    write_images(tmp_path / "images", {"train/cat": 11, "train/dog": 9, "test/cat": 4, "test/dog": 2})
    return str(tmp_path / "images")
