"""Phantoms: the archive's format, the deal of patients, and what the folder is protected from."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from examples.brain_tumor.data import phantoms
from examples.brain_tumor.data.phantoms import is_whole, make_phantoms
from examples.brain_tumor.data.slices import load_slices
from examples.brain_tumor.errors import UserError

COUNT, SIZE = 36, 64
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def head():
    """Building the template head takes seconds: every test of this file shares one."""
    return phantoms.Head()


@pytest.fixture(scope="module")
def folder(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("phantoms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantoms, "Head", lambda: head)
        make_phantoms(path, COUNT, seed=3, size=SIZE, progress=False)
    return path


@pytest.fixture
def shared_head(head, monkeypatch):
    monkeypatch.setattr(phantoms, "Head", lambda: head)


def read(path):
    """One slice as MATLAB would show it: (image, mask, label, patient, border from 1)."""
    with h5py.File(path) as file:
        data = {name: file["cjdata"][name][()] for name in file["cjdata"]}
    patient = "".join(chr(code) for code in data["PID"][:, 0])
    border = data["tumorBorder"].reshape(-1, 2)
    return data["image"].T, data["tumorMask"].T, data["label"].item(), patient, border


def read_all(folder):
    return [read(folder / f"{number}.mat") for number in range(1, COUNT + 1)]


def encloses(polygon, x, y):
    """Even-odd rule: a ray to the right crosses the polygon an odd number of times."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y1 != y2:
            crosses = (y1 > y) != (y2 > y)
            inside ^= crosses & (x < x1 + (y - y1) / (y2 - y1) * (x2 - x1))
    return inside


def touches(polygon, x, y):
    """Whether points lie on the polygon's line itself, where rounding decides about inside."""
    found = np.zeros(x.shape, dtype=bool)
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        along = end - start
        t = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / (along @ along)
        t = t.clip(0, 1)
        found |= np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1]) < 1e-6
    return found


def test_files_are_those_of_the_archive(folder):
    names = {path.name for path in folder.iterdir()}
    beside = {"SYNTHETIC.txt", "planes.csv"}
    assert names == {f"{number}.mat" for number in range(1, COUNT + 1)} | beside
    planes = [line.split(",") for line in (folder / "planes.csv").read_text().splitlines()]
    assert planes[0] == ["slice", "plane"]
    assert [int(number) for number, _ in planes[1:]] == list(range(1, COUNT + 1))
    assert {plane for _, plane in planes[1:]} == {"axial", "coronal", "sagittal"}
    marker = (folder / "SYNTHETIC.txt").read_text()
    assert "synthetic" in marker
    assert marker.count("\n") == 1


def test_format_is_that_of_the_archive(folder):
    path = folder / "1.mat"
    start = path.read_bytes()[:520]
    assert start.startswith(b"MATLAB 7.3 MAT-file")
    assert start[124:128] == b"\x00\x02IM"
    assert start[512:] == b"\x89HDF\r\n\x1a\n"
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        assert list(file) == ["cjdata"]
        data = file["cjdata"]
        assert data.attrs["MATLAB_class"] == b"struct"
        length = data["PID"].shape[0]
        assert {name: (data[name].dtype, data[name].shape) for name in data} == {
            "PID": (np.uint16, (length, 1)),
            "image": (np.int16, (SIZE, SIZE)),
            "label": (np.float64, (1, 1)),
            "tumorBorder": (np.float64, (1, data["tumorBorder"].size)),
            "tumorMask": (np.uint8, (SIZE, SIZE)),
        }
        assert {name: data[name].attrs["MATLAB_class"] for name in data} == {
            "PID": b"char",
            "image": b"int16",
            "label": b"double",
            "tumorBorder": b"double",
            "tumorMask": b"logical",
        }


def test_border_encloses_exactly_the_mask(folder):
    y, x = np.mgrid[1 : SIZE + 1, 1 : SIZE + 1]
    for _, mask, _, _, border in read_all(folder):
        assert set(np.unique(mask)) == {0, 1}
        assert len(np.unique(border, axis=0)) == len(border) >= 5
        clear = ~touches(border, x, y)
        np.testing.assert_array_equal(encloses(border, x, y)[clear], mask[clear] == 1)


