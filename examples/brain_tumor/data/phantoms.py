"""Phantoms: synthetic slices in the Figshare archive's own format, for when no data are at hand.

Every patient is a deformed template head (see anatomy.py) with one tumour that is typical of its
class. Their slices go through the three planes in turn and their scanner's settings are drawn in
the same way for every class, so that only the tumour and its place tell the classes apart.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path

import contourpy
import h5py
import numpy as np
import torch
from numpy.random import Generator, default_rng
from tqdm import tqdm

from ..errors import UserError
from ..files import explained, locked, replacing, write_text
from .anatomy import PLANES, SELLA, Anatomy, Head, slice_points, smooth_noise
from .folders import MARKER_NAME, PHANTOM, PLANES_NAME, count_listed, is_phantom
from .matlab import LARGEST_SIDE

MARKER_TEXT = "These slices are synthetic phantoms; results on them say nothing about patients.\n"

CLASS_SHARES = (0.33, 0.37, 0.30)  # meningioma, glioma, pituitary
SLICES_PER_PATIENT = 4  # of the archive 13; more patients teach more than more slices
LEAST_PATIENTS = 5  # per class: one for each of five folds
MOST_SLICES = 999_999_999  # the largest number that a slice's name may have
LEAST_AREA = 80.0  # mm^2 of tumour on a slice


@dataclass(frozen=True)
class Tumour:
    """The shape and look of one tumour; lengths in mm."""

    centre: torch.Tensor  # (3,) in the patient
    radius: float
    stretch: torch.Tensor  # (3,) factors of the radius along x, y, z
    roughness: float  # how far its surface departs from an ellipsoid, as a fraction of the radius
    intensity: float  # of the enhancing part
    texture: float  # standard deviation of the intensity inside
    rim: float = math.inf  # thickness of the enhancing part, below which lies the core
    core: float = 0.2  # intensity of the core
    oedema: float = 0.0  # how far the swelling around it reaches
    dural_tail: bool = False  # whether the dura beside it enhances too
    inside_dura: bool = True  # whether the dura bounds it


def _normal(generator: Generator, mean: float, spread: float, low: float, high: float) -> float:
    return float(np.clip(generator.normal(mean, spread), low, high))


def _stretch(generator: Generator, spread: float) -> torch.Tensor:
    return torch.from_numpy(np.exp(generator.normal(0, spread, 3))).float()


def _meningioma(anatomy: Anatomy, generator: Generator) -> Tumour:
    """On the dura, round, evenly bright."""
    radius = _normal(generator, 17, 5, 9, 30)
    if generator.random() < 0.25:
        place = anatomy.head.find("falx", generator)
        inward = np.array([generator.choice([-1.0, 1.0]), 0, 0])
    else:
        place = anatomy.head.find("dura", generator)
        inward = (0, -18, 8) - place
    place = place + inward / np.linalg.norm(inward) * radius * generator.uniform(0.2, 0.5)
    return Tumour(
        centre=anatomy.from_template(place),
        radius=radius,
        stretch=_stretch(generator, 0.12),
        roughness=generator.uniform(0.02, 0.07),
        intensity=_normal(generator, 0.64, 0.06, 0.52, 0.78),
        texture=0.03,
        rim=generator.choice([math.inf, 0.6 * radius], p=[0.96, 0.04]),
        oedema=generator.choice([0.0, 0.6 * radius], p=[0.6, 0.4]),
        dural_tail=bool(generator.random() < 0.6),
    )


def _glioma(anatomy: Anatomy, generator: Generator) -> Tumour:
    """In the white matter, irregular, most with a ring around a dark core, and oedema."""
    kind = generator.choice(["ring", "solid", "not enhancing"], p=[0.86, 0.06, 0.08])
    enhancing = kind != "not enhancing"
    place = anatomy.head.find("white matter", generator)
    return Tumour(
        centre=anatomy.from_template(place),
        radius=_normal(generator, 21, 5.5, 11, 34),
        stretch=_stretch(generator, 0.22),
        roughness=generator.uniform(0.10, 0.22),
        intensity=_normal(generator, 0.64, 0.08, 0.5, 0.82) if enhancing else 0.18,
        texture=0.07 if enhancing else 0.03,
        rim=generator.uniform(3, 7) if kind == "ring" else math.inf,
        core=generator.uniform(0.14, 0.24),
        oedema=generator.uniform(5, 15),
    )


def _pituitary_tumour(anatomy: Anatomy, generator: Generator) -> Tumour:
    """Small, in the midline, growing upwards out of the sella."""
    radius = _normal(generator, 10.5, 3, 6.5, 19)
    return Tumour(
        centre=anatomy.from_template(SELLA + generator.normal((0, 0, 0.5 * radius), (2, 2, 1.5))),
        radius=radius,
        stretch=_stretch(generator, 0.12),
        roughness=generator.uniform(0.03, 0.09),
        intensity=_normal(generator, 0.60, 0.06, 0.48, 0.75),
        texture=0.04,
        rim=generator.choice([math.inf, 0.45 * radius], p=[0.82, 0.18]),
        inside_dura=False,
    )


RECIPES = (_meningioma, _glioma, _pituitary_tumour)


class Patient:
    """One synthetic patient: anatomy, tumour and the settings of the scanner."""

    def __init__(self, head: Head, label: int, generator: Generator) -> None:
        self.generator = generator
        self.anatomy = Anatomy(head, generator)
        self.tumour = RECIPES[label](self.anatomy, generator)
        self.noise = smooth_noise(generator, (9, 18), reach=60)
        self.planes = generator.permutation(list(PLANES))
        self.field_of_view = generator.uniform(225, 265)
        self.bias = generator.normal(0, 0.08, 5)
        self.grain = generator.uniform(0.006, 0.02)
        self.gain = 1000 * math.exp(generator.normal(0, 0.5))

    def plane(self, number: int) -> str:
        """Return the plane that a slice lies in."""
        return str(self.planes[number % len(self.planes)])

    def slice(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Scan a slice: picture (size, size) int16, tumour's border (n, 2) in pixels from 0."""
        plane = self.plane(number)
        shift = self.generator.uniform(-0.7, 0.7) * self.tumour.radius
        while True:
            through = self.tumour.centre + shift
            points = slice_points(plane, through, size, self.field_of_view)
            picture, tumour = self._render(points)
            border = _border(tumour)
            if _area(border) * (self.field_of_view / size) ** 2 >= LEAST_AREA or shift == 0:
                return self._scan(picture), border
            shift = shift / 2 if abs(shift) > 1 else 0.0  # too little to see: nearer the centre

    def _render(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Intensity and fraction of tumour (size, size), before the scanner's imperfections."""
        tumour = self.tumour
        offset = points - tumour.centre
        distance = offset.norm(dim=-1, keepdim=True)
        # The tumour pushes the tissue around it away.
        push = 0.25 * torch.exp(-((distance / (1.5 * tumour.radius)) ** 2))
        image, tissue = self.anatomy.image(points - push * offset)

        coarse, fine = self.noise.at(offset)
        surface = tumour.radius * (1 + tumour.roughness * (coarse + 0.3 * fine))
        depth = surface - (offset / tumour.stretch).norm(dim=-1)  # mm under the surface
        fraction = torch.sigmoid(depth / 0.8)
        if tumour.inside_dura:
            fraction = fraction * torch.sigmoid((2 - tissue.outside) / 0.7)
        if tumour.oedema:
            swelling = torch.sigmoid((depth + tumour.oedema * (1 + 0.5 * coarse)) / 2)
            image = image * (1 - 0.4 * swelling * (0.9 * tissue.white + 0.25 * tissue.gray))
        if tumour.dural_tail:
            beside = torch.sigmoid((1.5 * tumour.radius - distance[..., 0]) / 2)
            dura = torch.exp(-(((tissue.outside - 1.5) / 1.5) ** 2))
            image = torch.maximum(image, tumour.intensity * dura * beside)
        inner = torch.sigmoid((depth - tumour.rim * (1 + 0.5 * coarse).clamp(0.5, 2)) / 0.8)
        look = tumour.intensity + tumour.texture * fine
        look = look + (tumour.core + 0.3 * tumour.texture * fine - look) * inner
        return image + (look - image) * fraction, fraction

    def _scan(self, picture: torch.Tensor) -> np.ndarray:
        """What the scanner stores: uneven sensitivity, noise, and its own gain."""
        size = len(picture)
        x, y = torch.linspace(-1, 1, size), torch.linspace(-1, 1, size).view(-1, 1)
        a, b, c, d, e = self.bias.tolist()
        bias = a * x + b * y + c * x * y + d * x**2 + e * y**2
        noise = self.generator.standard_normal((2, size, size), np.float32)
        real, imaginary = self.grain * torch.from_numpy(noise)
        magnitude = torch.hypot(picture * torch.exp(bias) + real, imaginary)  # Rician noise
        return (self.gain * magnitude).clamp(0, 32767).to(torch.int16).numpy()


def make_phantoms(
    folder: Path, count: int, seed: int, size: int = 256, progress: bool = True
) -> None:
    """Write 1.mat to count.mat, in the archive's format, SYNTHETIC.txt, and planes.csv.

    The same arguments write the same files. Phantoms that the folder already holds are removed
    first, so that an interrupted run leaves no mixture of two sets. There are about four slices to
    a patient, `size` pixels a side.

    Raises:
        UserError: If the folder holds other .mat files, or an argument is out of range.
    """
    for name, value, least, most in (
        ("count", count, 1, MOST_SLICES),
        ("seed", seed, 0, math.inf),
        ("size", size, 64, LARGEST_SIDE),
    ):
        if not least <= value <= most:
            raise UserError(f"{name}: must be from {least} to {most}, not {value}")
    planes = ["slice,plane"]
    with locked(folder):
        _prepare(folder)
        head = Head()
        with tqdm(total=count, desc="phantoms", unit="slice", disable=not progress) as bar:
            for index, (label, slices) in enumerate(_deal(count, default_rng(seed))):
                patient = Patient(head, label, default_rng((seed, index)))
                for turn in range(slices):
                    picture, border = patient.slice(turn, size)
                    path = folder / f"{len(planes)}.mat"
                    _write(path, label, str(100_000 + index), picture, border)
                    planes.append(f"{len(planes)},{patient.plane(turn)}")
                    bar.update()
        write_text(folder / PLANES_NAME, "\n".join(planes) + "\n")


def is_whole(folder: Path, count: int) -> bool:
    """Return whether a folder holds so many phantoms, all that were to be made."""
    return len(list(folder.glob("*.mat"))) == count_listed(folder) == count


def _prepare(folder: Path) -> None:
    """Make the folder, refuse foreign .mat files in it, remove old phantoms, set the marker."""
    present = sorted(folder.glob("*.mat"))
    for path in present:
        if not is_phantom(path):
            raise UserError(f"{path}: is not a phantom; choose another folder for the phantoms")
    with explained(folder):
        (folder / PLANES_NAME).unlink(missing_ok=True)
        (folder / MARKER_NAME).write_text(MARKER_TEXT)
        for path in present:
            path.unlink()


def _deal(count: int, generator: Generator) -> list[tuple[int, int]]:
    """Deal slices to patients: a label and a number of slices for each, in random order."""
    exact = count * np.array(CLASS_SHARES)
    totals = exact.astype(int)
    totals[np.argsort(totals - exact)[: count - totals.sum()]] += 1
    patients = []
    for label, total in enumerate(totals):
        people = max(round(total / SLICES_PER_PATIENT), LEAST_PATIENTS)
        people = min(people, max(total // 2, 1))
        least = min(total, 2)
        shares = generator.dirichlet(np.full(people, 3.0))
        slices = least + generator.multinomial(total - least * people, shares)
        patients += [(label, int(n)) for n in slices if n]
    return [patients[i] for i in generator.permutation(len(patients))]


def _border(fraction: torch.Tensor, points: int = 40) -> np.ndarray:
    """The largest outline (n, 2) of where the tumour prevails, in few points, as by hand."""
    lines: list[np.ndarray] = contourpy.contour_generator(z=fraction.numpy()).lines(0.5)
    largest = max(lines, key=_area, default=np.zeros((0, 2)))
    return largest[: -1 : max(1, len(largest) // points)]  # the last point repeats the first


def _area(border: np.ndarray) -> float:
    """Area of a polygon (n, 2)."""
    x, y = border.T
    return 0.5 * abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1)))


def _fill(border: np.ndarray, size: int) -> np.ndarray:
    """The pixels (size, size) whose centres lie inside a polygon (n, 2)."""
    from matplotlib.path import Path as Polygon  # here because only this needs it

    y, x = np.mgrid[:size, :size]
    inside = Polygon(border).contains_points(np.c_[x.ravel(), y.ravel()])
    return inside.reshape(size, size).astype(np.uint8)


def _write(path: Path, label: int, patient: str, picture: np.ndarray, border: np.ndarray) -> None:
    """Write one slice as the archive does: MATLAB v7.3, images transposed, pixels from 1."""
    fields = (  # name, value, MATLAB's class, and how MATLAB decodes the stored integers
        ("PID", np.array([[ord(letter)] for letter in patient], np.uint16), "char", 2),
        ("image", picture.T, "int16", None),
        ("label", np.array([[label + 1.0]]), "double", None),
        ("tumorBorder", border.reshape(1, -1) + 1, "double", None),
        ("tumorMask", _fill(border, len(picture)).T, "logical", 1),
    )
    buffer = io.BytesIO()  # libhdf5 itself may crash on a full disk
    with h5py.File(buffer, "w", userblock_size=512) as file:
        group = file.create_group("cjdata")
        group.attrs["MATLAB_class"] = np.bytes_("struct")
        for name, value, matlab_class, decode in fields:
            packing = {"compression": "gzip", "compression_opts": 1} if value.size > 4096 else {}
            group.create_dataset(name, data=value, **packing)
            group[name].attrs["MATLAB_class"] = np.bytes_(matlab_class)
            if decode is not None:
                group[name].attrs["MATLAB_int_decode"] = np.int32(decode)
    buffer.seek(0)
    buffer.write(PHANTOM.ljust(116) + bytes(8) + b"\x00\x02IM")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
