"""Slices to train on in a second: one bright blob each, whose place tells the class."""

import dataclasses
import functools
import io
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from examples.brain_tumor.data import phantoms
from examples.brain_tumor.data.slices import SliceSet
from examples.brain_tumor.data.splits import Split
from examples.brain_tumor.evaluation import classifiers
from examples.brain_tumor.settings import load_settings
from examples.brain_tumor.training.loop import train
from examples.brain_tumor.use import export as export_module

SIZE = 32
PLACES = ((8, 8), (8, 24), (24, 16))  # of the blob's centre, by class


@pytest.fixture(autouse=True, scope="session")
def one_head():
    """The template head, always the same, is built once and not for every set of phantoms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "Head", functools.cache(phantoms.Head))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_trees():
    """A random forest that takes no time, in a module where its answers do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifiers, "TREES", 5)
        yield


@pytest.fixture
def blank_figures(monkeypatch, few_trees):
    """Reports that take no time: each figure is one pixel, and the random forest small."""
    pixel = io.BytesIO()
    Image.new("L", (1, 1)).save(pixel, "PNG")
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **given: path.write_bytes(pixel.getvalue())
    )


@pytest.fixture
def traced(monkeypatch):
    """Exporters that take no time, and write what files answered with; the modules given them."""
    modules = []
    monkeypatch.setattr(export_module, "_trace", lambda module, size: modules.append(module))
    for kind in ("torch", "onnx"):
        content = kind.encode()
        monkeypatch.setattr(export_module, f"_{kind}_bytes", lambda *given, made=content: made)
        monkeypatch.setattr(export_module, f"_run_{kind}", lambda content: modules[-1])
    return modules


def make_blobs():
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
def blobs():
    """24 slices, eight of each class."""
    return make_blobs()


@pytest.fixture
def scaled(blobs):
    """The blobs as the loader leaves them, each from 0 to 1."""
    images = blobs.images.float()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return dataclasses.replace(blobs, images=((images - low) / (high - low)).half())


@pytest.fixture(scope="session")
def blob_split():
    """The first 15 slices against the last 9."""
    return Split(
        train=torch.arange(15), test=torch.arange(15, 24), name="blobs", description="By number."
    )


@pytest.fixture(scope="session")
def held_split():
    """The same, but with three of the first held out to calibrate on."""
    return Split(
        train=torch.arange(12),
        test=torch.arange(15, 24),
        name="blobs",
        description="By number.",
        calibration=torch.arange(12, 15),
    )


@pytest.fixture(scope="session")
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
            "precision": "float32",  # bfloat16 answers differ by size of batch
            "flip_left_right": False,
            "flip_up_down": False,
            "rotation_degrees": 5.0,
            "views": 1,
        },
    )


@pytest.fixture(scope="session")
def blob_run(tmp_path_factory, tiny_settings, blob_split):
    """A run of the blobs that its tests only read; training takes long."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_settings, make_blobs(), blob_split, out)
    return out


@pytest.fixture
def trained(tmp_path, blob_run):
    """The same as a run of one's own to break."""
    return Path(shutil.copytree(blob_run, tmp_path / "run"))
