"""Slices held out of the training side to calibrate answers on."""

import dataclasses

import numpy as np
import pytest
import torch

from examples.brain_tumor.data.slices import SliceSet
from examples.brain_tumor.data.splits import make_split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import read_json
from examples.brain_tumor.settings import DataSettings, Settings
from examples.brain_tumor.training.run_folder import check_resumable, read_split, start_run


def people(count=300, each=5):
    """Slices of patients with `each` slices of one class."""
    labels = torch.arange(count) // each % 3
    return SliceSet(
        images=torch.zeros(count, 1, 1, 1),
        labels=labels,
        numbers=list(range(1, count + 1)),
        patients=[f"p{index // each}" for index in range(count)],
        folds=None,
        synthetic=True,
    )


@pytest.mark.parametrize("kind", ["paper", "patient", "paper-swapped", "validation"])
def test_the_share_is_of_the_training_side_alone_and_of_every_class(kind):
    slices = people()
    whole = make_split(DataSettings(split=kind), slices)
    split = make_split(DataSettings(split=kind, calibration=0.2), slices)
    assert torch.equal(split.test, whole.test)
    assert len(whole.calibration) == 0
    together = torch.cat([split.train, split.calibration]).sort().values
    assert torch.equal(together, whole.train)
    assert len(split.calibration) == pytest.approx(0.2 * len(whole.train), abs=15)
    sizes = slices.labels[split.calibration].bincount(minlength=3)
    assert sizes.min() > 0.7 * sizes.float().mean()
    again = make_split(DataSettings(split=kind, calibration=0.2), slices)
    assert torch.equal(again.calibration, split.calibration)
    other = make_split(DataSettings(split=kind, calibration=0.2, split_seed=1), slices)
    assert not torch.equal(other.calibration, split.calibration)


def test_a_split_by_patient_holds_out_whole_patients():
    slices = people()
    split = make_split(DataSettings(split="patient", calibration=0.2), slices)
    sides = [
        {slices.patients[index] for index in side.tolist()}
        for side in (split.train, split.calibration, split.test)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert not sides[1] & sides[2]
    by_slice = make_split(DataSettings(split="paper", calibration=0.2), slices)
    shared = set(np.array(slices.patients)[by_slice.calibration.numpy()])
    assert shared & set(np.array(slices.patients)[by_slice.train.numpy()])


def test_too_few_slices_to_hold_any_out():
    with pytest.raises(UserError, match=r"--calibration 0\.05: "):
        make_split(DataSettings(calibration=0.05), people(15, 1))


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_images_on_both_sides_are_counted_and_told(capsys, share):
    data = DataSettings(split="paper", calibration=share)
    images = torch.arange(300.0).half()[:, None, None, None]
    slices = dataclasses.replace(people(), images=images)
    split = make_split(data, slices)
    assert capsys.readouterr().err == ""
    others = torch.cat([split.test, split.calibration])
    images[others[[0, 3, -1]]] = images[split.train[[7, 7, 9]]]
    images[split.train[1]] = images[split.train[2]]  # on one side: no matter
    again = make_split(data, slices)
    said = "Slices not trained on that have the very image of one that is: 3."
    assert capsys.readouterr().err == f"split paper: {said}\n"
    assert again.description == f"{split.description} {said}"
    assert torch.equal(again.train, split.train)


def test_a_run_whose_split_is_put_in_other_words_is_resumed(tmp_path):
    slices, settings = people(), Settings(data=DataSettings(split="paper"))
    split = make_split(settings.data, slices)
    older = dataclasses.replace(split, description="Before images on both sides were counted.")
    start_run(tmp_path / "run", settings, slices, older)
    check_resumable(tmp_path / "run", settings, slices, split)
    other = dataclasses.replace(split, train=split.train[1:])
    with pytest.raises(UserError, match="other slices or another split"):
        check_resumable(tmp_path / "run", settings, slices, other)


def test_a_run_keeps_what_it_holds_out(tmp_path):
    slices = people()
    for share, folder in ((0.2, tmp_path / "held"), (0.0, tmp_path / "none")):
        data = DataSettings(split="patient", calibration=share)
        split = make_split(data, slices)
        start_run(folder, Settings(data=data), slices, split)
        found = read_split(folder, slices)
        for side in ("train", "test", "calibration"):
            assert torch.equal(getattr(found, side), getattr(split, side))
        assert ("calibration" in read_json(folder / "split.json")) == bool(share)  # as ever without
    held, none = (read_json(tmp_path / name / "split.json")["sha256"] for name in ("held", "none"))
    assert held != none
