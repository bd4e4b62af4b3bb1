"""Cutting the head out: found on phantoms and drawn heads, and left alone where there is none."""

import json

import numpy as np
import pytest

from examples.brain_tumor.data.crop import WHOLE, find_box, head_box
from examples.brain_tumor.data.matlab import read_slice
from examples.brain_tumor.data.phantoms import make_phantoms
from examples.brain_tumor.data.slices import load_slices

SIZE = 256


def head(row, column, tall, wide, size=SIZE, background=0, inside=300):
    """A filled ellipse with some structure in it."""
    rows, columns = np.mgrid[:size, :size]
    place = ((rows - row) / (tall / 2)) ** 2 + ((columns - column) / (wide / 2)) ** 2
    image = np.full((size, size), background, np.int16)
    image[place < 1] = inside + 60 * np.sin(rows / 9)[place < 1]
    return image


def expected(row, column, side):
    return np.s_[row - side / 2 : row + side / 2, column - side / 2 : column + side / 2]


def numbers(box):
    """The first and the last row, the first and the last column."""
    return [end for side in box for end in (side.start, side.stop)]


def assert_near(box, other, pixels=3):
    assert np.abs(np.subtract(numbers(box), numbers(other))).max() <= pixels


@pytest.mark.parametrize(
    ("row", "column", "tall", "wide"), [(120, 130, 160, 120), (110, 150, 100, 140)]
)
def test_a_square_around_the_head_with_four_percent_to_spare(row, column, tall, wide):
    box = head_box(head(row, column, tall, wide))
    top, bottom, left, right = numbers(box)
    assert bottom - top == right - left
    assert_near(box, expected(row, column, 1.04 * max(tall, wide)))


def test_the_square_stays_within_the_slice():
    box = head_box(head(70, 128, 130, 130))
    assert 0 <= box[0].start <= 4
    low = head_box(head(60, 128, 110, 150))  # its square would begin above the slice
    assert low[0].start == 0
    height, width = head(60, 128, 110, 150)[low].shape
    assert height == width == pytest.approx(156, abs=3)


@pytest.mark.parametrize("scale", [1, 0.01, 40])
def test_intensities_may_be_of_any_range(scale):
    image = head(120, 130, 160, 120)
    assert head_box(image * scale - 7 * scale) == head_box(image)


def test_a_bright_mark_in_a_corner_is_not_the_head():
    image = head(128, 128, 150, 120)
    clean = head_box(image)
    image[4:16, 236:248] = 4095  # far brighter than any tissue
    assert head_box(image) == clean


def test_noise_and_thin_lines_in_the_background_are_not_the_head():
    image = head(128, 128, 150, 120)
    clean = head_box(image)
    generator = np.random.default_rng(0)
    image = np.maximum(image, generator.integers(0, 25, image.shape)).astype(np.int16)
    image[:, 5] = 400
    assert_near(head_box(image), clean, 2)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((SIZE, SIZE), np.int16),  # black
        np.full((SIZE, SIZE), 100, np.int16),
        200 + 50 * np.sin(np.mgrid[:SIZE, :SIZE][0] / 5),  # no background anywhere
        head(128, 128, 256, 250),  # fills the slice
        head(128, 128, 40, 40),  # smaller than any head
        np.eye(SIZE) * 100,  # nothing solid
        np.ones((1, 1)),
    ],
    ids=["black", "grey", "no background", "full", "small", "thin", "pixel"],
)
def test_without_a_head_the_slice_stays_whole(image):
    assert head_box(image) == WHOLE
    assert image[head_box(image)].shape == image.shape


def test_none_keeps_everything():
    image = head(128, 128, 150, 120)
    assert find_box(image, "none") == WHOLE
    assert find_box(image, "head") == head_box(image)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, 24, seed=0, size=192, progress=False)
    return folder


def test_no_phantom_loses_a_pixel_of_its_tumour_or_most_of_its_head(phantoms):
    cropped = 0
    for number in range(1, 25):
        found = read_slice(phantoms / f"{number}.mat")
        box = head_box(found.image)
        assert found.mask[box].sum() == found.mask.sum()
        bright = found.image > found.image.min() + 0.2 * np.ptp(found.image)
        assert bright[box].sum() > 0.98 * bright.sum()
        cropped += box != WHOLE
    assert cropped > 12


def test_the_loader_keeps_crops_apart_and_knows_the_slices_again(phantoms, tmp_path):
    whole = load_slices(phantoms, 48, tmp_path, progress=False)
    heads = load_slices(phantoms, 48, tmp_path, progress=False, crop="head")
    again = load_slices(phantoms, 48, tmp_path, progress=False, crop="head")
    assert (again.images == heads.images).all()
    assert not (whole.images == heads.images).all()
    # The digest is of the slices as they are, whatever is made of them; one pixel changes it.
    assert whole.digest == heads.digest == again.digest
    assert len(whole.digest) == 64
    assert load_slices(phantoms, 32, tmp_path, progress=False).digest == whole.digest
    # The head is larger in its crop.
    brain = [(images.float() > 0.2).float().mean() for images in (heads.images, whole.images)]
    assert brain[0] > 1.1 * brain[1]


def test_other_pixels_under_the_same_numbers_have_another_digest(phantoms, tmp_path):
    from h5py import File

    before = load_slices(phantoms, 16, tmp_path / "cache", progress=False).digest
    with File(phantoms / "3.mat", "r+") as file:
        image = file["cjdata/image"]
        image[0, 0] += 1
    after = load_slices(phantoms, 16, tmp_path / "cache", progress=False).digest
    assert json.dumps(before) != json.dumps(after)
