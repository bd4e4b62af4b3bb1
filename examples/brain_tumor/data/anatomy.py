"""The heads that phantoms are cut from.

One template head: the grey- and white-matter maps of the MNI ICBM152 average brain, which
nilearn's wheel ships, inside a drawn skull, scalp, face and neck. One patient: a smooth
deformation of that template. All points are millimetres in the template's axes (x to the right,
y forward, z up).

Intensities are those of a T1-weighted slice with contrast agent; the fat of the scalp is about 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

AIR, BONE, FLUID, MARROW, MUSCLE = 0.0, 0.05, 0.11, 0.24, 0.34
SKIN, MUCOSA, VESSEL, FAT = 0.55, 0.62, 0.80, 0.95

Grid = Sequence[np.ndarray]  # x, y and z of a grid's points, each along its own axis

SPACING = 2  # mm between the voxels of what is drawn around the brain
SELLA = (0.0, 2.0, -33.0)

# intensity, centre, radii; painted in this order, and mirrored where x is not 0.
ELLIPSOIDS = (
    (0.42, (0, -11, -50), (10, 7, 14)),  # clivus
    (0.85, (31, 56, -34), (17, 20, 15)),  # orbit
    (FLUID, (32, 67, -34), (12, 12, 12)),  # eye
    (AIR, (26, 47, -63), (12, 14, 13)),  # maxillary sinus
    (AIR, (0, 20, -44), (12, 13, 9)),  # sphenoid sinus
    (AIR, (48, -34, -46), (8, 12, 9)),  # mastoid cells
    (0.44, (0, 44, -104), (24, 34, 18)),  # tongue
    (AIR, (0, 8, -88), (9, 5, 26)),  # pharynx
    (0.66, (11, 1, -34), (4, 9, 5)),  # cavernous sinus
    (0.70, SELLA, (6, 5, 4)),  # healthy pituitary gland
)

# plane: what points to the right and upwards on its pictures, what lies across, and its middle
PLANES = {
    "sagittal": ((0, -1, 0), (0, 0, 1), (1, 0, 0), (0, -18, -2)),  # the face to the left
    "coronal": ((1, 0, 0), (0, 0, 1), (0, 1, 0), (0, -18, -2)),
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -18, 5)),  # the face upwards
}


@dataclass(frozen=True)
class Volume:
    """Values on a regular grid in space."""

    values: torch.Tensor  # (channels, x, y, z)
    corner: torch.Tensor  # where the first voxel's centre lies, in mm
    spacing: float  # distance between neighbouring voxels, in mm

    def at(self, points: torch.Tensor) -> torch.Tensor:
        """Interpolate at points (..., 3) to (channels, ...); outside the grid its faces go on."""
        last = torch.tensor(self.values.shape[1:]) - 1
        grid = (points - self.corner) * (2 / (self.spacing * last)) - 1
        values = functional.grid_sample(
            self.values.transpose(1, 3)[None],  # grid_sample wants x last
            grid.view(1, 1, 1, -1, 3),
            align_corners=True,
            padding_mode="border",
        )
        return values.view(-1, *points.shape[:-1])


def smooth_noise(
    generator: np.random.Generator, cells: Sequence[int], reach: float, voxels: int = 48
) -> Volume:
    """Draw smooth random fields of unit variance on the cube [-reach, reach]^3, in mm.

    `cells` says for each channel how many independent values lie along a side.
    """
    channels = []
    for count in cells:
        coarse = generator.standard_normal((count, count, count))
        spline = ndimage.zoom(np.eye(count), (voxels / count, 1), order=3)
        fine = np.einsum("xi,yj,zk,ijk->xyz", spline, spline, spline, coarse, optimize=True)
        channels.append(fine / fine.std())
    values = torch.from_numpy(np.stack(channels)).float()
    return Volume(values, torch.full((3,), -reach), 2 * reach / (voxels - 1))


@dataclass(frozen=True)
class Tissue:
    """What a head is made of at some points, each (...)."""

    gray: torch.Tensor  # fraction of grey matter
    white: torch.Tensor  # fraction of white matter
    other: torch.Tensor  # intensity of everything that is not brain
    outside: torch.Tensor  # distance to the brain's convex surface in mm, negative inside


class Head:
    """The template head; takes about two seconds to build."""

    def __init__(self) -> None:
        # Here because only phantoms need it, and it takes seconds.
        from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

        maps = [load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1)]
        values = np.stack([image.get_fdata(dtype=np.float32) for image in maps])
        corner = torch.from_numpy(maps[0].affine[:3, 3]).float()
        self.brain = Volume(torch.from_numpy(values), corner, 1.0)
        self.surroundings = _draw_surroundings(self.brain)

    def at(self, points: torch.Tensor) -> Tissue:
        """Look up the tissue at points (..., 3)."""
        return Tissue(*self.brain.at(points), *self.surroundings.at(points))

    def find(self, region: str, generator: np.random.Generator) -> np.ndarray:
        """Draw a place (3,) in the white matter, on the falx or on the dura."""
        places = generator.uniform((-70, -100, -38), (70, 72, 78), (4096, 3))
        points = torch.from_numpy(places).float()
        tissue, side, height = self.at(points), points[:, 0].abs(), points[:, 2]
        outside = tissue.outside
        inside_region = {
            "white matter": (tissue.white > 0.75) & (side > 8) & (side < 50) & (outside < -8),
            "falx": (side < 4) & (height > 10) & (outside > -9) & (outside < -1),
            "dura": (outside > -2.5) & (outside < 1),
        }[region]
        return places[inside_region.nonzero()[0].item()]


class Anatomy:
    """One patient's head: the template turned, stretched and smoothly warped."""

    def __init__(self, head: Head, generator: np.random.Generator) -> None:
        self.head = head
        # Close to a rotation by the antisymmetric part and a stretch by the diagonal.
        tilt = np.cross(np.eye(3), generator.normal(0, 0.07, 3))
        stretch = np.diag(generator.normal(0, 0.045, 3))
        self.linear = torch.from_numpy(np.eye(3) + tilt + stretch).float()
        self.warp = smooth_noise(generator, (6, 6, 6), reach=140)
        self.warp_size = generator.uniform(0.8, 1.8)
        self.gray = generator.normal(0.33, 0.02)
        self.white = self.gray + generator.uniform(0.04, 0.11)
        self.scalp = generator.uniform(0.8, 1.15)

    def to_template(self, points: torch.Tensor) -> torch.Tensor:
        """Where in the template a patient's points (..., 3) lie."""
        return points @ self.linear.T + self.warp_size * self.warp.at(points).movedim(0, -1)

    def from_template(self, place: np.ndarray) -> torch.Tensor:
        """Where in the patient one place (3,) of the template lies."""
        target = torch.tensor(place, dtype=torch.float32)
        points = target
        for _ in range(8):  # the deformation is small: the fixed point is soon reached
            points = points + target - self.to_template(points)
        return points

    def image(self, points: torch.Tensor) -> tuple[torch.Tensor, Tissue]:
        """Intensity and tissue of the healthy head at the patient's points."""
        tissue = self.head.at(self.to_template(points))
        shell = torch.where(tissue.outside > 3, self.scalp, 1.0) * tissue.other
        rest = (1 - tissue.gray - tissue.white).clamp(0, 1)
        return tissue.gray * self.gray + tissue.white * self.white + rest * shell, tissue


