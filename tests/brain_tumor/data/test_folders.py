"""Folders of slices as people have them: which files are found, named and left out."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from examples.brain_tumor.data.matlab import CLASS_NAMES
from examples.brain_tumor.data.slices import load_slices
from examples.brain_tumor.data.splits import make_split, paper_split, patient_split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.settings import DataSettings
from tests.brain_tumor.data.test_slices import fields, write_folds, write_mat

PLAIN = [f"{number}.mat" for number in (1, 2, 10)]
LAYOUTS = {
    "folders side by side": ["1-766/1.mat", "1-766/2.mat", "767-1532/10.mat"],
    "other names": ["1.MAT", "0002.mat", "a/b/00010.Mat"],
}


def write_slices(folder, names):
    """Slices 1, 2 and 10 under these names, each of its own picture, and cvind.mat."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = np.arange(20 * 30).reshape(20, 30) + 50 * index
        write_mat(path, fields(picture, label=index + 1, patient=f"P{index}"))
    write_folds(path.parent, np.arange(3064.0)[None] % 5 + 1)
    return folder


def load(folder):
    return load_slices(folder, 16, progress=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_archive_is_the_same_wherever_its_files_lie(tmp_path, layout):
    plain, other = (
        load(write_slices(tmp_path / name, names))
        for name, names in (("plain", PLAIN), ("other", LAYOUTS[layout]))
    )
    assert plain.numbers == other.numbers == [1, 2, 10]
    assert plain.digest == other.digest
    assert plain.folds.tolist() == other.folds.tolist() == [1, 2, 5]
    assert plain.images.equal(other.images)
    assert plain.patients == other.patients


def test_what_is_left_out_is_named(tmp_path, capsys):
    folder = write_slices(tmp_path / "data", PLAIN)
    for name in ("3 (copy).mat", "sub/picture.jpg", ".hidden/4.mat", "__MACOSX/5.mat"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "circle").symlink_to(folder)
    for _ in range(2):  # decoded, and from the cache
        assert load(folder).numbers == [1, 2, 10]
        said = capsys.readouterr().err
        assert f"{folder}: left out, 3 in all:" in said
        for name in ("3 (copy).mat", "sub/picture.jpg", "circle"):
            assert f"  {folder / name}: is not named like a slice" in said


def test_names_of_what_is_left_out_do_nothing_to_a_terminal(tmp_path, capsys):
    folder = write_slices(tmp_path / "data", PLAIN)
    (folder / "red\x1b[31m\nline.txt").touch()
    load(folder)
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"  {folder}/red_[31m_line.txt: is not named like a slice (1.mat, 2.mat, ...)"
    ]


def test_of_many_left_out_the_first_are_named(tmp_path, capsys):
    folder = write_slices(tmp_path / "data", PLAIN)
    for number in range(30):
        (folder / f"{number}.txt").touch()
    load(folder)
    said = capsys.readouterr().err.splitlines()
    assert "left out, 30 in all" in said[0]
    assert len(said) == 22
    assert said[-1] == "  and 10 more"


@pytest.mark.parametrize("twice", ["01.mat", "1.MAT", "sub/1.mat"])
def test_two_files_of_one_slice_are_refused(tmp_path, twice):
    folder = write_slices(tmp_path, PLAIN)
    (folder / twice).parent.mkdir(exist_ok=True)
    (folder / twice).write_bytes(b"")
    with pytest.raises(UserError, match=r"is the same slice as .*; keep one of them"):
        load(folder)


def test_all_damaged_slices_are_named_at_once(tmp_path):
    folder = write_slices(tmp_path, PLAIN)
    (folder / "2.mat").write_bytes(b"")
    (folder / "7.mat").symlink_to("7.mat")
    write_mat(folder / "9.mat", fields(np.full((9, 9), 3)))
    with pytest.raises(UserError) as caught:
        load(folder)
    head, *lines = str(caught.value).splitlines()
    assert head == f"{folder}: 3 of 5 slices are at fault:"
    assert [line.split(": ")[0] for line in lines] == [f"  {folder}/{n}.mat" for n in (2, 7, 9)]
    assert os.strerror(errno.ELOOP) in lines[1]
    assert "one grey value" in lines[2]


