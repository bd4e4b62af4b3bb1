"""Slices to train on in a second: one bright blob each, whose place tells the class."""

import pytest
import torch

from examples.brain_tumor.settings import load_settings
from examples.brain_tumor.slices import SliceSet, Split

SIZE = 32
PLACES = ((8, 8), (8, 24), (24, 16))  # of the blob's centre, by class


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def blobs():
    """24 slices, eight of each class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    images = torch.rand(24, 1, SIZE, SIZE, generator=generator) * 0.2
    for image, label in zip(images, labels, strict=True):
        row, column = PLACES[label]
        image[0, (rows - row) ** 2 + (columns - column) ** 2 < 36] += 0.8
    return SliceSet(
        images=images.half(),
        labels=labels,
        numbers=list(range(1, 25)),
        patients=[f"patient{i // 3}" for i in range(24)],
        folds=None,
        synthetic=True,
    )


@pytest.fixture
def blob_split():
    """The first 15 slices against the last 9."""
    return Split(
        train=torch.arange(15), test=torch.arange(15, 24), name="blobs", description="By number."
    )


@pytest.fixture
def tiny_settings():
    """A network small enough for the blobs, which it need not turn around to know."""
    return load_settings(
        "quick",
        {
            "image_size": SIZE,
            "width": 0.25,
            "annealing_gamma": 0.12,
            "embedding_size": 16,
            "batch_size": 7,
            "epochs": 2,
            "flip_left_right": False,
            "flip_up_down": False,
            "rotation_degrees": 5.0,
        },
    )
