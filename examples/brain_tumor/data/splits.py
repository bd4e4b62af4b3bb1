"""Splits of the slices into training and test sides."""

import sys
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from ..errors import UserError
from ..settings import DataSettings
from .matlab import FOLDS
from .slices import SliceSet

ARCHIVE_COUNTS = (708, 1426, 930)  # slices of each class in the archive
PAPER_TEST_COUNTS = (217, 422, 281)  # the only counts that fit the paper's tables
TEST_FRACTION = 0.3
VALIDATION_FRACTION = 0.1  # of the paper split's training side


@dataclass(frozen=True)
class Split:
    """Which slices are trained on and which are tested on."""

    train: Tensor  # indices into a `SliceSet`, ascending
    test: Tensor  # the same
    name: str  # of the setting `split`
    description: str  # a sentence for the report
    # indices of the slices that answers are calibrated on, neither trained on nor tested on
    calibration: Tensor = field(default_factory=lambda: torch.tensor([], dtype=torch.int64))


def make_split(settings: DataSettings, slices: SliceSet) -> Split:
    """Return the split that the settings ask for."""
    name, _, swapped = settings.split.partition("-")
    if name == "validation":
        split = validation_split(slices, settings.split_seed)
    elif name == "patient":
        split = patient_split(slices, settings.fold, settings.split_seed, swap=bool(swapped))
    else:
        split = paper_split(slices, settings.split_seed, swap=bool(swapped))
    if settings.calibration:
        split = hold_out(split, slices, settings.calibration, settings.split_seed)
    repeated = _count_repeated(slices, split)
    if repeated:
        said = f"Slices not trained on that have the very image of one that is: {repeated}."
        print(f"split {split.name}: {said}", file=sys.stderr)
        split = replace(split, description=f"{split.description} {said}")
    return split


def _count_repeated(slices: SliceSet, split: Split) -> int:
    """Return how many slices tested or held out have the same pixels as one trained on."""
    sides = split.train, torch.cat([split.test, split.calibration])
    trained, others = ([hash(slices.images[i].numpy().tobytes()) for i in side] for side in sides)
    return sum(map(set(trained).__contains__, others))