def test_archives_that_are_not_unpacked_say_how_to_go_on(tmp_path):
    archive = tmp_path / "brainTumorDataPublic_1-766.zip"
    archive.write_bytes(b"PK")
    for data, fault in ((tmp_path, "holds no slices"), (archive, "is a file")):
        with pytest.raises(UserError, match=fault) as caught:
            load(data)
        assert f"unpack {archive.name} first" in str(caught.value)
        assert f"python -m zipfile -e '{archive}'" in str(caught.value)


# ------------------------------------------------------------------------------- pictures by class


def write_pictures(folder, names):
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (20, 20), np.uint8)
        Image.fromarray(pixels).save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    return folder


KAGGLE = [
    f"{side}/{name}/{index}.{kind}"
    for side, kind in (("Training", "jpg"), ("Testing", "PNG"))
    for name in ("glioma", "meningioma", "notumor", "pituitary")
    for index in range(5)
]


@pytest.mark.parametrize("above", ["", "archive/"])
def test_pictures_are_of_the_classes_of_their_folders(tmp_path, above):
    folder = write_pictures(tmp_path, [above + name for name in KAGGLE])
    found = load(folder)
    assert found.classes == (*CLASS_NAMES, "notumor")
    assert found.labels.bincount().tolist() == [10] * 4
    assert found.numbers == list(range(1, 41))
    assert not found.patients_known
    for label, name in zip(found.labels.tolist(), found.patients, strict=True):
        assert f"/{found.classes[label]}/" in f"/{name}"
    assert found.patients[0] == f"{above}Testing/glioma/0.PNG"


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["glioma/1.jpg", "glioma/deeper/2.JPEG", "Pituitary/3.png"], ("glioma", "pituitary")),
        (["b/1.jpg", "a/1.jpg", "pituitary/1.jpg"], ("pituitary", "a", "b")),
    ],
)
def test_classes_are_those_found(tmp_path, names, classes):
    found = load(write_pictures(tmp_path, names))
    assert found.classes == classes
    assert len(found.numbers) == 3


def test_without_patients_only_a_split_by_slice_is_possible(tmp_path):
    found = load(write_pictures(tmp_path, KAGGLE))
    split = paper_split(found, 0)
    assert "no patient ids are known" in split.description
    with pytest.raises(UserError, match="no patient ids, so only a split by slice"):
        patient_split(found, 1, 0)


def test_pictures_that_cannot_be_read_are_left_out_and_named(tmp_path, capsys):
    folder = write_pictures(tmp_path / "data", KAGGLE)
    bad = folder / "Testing" / "glioma" / "1.PNG"
    bad.write_bytes(b"no picture")
    Image.new("L", (9, 9), 7).save(folder / "Training" / "glioma" / "2.jpg")
    (folder / "Training" / "Thumbs.db").touch()
    (folder / "loose.jpg").write_bytes(b"")
    for _ in range(2):  # decoded, and from the cache
        found = load(folder)
        assert len(found.numbers) == len(found.labels) == len(found.images) == 38
        assert found.numbers[:2] == [1, 3]
        said = capsys.readouterr().err
        assert "left out, 4 in all" in said
        assert f"  {bad}: not readable" in said
        assert "2.jpg: is of one grey value" in said
        for name in ("Training/Thumbs.db", "loose.jpg"):
            assert f"  {folder / name}: is not a picture in a folder of its class" in said


def test_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="pictures of the class glioma alone"):
        load(write_pictures(tmp_path, ["Training/glioma/1.jpg", "Testing/glioma/1.jpg"]))


@pytest.mark.parametrize("name", ["glioma", "sub/glioma"])
def test_one_folder_of_pictures_is_one_class(tmp_path, name):
    folder = write_pictures(tmp_path, [f"{name}/1.jpg", f"{name}/2.jpg"])
    with pytest.raises(UserError, match="pictures of the class glioma alone"):
        load(folder)