def slice_points(
    plane: str, through: torch.Tensor, size: int, field_of_view: float
) -> torch.Tensor:
    """The points (size, size, 3) of a slice that cuts one place, with the head in its middle."""
    right, up, across, middle = torch.tensor(PLANES[plane]).float()
    middle = torch.where(across > 0, through, middle)
    offset = ((torch.arange(size) + 0.5) / size - 0.5) * field_of_view
    return middle - offset.view(-1, 1, 1) * up + offset.view(-1, 1) * right


def _draw_surroundings(brain: Volume, margin: int = 36, neck: int = 60) -> Volume:
    """Draw what the template lacks: intensity of the non-brain, and distance to the brain."""
    occupied = functional.max_pool3d(brain.values.sum(0)[None], SPACING, ceil_mode=True)[0]
    edge, below = margin // SPACING, neck // SPACING
    occupied = np.pad(occupied.numpy() > 0.1, ((edge, edge), (edge, edge), (below, edge)))
    hull = ndimage.binary_fill_holes(ndimage.binary_closing(occupied, iterations=5))
    outside = _depth(~hull) - _depth(hull)
    corner = brain.corner.numpy() + (SPACING - 1) / 2 - (margin, margin, neck)
    axes = [start + SPACING * np.arange(n) for start, n in zip(corner, hull.shape, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    points = torch.from_numpy(np.stack(np.broadcast_arrays(*grid), axis=-1)).float()
    noise = smooth_noise(np.random.default_rng(0), (24, 24, 36), reach=130, voxels=72)

    picture = _paint(outside, _outline(outside, grid), grid, noise.at(points).numpy())
    picture = ndimage.gaussian_filter(picture, 0.55)
    values = torch.from_numpy(np.stack([picture, outside]))
    return Volume(values, torch.from_numpy(corner).float(), SPACING)


def _outline(outside: np.ndarray, grid: Grid) -> np.ndarray:
    """The inside of the skin: around the brain, and drawn downwards for face and neck."""
    x, y, z = grid
    head = outside < 15
    widest = head[:, :, np.abs(z + 18).argmin(), None]
    jaw = (np.abs(x) < 74 + 0.22 * z) & (y < 88) & (y > -110 - 0.25 * z.clip(-110, -60))
    nose = (np.abs(x) < 12) & (y > 70) & (y < 76 - 0.3 * z) & (z < -22) & (z > -66)
    head |= (widest & jaw & (z < -18)) | nose
    return ndimage.gaussian_filter(head.astype(np.float32), 2.2) > 0.5


def _paint(outside: np.ndarray, head: np.ndarray, grid: Grid, texture: np.ndarray) -> np.ndarray:
    """Paint the layers from the outermost face to the brain's surface, later over earlier."""
    x, y, z = grid
    depth = _depth(head)
    picture = np.where(head, MUSCLE + 0.05 * texture[2], AIR)

    def paint(intensity: np.ndarray | float, region: np.ndarray) -> None:
        np.copyto(picture, intensity, where=region)

    paint(0.65, head & (np.abs(texture[0]) < 0.11))  # fat between the muscles
    paint(np.where(texture[1] > 0, MUCOSA, AIR), _ellipsoid(grid, (0, 48, -56), (13, 34, 20)))
    paint(BONE, _ellipsoid(grid, (0, 68, -92), (26, 12, 12)))  # teeth
    spine = (x / 13) ** 2 + ((y + 26) / 10) ** 2 < 1
    paint(np.where(np.cos(z / 3) > -0.6, 0.5, BONE), spine & (z < -72))
    paint(FLUID, ((x / 9) ** 2 + ((y + 46) / 8) ** 2 < 1) & (z < -66))  # around the spinal cord
    paint(FAT + 0.05 * texture[2], head & (depth < 6.5 + texture[2]))
    paint(SKIN, head & (depth < 2))
    diploe = np.exp(-(((outside - 6.5) / 1.6) ** 2))
    skull = (outside > 2.5) & (outside < 10.5) & head & (depth > 4) & (z > -60)
    paint(BONE + MARROW * diploe, skull)
    for intensity, (right, forward, up), radii in ELLIPSOIDS:
        for side in {right, -right}:
            paint(intensity, _ellipsoid(grid, (side, forward, up), radii))
    paint(AIR, _ellipsoid(grid, (0, 62, -12), (12, 7, 10)) & (outside > 2))  # frontal sinus
    paint(FLUID, outside <= 2.0)
    paint(0.34, (outside > 1.5) & (outside <= 2.6) & (z > -40))  # dura
    # Two noises vanish together along curves: vessels, seen where they run through fluid.
    paint(VESSEL, (np.abs(texture[0]) < 0.14) & (np.abs(texture[1]) < 0.14) & (outside < 2))
    paint(VESSEL, (np.abs(x) < 4) & (outside > -1) & (outside < 6) & (z > -12))  # sagittal sinus
    return picture.astype(np.float32)


def _ellipsoid(grid: Grid, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    parts = zip(grid, centre, radii, strict=True)
    return sum(((axis - middle) / radius) ** 2 for axis, middle, radius in parts) < 1


def _depth(region: np.ndarray) -> np.ndarray:
    """Distance in mm from each point of a region to its edge; 0 outside."""
    return ndimage.distance_transform_edt(region, sampling=SPACING).astype(np.float32)