def test_images_are_heads_on_dark_air(folder):
    for image, mask, _, _, _ in read_all(folder):
        assert image.min() >= 0
        # A head is round at the top and, cut by the picture's lower edge or not, no wider below.
        air = np.concatenate([image[:6, :6], image[:6, -6:]])
        assert air.mean() < 0.15 * image[mask == 1].mean()
        middle = slice(SIZE // 2 - 8, SIZE // 2 + 8)
        assert air.max() < 0.5 * image[middle, middle].mean()


def test_tumours_are_not_the_brightest_thing(folder):
    brightest = [image[mask == 1].max() >= image.max() for image, mask, *_ in read_all(folder)]
    assert np.mean(brightest) < 0.15


@pytest.mark.parametrize(
    ("plane", "x", "y"),
    [
        ("sagittal", -20, 31),  # the sella is in front of the head's middle, and the face is left
        ("coronal", 0, 31),
        ("axial", 0, -20),
    ],
)
def test_slices_are_upright_and_pituitary_tumours_lie_at_the_sella(head, plane, x, y):
    for seed in range(4):
        patient = phantoms.Patient(head, label=2, generator=np.random.default_rng(seed))
        patient.planes = [plane]
        _, border = patient.slice(0, SIZE)
        found = (border.mean(axis=0) - (SIZE - 1) / 2) * patient.field_of_view / SIZE
        radius = patient.tumour.radius  # the tumour grows upwards by about half of it
        expected = np.array([x, y - (0.5 * radius if plane != "axial" else 0)])
        np.testing.assert_allclose(found, expected, atol=12)


def test_class_shares(folder):
    labels = [label for _, _, label, _, _ in read_all(folder)]
    assert [labels.count(label) for label in (1.0, 2.0, 3.0)] == [12, 13, 11]


def test_each_patient_has_one_class_and_several_slices(folder):
    patients = {}
    for _, _, label, patient, _ in read_all(folder):
        patients.setdefault(patient, []).append(label)
    assert all(name.isdecimal() for name in patients)
    assert all(len(labels) >= 2 for labels in patients.values())
    assert all(len(set(labels)) == 1 for labels in patients.values())
    # Three patients a class would do for the slices, but every class gets one for each fold.
    assert sorted(labels[0] for labels in patients.values()) == [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.parametrize(("count", "patients"), [(300, 75), (600, 150), (3064, 766)])
def test_deal_of_many_slices(count, patients):
    deal = phantoms._deal(count, np.random.default_rng(0))
    labels = np.array([label for label, _ in deal])
    slices = np.array([n for _, n in deal])
    assert slices.sum() == count
    assert slices.min() >= 2
    assert abs(len(deal) - patients) <= 1
    assert np.bincount(labels).min() >= 5
    shares = np.bincount(labels, weights=slices) / count
    np.testing.assert_allclose(shares, [0.33, 0.37, 0.30], atol=1.5 / count)
    assert np.any(np.diff(labels) < 0)  # the classes are mixed, not one after the other


@pytest.mark.parametrize("count", range(1, 12))
def test_deal_of_few_slices(count):
    deal = phantoms._deal(count, np.random.default_rng(count))
    assert sum(n for _, n in deal) == count
    assert min(n for _, n in deal) >= 1


def test_planes_tell_nothing_about_the_class(head):
    generator = np.random.default_rng(0)
    for label in range(3):
        patient = phantoms.Patient(head, label, generator)
        assert sorted(patient.planes) == ["axial", "coronal", "sagittal"]


def test_phantoms_are_known_without_the_files_beside_them(folder, tmp_path):
    for path in folder.glob("*.mat"):
        shutil.copy(path, tmp_path)
    assert load_slices(tmp_path, 16, progress=False).synthetic


def test_the_seed_decides_everything(folder, tmp_path, shared_head):
    make_phantoms(tmp_path / "again", COUNT, seed=3, size=SIZE, progress=False)
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    make_phantoms(tmp_path / "other", 1, seed=4, size=SIZE, progress=False)
    assert (tmp_path / "other" / "1.mat").read_bytes() != (folder / "1.mat").read_bytes()


def test_a_smaller_set_replaces_a_larger_one(tmp_path, shared_head):
    make_phantoms(tmp_path, 3, seed=0, size=SIZE, progress=False)
    make_phantoms(tmp_path, 2, seed=0, size=SIZE, progress=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"1.mat", "2.mat", "SYNTHETIC.txt", "planes.csv"}
    assert len((tmp_path / "planes.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["7.mat", "cvind.mat"])
def test_foreign_slices_are_refused_and_left_alone(tmp_path, name):
    foreign = tmp_path / name
    foreign.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: a day")
    before = foreign.read_bytes()
    with pytest.raises(UserError, match=rf"{name}: is not a phantom"):
        make_phantoms(tmp_path, 2, seed=0, size=SIZE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert foreign.read_bytes() == before


def test_a_foreign_slice_among_phantoms_is_refused_and_nothing_is_removed(tmp_path, shared_head):
    make_phantoms(tmp_path, 2, seed=0, size=SIZE, progress=False)
    (tmp_path / "3.mat").write_bytes(b"")
    with pytest.raises(UserError, match=r"3\.mat"):
        make_phantoms(tmp_path, 2, seed=0, size=SIZE, progress=False)
    assert {path.name for path in tmp_path.glob("*.mat")} == {"1.mat", "2.mat", "3.mat"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: is not a folder"):
        make_phantoms(tmp_path / "file", 2, seed=0, size=SIZE, progress=False)


@pytest.mark.parametrize(
    ("name", "value"), [("count", 0), ("count", -5), ("seed", -1), ("size", 63), ("size", 4097)]
)
def test_arguments_out_of_range_are_refused(tmp_path, name, value):
    arguments = {"count": 2, "seed": 0, "size": SIZE} | {name: value}
    with pytest.raises(UserError, match=f"{name}: must be from"):
        make_phantoms(tmp_path / "new", progress=False, **arguments)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_leaves_no_slice(tmp_path, shared_head, monkeypatch):
    def fail(self, *_):
        raise OSError("disk full")

    monkeypatch.setattr(h5py.Group, "create_group", fail)
    with pytest.raises(OSError, match="disk full"):
        make_phantoms(tmp_path, 1, seed=0, size=SIZE, progress=False)
    assert list(tmp_path.glob("*.mat")) == []
    assert (tmp_path / "SYNTHETIC.txt").exists()


FULL = """
import functools, resource, signal, sys
from examples.brain_tumor.__main__ import main
from examples.brain_tumor.data import phantoms
phantoms.Head = functools.cache(phantoms.Head)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    assert main(["make-phantoms", limit, "--count", "6", "--size", "64"]) == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits")
def test_a_full_disk_is_one_line_and_leaves_no_set_that_looks_whole(tmp_path):
    limits = ("0", "1000", "9000")  # of a file's bytes
    command, environment = [sys.executable, "-c", FULL, *limits], {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for limit, line in zip(limits, lines, strict=True):
        out = tmp_path / limit
        assert re.fullmatch(f"error: {limit}.*: File too large", line)
        assert not is_whole(out, 6)
        assert not list(out.glob("*.partial"))
        with pytest.raises(UserError):
            load_slices(out, 32, progress=False)


def test_phantoms_that_are_half_made_are_not_whole(tmp_path):
    make_phantoms(tmp_path, 6, seed=0, size=64, progress=False)
    assert is_whole(tmp_path, 6)
    assert not is_whole(tmp_path, 5)
    assert not is_whole(tmp_path, 7)
    (tmp_path / "3.mat").unlink()
    assert not is_whole(tmp_path, 6)
    make_phantoms(tmp_path, 6, seed=0, size=64, progress=False)
    (tmp_path / "planes.csv").unlink()
    assert not is_whole(tmp_path, 6)