def hold_out(split: Split, slices: SliceSet, share: float, seed: int) -> Split:
    """Take about a share of the training side out of it, to calibrate answers on.

    Drawn as the split is: patient by patient if no patient is on both of its sides, else slice by
    slice, of each class its share.

    Raises:
        UserError: A class has too few slices, or patients, for both.
    """
    labels = slices.labels[split.train]
    by_patient = split.name.startswith("patient")
    groups = [slices.patients[i] for i in split.train.tolist()] if by_patient else split.train
    parts = StratifiedGroupKFold(max(round(1 / share), 2), shuffle=True, random_state=seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a small class, which is named below
            kept, held = map(torch.from_numpy, next(parts.split(labels, labels, groups)))
    except ValueError as error:
        raise UserError(
            f"--calibration {share:g}: the training side is too small ({error}); a larger share "
            "takes fewer slices to divide, and 0 holds none out"
        ) from None
    lacking = np.setdiff1d(labels, np.intersect1d(labels[kept], labels[held]))
    if len(lacking):
        few = _slices_of(slices, lacking[0])
        raise UserError(f"--calibration {share:g}: too few {few} to hold some out")
    return replace(
        split,
        train=split.train[kept],
        calibration=split.train[held],
        description=f"{split.description} {len(held)} slices of the training side, drawn "
        f"{'patient by patient' if by_patient else 'slice by slice'}, are held out to calibrate.",
    )


def paper_split(slices: SliceSet, seed: int, swap: bool = False) -> Split:
    """Split slice by slice as the paper did: 70 % to train on and 30 % to test on.

    Where a set has the archive's class sizes, the test side has the paper's 217 meningiomas, 422
    gliomas and 281 pituitary tumours; elsewhere 30 % of each class.

    The seed decides which slices are drawn; `swap` exchanges the sides, as the paper does for its
    30-70 experiment.

    Raises:
        UserError: A class is too small for both training and test set.
    """
    side = torch.arange(len(slices.labels))
    drawn = _draw("paper", slices, side, TEST_FRACTION, seed)
    shared = "no patient ids are known, and patients may well have slices on both sides"
    if slices.patients_known:
        both = len(_patients_on_both_sides(slices, drawn))
        shared = f"{both} of {len(set(slices.patients))} patient ids have slices on both sides"
    return _split(
        "paper", side, drawn, f"By slice, as in the paper, from seed {seed}: {shared}.", swap
    )


def validation_split(slices: SliceSet, seed: int) -> Split:
    """Split the training side of `paper_split` again: a tenth of each class to choose settings by.

    The paper's test side is on neither side. The seed decides both draws.

    Raises:
        UserError: A class is too small for both training and test set.
    """
    side = paper_split(slices, seed).train
    drawn = _draw("validation", slices, side, VALIDATION_FRACTION, seed)
    description = (
        f"To choose settings by: a tenth of the training slices of the paper's split from seed "
        f"{seed}, whose own test slices are left out."
    )
    return _split("validation", side, drawn, description)


def _draw(name: str, slices: SliceSet, side: Tensor, share: float, seed: int) -> Tensor:
    """Return a mask (n,) of slices drawn from a side (n,), of each class its share."""
    generator = torch.Generator().manual_seed(seed)
    labels = slices.labels[side]
    sizes = tuple(labels.bincount(minlength=len(slices.classes)).tolist())
    counts = [round(share * size) for size in sizes]
    if (name, sizes) == ("paper", ARCHIVE_COUNTS):
        counts = PAPER_TEST_COUNTS
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(counts):
        members = (labels == label).nonzero()[:, 0]
        if not 0 < count < len(members):
            few = f"{len(members)} {_slices_of(slices, label)}"
            raise UserError(f"split {name}: {few} are too few to divide")
        order = torch.randperm(len(members), generator=generator)
        drawn[members[order[:count]]] = True
    return drawn


def _slices_of(slices: SliceSet, label: int) -> str:
    """Return what an error calls a class's slices: pictures with one, whose folder is the class."""
    title = f"{slices.classes[label]} slices"
    if slices.patients_known:
        return title
    return f"{title} (such as {slices.patients[slices.labels.tolist().index(label)]})"


def _split(name: str, side: Tensor, test: Tensor, description: str, swap: bool = False) -> Split:
    """Return the split that a mask (n,) of test slices makes of a side (n,), or its opposite."""
    if swap:
        name, test = f"{name}-swapped", ~test
    return Split(side[~test], side[test], name, description)


def patient_split(slices: SliceSet, fold: int, seed: int, swap: bool = False) -> Split:
    """Split patient by patient: test on one fold of patients, train on the other four.

    Slices without folds have their patients dealt to folds, as the seed decides; the archive's own
    folds do not depend on it. `swap` exchanges the sides: train on one fold, test on four.

    Raises:
        UserError: The fold is empty, has all slices of a class, or shares a patient with another;
            or no patients are known.
    """
    if not slices.patients_known:
        raise UserError(
            "split patient: pictures have no patient ids, so only a split by slice is possible: "
            "--split paper. Slices of one patient may then be on both sides"
        )
    folds, origin = slices.folds, "of cvind.mat"
    if folds is None:
        folds, origin = deal_patients(slices, seed), f"dealt by PID from seed {seed}"
    test = folds == fold
    if not test.any():
        raise UserError(f"split patient: fold {fold} has no slices")
    for label in slices.labels[test].unique().tolist():
        if label not in slices.labels[~test]:
            raise UserError(f"split patient: every {slices.classes[label]} slice is in fold {fold}")
    shared = _patients_on_both_sides(slices, test)
    if len(shared):
        raise UserError(f"split patient: patient {shared[0]} is in fold {fold} and in another")
    description = (
        f"By patient: {'trained' if swap else 'tested'} on fold {fold} of {FOLDS}, {origin}; "
        "no patient id has slices on both sides."
    )
    return _split("patient", torch.arange(len(test)), test, description, swap)


def deal_patients(slices: SliceSet, seed: int) -> Tensor:
    """Deal patients to folds 1 to 5, class after class so that each fold has its share of each."""
    label_of = dict(zip(slices.patients, slices.labels.tolist(), strict=True))
    generator = torch.Generator().manual_seed(seed)
    dealt: dict[str, int] = {}
    for label in range(len(slices.classes)):
        members = sorted(patient for patient in label_of if label_of[patient] == label)
        for place in torch.randperm(len(members), generator=generator).tolist():
            dealt[members[place]] = len(dealt) % FOLDS + 1
    return torch.tensor([dealt[patient] for patient in slices.patients])


def _patients_on_both_sides(slices: SliceSet, test: Tensor) -> np.ndarray:
    """Return the patients who have slices inside a mask (n,) and outside it, sorted."""
    patients, inside = np.array(slices.patients), test.numpy()
    return np.intersect1d(patients[inside], patients[~inside])
