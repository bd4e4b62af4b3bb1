"""What augmentation does to pictures whose geometry is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from examples.brain_tumor.settings import AugmentationSettings
from examples.brain_tumor.training.batches import affine_maps, augment

OFF = {
    "rotation_degrees": 0.0,
    "brightness": 0.0,
    "zoom": 1.0,
    "flip_left_right": False,
    "flip_up_down": False,
}
COUNT, SIZE = 400, 48
AXIS = torch.arange(SIZE) - (SIZE - 1) / 2  # pixels from the centre


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(**settings):
    return AugmentationSettings(**{**OFF, **settings})


def blobs(x, y):
    """Many copies of one soft blob, centred x right of the middle and y below it."""
    blob = torch.exp(-((AXIS[None] - x) ** 2 + (AXIS[:, None] - y) ** 2) / 8)
    return blob.expand(COUNT, 1, SIZE, SIZE)


def centres(images):
    """(n,) x and y of the centres of mass."""
    weights = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    return (weights * AXIS).sum((1, 2)), (weights * AXIS[:, None]).sum((1, 2))


def test_off_is_the_identity():
    images = torch.rand(5, 1, SIZE, SIZE)
    torch.testing.assert_close(augment(images, only(), seeded()), images, rtol=0, atol=1e-5)


def test_rotation_stays_within_its_range():
    x, y = centres(augment(blobs(12, 0), only(rotation_degrees=15.0), seeded()))
    degrees = torch.atan2(y, x).rad2deg()
    assert degrees.abs().max() < 15.1
    assert degrees.max() > 14
    assert degrees.min() < -14
    assert degrees.mean().abs() < 3 * (30 / math.sqrt(12)) / math.sqrt(COUNT)
    torch.testing.assert_close(torch.hypot(x, y), torch.full((COUNT,), 12.0), rtol=0.01, atol=0)


def test_zoom_magnifies_within_its_range():
    x, y = centres(augment(blobs(8, 6), only(zoom=1.25), seeded()))
    magnification = torch.hypot(x, y) / 10
    assert magnification.min() > 0.995
    assert magnification.max() < 1.255
    assert magnification.min() < 1.02
    assert magnification.max() > 1.23
    direction = torch.full((COUNT,), math.atan2(6, 8))
    torch.testing.assert_close(torch.atan2(y, x), direction, rtol=0, atol=0.005)


def test_flips_are_independent_and_fair():
    images = torch.rand(SIZE, SIZE)
    flipped = augment(
        images.expand(COUNT, 1, SIZE, SIZE), only(flip_left_right=True, flip_up_down=True), seeded()
    )[:, 0]
    counts = []
    for axes in ((), (0,), (1,), (0, 1)):
        same = (flipped - images.flip(axes)).abs().amax((1, 2)) < 1e-4
        counts.append(same.sum().item())
    assert sum(counts) == COUNT
    # Four standard deviations of a binomial count around a quarter.
    assert all(abs(count - COUNT / 4) < 4 * math.sqrt(COUNT * 3 / 16) for count in counts)


def test_brightness_scales_whole_images_and_saturates():
    images = torch.full((COUNT, 1, 4, 4), 0.5)
    bright = augment(images, only(brightness=0.2), seeded())
    factors = bright[:, 0, 0, 0] / 0.5
    torch.testing.assert_close(bright, (0.5 * factors)[:, None, None, None].expand_as(bright))
    assert 0.8 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.2 + 1e-6
    assert augment(images * 2, only(brightness=0.2), seeded()).max() == 1


def test_corners_from_outside_are_black():
    turned = augment(torch.ones(COUNT, 1, SIZE, SIZE), only(rotation_degrees=45.0), seeded())
    assert turned[:, 0, 0, 0].min() == 0
    assert turned[:, 0, SIZE // 2, SIZE // 2].min() == pytest.approx(1)


def test_maps_are_exact():
    images = torch.rand(1, 1, 10, 10)
    none, false = torch.zeros(1), torch.tensor([False])

    def moved(**changes):
        maps = affine_maps(
            **{"angles": none, "zooms": none + 1, "flips_x": false, "flips_y": false, **changes}
        )
        return F.grid_sample(
            images,
            F.affine_grid(maps, list(images.shape), align_corners=False),
            align_corners=False,
        )

    quarter = moved(angles=none + math.pi / 2)
    torch.testing.assert_close(quarter, images.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    across = moved(flips_x=~false)
    torch.testing.assert_close(across, images.flip(3), rtol=0, atol=1e-5)
    doubled = moved(zooms=none + 2)
    inner = F.interpolate(images, scale_factor=2, mode="bilinear")[:, :, 5:15, 5:15]
    torch.testing.assert_close(doubled, inner, rtol=0, atol=1e-5)


def test_generator_decides_everything():
    images = torch.rand(6, 1, 16, 16)
    settings = AugmentationSettings()
    first, again, other = (augment(images, settings, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(augment(images, settings, seeded()), first)


def test_input_is_kept_and_output_is_float32():
    images = torch.rand(3, 1, 16, 16).half()
    before = images.clone()
    result = augment(images, AugmentationSettings(), seeded())
    assert result.dtype == torch.float32
    assert result.shape == images.shape
    assert torch.equal(images, before)
    torch.testing.assert_close(
        result, augment(before.float(), AugmentationSettings(), seeded()), rtol=0, atol=0
    )


def test_float32_input_is_kept():
    images = torch.rand(3, 1, 16, 16)
    before = images.clone()
    augment(images, AugmentationSettings(), seeded())
    assert torch.equal(images, before)


@pytest.mark.parametrize(("name", "axis"), [("flip_left_right", 2), ("flip_up_down", 1)])
def test_each_flip_exchanges_its_own_ends(name, axis):
    images = torch.rand(COUNT, 1, SIZE, SIZE, generator=seeded())
    flipped = augment(images, only(**{name: True}), seeded())
    for before, after in zip(images, flipped, strict=True):
        unchanged = torch.allclose(before, after, atol=1e-4)
        assert unchanged or torch.allclose(before.flip(axis), after, atol=1e-4)
    assert not torch.allclose(images, flipped, atol=1e-2)
