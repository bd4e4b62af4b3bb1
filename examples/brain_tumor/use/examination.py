"""What a network makes of pictures that are no slices, and whether it looks at the tumour."""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image, ImageDraw
from scipy import ndimage
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize
from torch import Tensor

from ..data.crop import above_background, find_box, largest_region
from ..data.folders import find_slices
from ..data.matlab import read_slice
from ..data.phantoms import make_phantoms
from ..data.pictures import read_picture
from ..data.slices import CLASS_NAMES, SliceSet, load_slices, resize
from ..errors import UserError
from ..evaluation.calibration import fit_familiarity
from ..evaluation.evaluate import EMBEDDING_BATCH, cosines, early_features
from ..files import as_csv, write_json, write_sums, write_text
from ..report.examination_tables import CROSS_FITTED, HELD_OUT
from ..training.run_folder import METRICS, POINTING, STRANGE
from .gradcam import measure_overlap
from .prediction import Reference, explain, read_reference

MADE = 60  # pictures of each kind that is made
CHANGED = 200  # test slices, at most, that are changed in each way
SIDE = 512  # pixels of a picture that is made, as many as a slice has
PATCHES = 4  # a side, for shuffling
GAMMAS = (0.4, 2.5)  # exponents of intensities
CUTS = 10  # through each map of a brain, in each plane


def examine(run: Path, slices: SliceSet, data: Path) -> None:
    """Write into a run's folder how it does on strange pictures, and where its Grad-CAM points.

    The folder of its slices has the outlines of the tumours.

    Raises:
        UserError: The run is at fault or not evaluated, or its slices have no outlines.
    """
    reference = read_reference(run, slices)
    if not (run / METRICS).is_file():
        raise UserError(f"{run}: is not evaluated yet, and its report is to hold what is found")
    pointing, strange = point(reference, data), judge_strange(reference)
    write_json(run / STRANGE, strange)
    write_text(run / POINTING, pointing)
    write_sums(run, [STRANGE, POINTING], add=True)


def judge_strange(reference: Reference) -> dict[str, object]:
    """Return the area under the ROC curve of each score, strange pictures against test slices.

    And the share of both that is flagged as unlike the slices trained on, by the limit that
    `predict` goes by; "limit" says what that was fitted on. All scores are of one view.
    """
    images, test = reference.slices.images, reference.test
    calibration, labels = reference.calibration, reference.labels
    last, embeddings = _answers(reference, images[reference.train])
    of_last, embeddings = fit_familiarity(normalize(last)), normalize(embeddings)
    centres = normalize(np.stack([embeddings[labels == one].mean(0) for one in labels.unique()]))

    def judge(pictures: Tensor) -> dict[str, np.ndarray]:
        last, answers = _answers(reference, pictures)
        early = early_features(reference.network, pictures).numpy()
        return {
            "Mahalanobis, early features": calibration.familiarity.distances(early),
            "Mahalanobis, last features": of_last.distances(normalize(last)),
            "nearest, embeddings": -(normalize(answers) @ embeddings.T).max(1),
            "nearest centre, embeddings": -(normalize(answers) @ centres.T).max(1),
            "length of embedding": -np.linalg.norm(answers, axis=1),
        }

    usual = judge(images[test])
    used = next(iter(usual))
    kinds = {}
    for kind, pictures in strange_pictures(reference):
        strange = judge(pictures)
        truth = np.repeat([0, 1], [len(test), len(pictures)])
        kinds[kind] = {
            "pictures": len(pictures),
            "flagged": float((strange[used] > calibration.limit).mean()),
            "auroc": {
                name: float(roc_auc_score(truth, np.concatenate([usual[name], strange[name]])))
                for name in usual
            },
        }
    return {
        "limit": CROSS_FITTED if calibration.exponent is None else HELD_OUT,
        "test_slices": len(test),
        "false_alarms": float((usual[used] > calibration.limit).mean()),
        "kinds": kinds,
    }


def strange_pictures(reference: Reference) -> Iterator[tuple[str, Tensor]]:
    """Yield kinds of pictures that are no slices of this data set, (n, 1, size, size) each."""
    random = np.random.default_rng(0)
    slices, size = reference.slices, reference.slices.images.shape[-1]

    def prepared(pictures: list[np.ndarray]) -> Tensor:
        parts = [resize(one[find_box(one, reference.crop)], size) for one in pictures]
        return torch.from_numpy(np.stack(parts))[:, None].to(slices.images)

    yield "noise", prepared([random.random((SIDE, SIDE)) for _ in range(MADE)])
    smooth = [ndimage.gaussian_filter(random.normal(size=(SIDE, SIDE)), 8) for _ in range(MADE)]
    yield "smooth noise", prepared(smooth)
    photographs = [one.mean(2) for one in load_sample_images().images]
    yield "photographs", prepared([_part(one, random) for one in photographs for _ in range(MADE)])
    yield "text", prepared([_text(random, dark=i % 2 == 0) for i in range(MADE)])
    if not slices.synthetic:
        with tempfile.TemporaryDirectory() as folder:
            make_phantoms(Path(folder), MADE, 0, SIDE, False)
            phantoms = load_slices(Path(folder), size, progress=False, crop=reference.crop)
        yield "phantoms", phantoms.images
    for kind, read in SHIPPED.items():
        try:
            pictures = read()
        except (ImportError, OSError, UserError) as error:
            print(f"{kind}: left out: {error}", file=sys.stderr)
        else:
            yield kind, prepared(pictures)
    some = random.permutation(len(reference.test))[:CHANGED]
    images = slices.images[reference.test[some]]
    yield "slices, inverted", 1 - images
    yield "slices, turned by 90 degrees", images.rot90(1, (2, 3))
    yield "slices, patches shuffled", torch.stack([_shuffled(one, random) for one in images])
    for gamma in GAMMAS:
        yield f"slices, gamma {gamma}", (images.float() ** gamma).to(images)