@pytest.mark.parametrize("name", ["Training", "."])
def test_pictures_without_a_folder_for_their_class_are_of_none(tmp_path, name):
    folder = write_pictures(tmp_path, [f"{name}/1.jpg", f"{name}/2.jpg"])
    with pytest.raises(UserError, match="no pictures in a folder for each class"):
        load(folder)


def test_class_folders_without_files_are_named(tmp_path, capsys):
    folder = write_pictures(tmp_path, ["a/1.jpg", "b/deeper/1.jpg"])
    for name in ("c", "d/deeper", ".hidden", "b/.hidden"):
        (folder / name).mkdir(parents=True)
    (folder / "a" / "link").symlink_to(folder)
    assert load(folder).classes == ("a", "b")
    lines = capsys.readouterr().err.splitlines()
    named = [line for line in lines if line.endswith(": is a folder without files")]
    assert [line.split(":")[0].strip() for line in named] == [
        str(folder / name) for name in ("c", "d", "d/deeper")
    ]


@pytest.mark.parametrize("above", ["", "archive/"])
def test_what_lies_beside_the_sides_is_no_class(tmp_path, capsys, above):
    names = [above + name for name in KAGGLE]
    folder = write_pictures(tmp_path, [*names, "docs/screenshot.png", "docs/more/2.png"])
    found = load(folder)
    assert found.classes == (*CLASS_NAMES, "notumor")
    assert len(found.numbers) == 40
    said = capsys.readouterr().err
    for name in ("screenshot.png", "more/2.png"):
        assert f"  {folder / 'docs' / name}: is not a picture in a folder of its class" in said


def test_pictures_to_test_without_a_class_leave_the_classes_as_they_are(tmp_path):
    found = load(write_pictures(tmp_path, ["glioma/1.jpg", "pituitary/1.jpg", "test/1.jpg"]))
    assert found.patients == ["glioma/1.jpg", "pituitary/1.jpg"]


def test_classes_without_a_picture_that_can_be_read_are_left_out_and_named(tmp_path, capsys):
    folder = write_pictures(tmp_path / "data", [*KAGGLE, "Training/docs/1.png"])
    (folder / "Training" / "docs" / "1.png").write_bytes(b"no picture")
    for _ in range(2):  # decoded, and from the cache
        found = load(folder)
        assert found.classes == (*CLASS_NAMES, "notumor")
        assert found.labels.bincount().tolist() == [10] * 4
        said = capsys.readouterr().err
        assert "  docs: is a class without a picture that can be read" in said
        assert "docs/1.png: not readable" in said


def test_a_class_too_small_to_divide_is_named_by_a_picture(tmp_path):
    names = [f"{label}/{index}.png" for label in CLASS_NAMES for index in range(9)]
    found = load(write_pictures(tmp_path / "one", [*names, "docs/screenshot.png"]))
    with pytest.raises(UserError, match=r"1 docs slices \(such as docs/screenshot\.png\) are too"):
        make_split(DataSettings(split="paper"), found)
    found = load(write_pictures(tmp_path / "two", [*names, "docs/1.png", "docs/2.png"]))
    with pytest.raises(UserError, match=r"too few docs slices \(such as docs/1\.png\) to hold"):
        make_split(DataSettings(split="paper", calibration=0.2), found)


def test_names_are_no_formulas(tmp_path):
    folder = write_pictures(tmp_path / "data", ["=cmd/1.jpg", "glioma/1.jpg"])
    found = load(folder)
    assert found.patients[0] == "'=cmd/1.jpg"
    assert found.classes == ("glioma", "'=cmd")
    (tmp_path / "mats").mkdir()
    for number, patient in enumerate(("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "MR 1"), 1):
        write_mat(tmp_path / "mats" / f"{number}.mat", fields(patient=patient))
    assert [patient[0] for patient in load(tmp_path / "mats").patients] == ["'"] * 4 + ["M"]