def point(reference: Reference, data: Path) -> str:
    """Return, as CSV, for each test slice whether the hottest point lies in the tumour's outline.

    The Grad-CAM is that of `predict`. Areas are in pixels; the head is the largest bright region,
    filled. A map without a hottest point, empty or the same everywhere, leaves the cell empty.
    """
    sources = find_slices(data).sources
    if sources[0].label is not None:
        raise UserError(f"{data}: pictures have no outlines of tumours, expected .mat slices")
    paths = {source.number: source.path for source in sources}
    rows = [["slice", "truth", "predicted", "tumour_area", "head_area", "inside"]]
    for index in reference.test.tolist():
        number = reference.slices.numbers[index]
        found = read_slice(paths[number])
        pixels = reference.slices.images[[index]]
        near = cosines(reference.embed(pixels), reference.embeddings)[0]
        heat = explain(reference, found.image, pixels, near)
        overlap = measure_overlap(heat, found.mask, find_box(found.image, reference.crop))
        head = ndimage.binary_fill_holes(largest_region(above_background(found.image)))
        classes = CLASS_NAMES[found.label], CLASS_NAMES[reference.labels[near.argmax()]]
        inside = None if overlap is None else overlap.hottest_inside
        areas = int(found.mask.sum()), int(head.sum())
        rows.append([number, *classes, *areas, "" if inside is None else int(inside)])
    return as_csv(rows)


def _answers(reference: Reference, images: Tensor) -> list[np.ndarray]:
    """Return last features and embeddings (n, d) of one view, not normalised."""
    network, precision = reference.network, reference.precision
    device = next(network.parameters()).device
    low = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    parts = []
    with torch.inference_mode(), low:
        for batch in images.split(EMBEDDING_BATCH):
            last = network.pooled(batch.to(device).float())
            parts.append((last, network.output(last)))
    return [torch.cat(part).float().cpu().numpy() for part in zip(*parts, strict=True)]


def _part(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a square part of a photograph (h, w), at least a third of its height."""
    height, width = image.shape
    side = int(random.integers(height // 3, height))
    top, left = random.integers(height - side + 1), random.integers(width - side + 1)
    return image[top : top + side, left : left + side]


def _text(random: np.random.Generator, dark: bool) -> np.ndarray:
    """Return lines of letters as a picture (SIDE, SIDE)."""
    picture = Image.new("L", (SIDE, SIDE), 255 * dark)
    letters = list("abcdefghijklmnopqrstuvwxyz    ")
    for top in range(0, SIDE, 28):
        line = "".join(random.choice(letters, 60))
        ImageDraw.Draw(picture).text((4, top), line, fill=255 * (not dark), font_size=24)
    return np.array(picture)


def _shuffled(image: Tensor, random: np.random.Generator) -> Tensor:
    """Return a picture (1, size, size) with its patches in another order."""
    side = image.shape[-1] // PATCHES
    shuffled, height = image.clone(), side * PATCHES
    patches = F.unfold(image[None, :, :height, :height], side, stride=side)
    patches = patches[..., torch.from_numpy(random.permutation(PATCHES**2))]
    shuffled[:, :height, :height] = F.fold(patches, height, side, stride=side)[0]
    return shuffled


def _head() -> list[np.ndarray]:
    """Read the slice of a head, an MRI, that Matplotlib ships."""
    with cbook.get_sample_data("s1045.ima.gz") as file:
        return [np.frombuffer(file.read(), "<u2").reshape(256, 256).astype(np.float32)]


def _dicom(name: str) -> list[np.ndarray]:
    """Read a picture that pydicom ships."""
    import pydicom  # here because it is an extra

    return [read_picture(Path(pydicom.__file__).parent / "data" / "test_files" / name)]


def _brain(*names: str) -> list[np.ndarray]:
    """Return cuts through maps of the MNI's average brain, which nilearn ships, in three planes."""
    from nilearn import datasets  # here because it takes seconds

    cuts = []
    for name in names:
        load = getattr(datasets, f"load_mni152_{name}")
        values = load(resolution=1).get_fdata(dtype=np.float32)
        for axis, length in enumerate(values.shape):
            for place in np.linspace(0.3 * length, 0.7 * length, CUTS).astype(int):
                cut = np.rot90(values.take(place, axis))  # up is up
                spare = max(values.shape) - np.array(cut.shape)
                cuts.append(np.pad(cut, [(one // 2, one - one // 2) for one in spare]))
    return cuts


SHIPPED = {  # kinds of pictures that installed packages ship
    "head MRI of Matplotlib": _head,
    "CT of pydicom": partial(_dicom, "CT_small.dcm"),
    "MRI of pydicom": partial(_dicom, "MR_small.dcm"),
    "healthy brain without contrast agent (MNI T1, no skull)": partial(_brain, "template"),
    "tissue maps (MNI grey and white matter)": partial(_brain, "gm_template", "wm_template"),
}
