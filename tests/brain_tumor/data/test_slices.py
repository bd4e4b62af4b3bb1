"""Reading .mat files, the decoded cache, and the splits."""

import csv
import os
import select
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from examples.brain_tumor.data import reader
from examples.brain_tumor.data import slices as slices_module
from examples.brain_tumor.data.matlab import ARCHIVE_SIZE
from examples.brain_tumor.data.reader import READER
from examples.brain_tumor.data.slices import CLASS_NAMES, SliceSet, load_slices, read_slice
from examples.brain_tumor.data.splits import ARCHIVE_COUNTS, paper_split, patient_split
from examples.brain_tumor.errors import UserError
from tests.brain_tumor.data.conftest import SERVE

GRADIENT = np.arange(20 * 30).reshape(20, 30)  # (rows, columns) as MATLAB shows it


def fields(image=GRADIENT, label=2, patient="MR01a", border=(11, 6, 15, 6, 15, 9)):
    """The members of cjdata as MATLAB v7.3 stores them: every matrix transposed."""
    mask = np.zeros(image.shape, np.uint8)
    mask[5:9, 10:15] = 1
    return {
        "PID": np.array([[ord(letter)] for letter in patient], np.uint16),
        "image": image.T.astype(np.int16),
        "label": np.array([[float(label)]]),
        "tumorBorder": np.array([border], float),
        "tumorMask": mask.T,
    }


def write_mat(path, members, group="cjdata"):
    with h5py.File(path, "w", userblock_size=512) as file:
        target = file.create_group(group) if group else file
        for name, value in members.items():
            target.create_dataset(name, data=value)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return path


def write_folds(folder, folds):
    return write_mat(folder / "cvind.mat", {"cvind": folds}, group=None)


@pytest.fixture
def folder(tmp_path):
    """Slices 1, 2 and 10 of labels 1, 2 and 3, each of its own size and intensity range."""
    data = tmp_path / "data"
    data.mkdir()
    for number, label, side, peak in ((10, 3, 64, 4000), (2, 2, 32, 255), (1, 1, 48, 90)):
        ramp = np.linspace(10, peak, side * side).reshape(side, side).astype(int)
        write_mat(data / f"{number}.mat", fields(ramp, label, f"P{number}"))
    return data


# ------------------------------------------------------------------------------ reading a slice


def test_a_slice_is_upright_and_counts_from_zero(tmp_path):
    found = read_slice(write_mat(tmp_path / "1.mat", fields()))
    np.testing.assert_array_equal(found.image, GRADIENT)
    assert found.image.dtype == np.float32
    assert found.label == 1
    assert found.patient == "MR01a"
    np.testing.assert_array_equal(found.border, [[10, 5], [14, 5], [14, 8]])
    assert found.mask.dtype == bool
    rows, columns = found.mask.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 8, 10, 14)


def changed(**changes):
    members = fields()
    for name, value in changes.items():
        if value is None:
            del members[name]
        else:
            members[name] = value
    return members


FLOATS = GRADIENT.T.astype(float)
BAD_MEMBERS = {
    "holds no image": changed(image=None),
    "holds no PID": changed(PID=None),
    "label is 7": changed(label=np.array([[7.0]])),
    "label is 0": changed(label=np.array([[0.0]])),
    "label is 1.5": changed(label=np.array([[1.5]])),
    "label is nan": changed(label=np.array([[np.nan]])),
    "label is of shape": changed(label=np.array([[1.0, 2.0]])),
    "label is not a matrix": changed(label=np.array(1.0)),
    "NaN or infinite pixels": changed(image=np.where(FLOATS == 7, np.nan, FLOATS)),
    "image holds NaN or inf": changed(image=np.where(FLOATS == 7, 1e300, FLOATS)),
    "image is not a matrix": changed(image=np.zeros((4, 20, 30))),
    "image does not hold numbers": changed(image=np.full((20, 30), b"x")),
    "label does not hold numbers": changed(label=np.array([[1 + 2j]])),
    "tumorBorder": changed(tumorBorder=np.ones((1, 7))),
    "tumorBorder is not a row": changed(tumorBorder=np.full((1, 8), np.inf)),
    "tumorMask is (20, 31)": changed(tumorMask=np.zeros((31, 20), np.uint8)),
    "PID is not": changed(PID=np.array([[10], [27]], np.uint16)),
    "PID is not a short": changed(PID=np.full((65, 1), 65, np.uint16)),
    "PID is not a short printable": changed(PID=np.array([[0xD800]], np.uint16)),
}


def assert_refused(path, fault):
    with pytest.raises(UserError) as caught:
        read_slice(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert "\n" not in message


@pytest.mark.parametrize("fault", BAD_MEMBERS)
def test_faulty_member_is_refused(tmp_path, fault):
    assert_refused(write_mat(tmp_path / "1.mat", BAD_MEMBERS[fault]), fault)


def test_wrong_group_is_refused(tmp_path):
    assert_refused(write_mat(tmp_path / "1.mat", fields(), group="other"), "holds no cjdata")
    assert_refused(
        write_mat(tmp_path / "2.mat", {"cjdata": np.ones((2, 2))}, group=None), "not an HDF5 group"
    )


def test_damaged_files_are_refused(tmp_path):
    whole = write_mat(tmp_path / "1.mat", fields()).read_bytes()
    path = tmp_path / "2.mat"
    for content, fault in (
        (b"", "empty"),
        (b"MATLAB 5.0 MAT-file" + bytes(600), "not a MATLAB v7.3"),
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-1], "truncated"),
    ):
        path.write_bytes(content)
        assert_refused(path, fault)
    assert_refused(tmp_path / "3.mat", "no such file")
    assert_refused(tmp_path / f"{'3' * 300}.mat", "")  # what is said of it depends on Python


@pytest.mark.parametrize("options", [{}, {"chunks": (8, 8)}])
def test_huge_image_is_refused_unread(tmp_path, options):
    path = write_mat(tmp_path / "1.mat", changed(image=None))
    with h5py.File(path, "r+") as file:  # no pixel of it is ever written
        file["cjdata"].create_dataset("image", shape=(4097, 2**40), dtype="i2", **options)
    assert_refused(path, "exceeds 4096")


def packed(path, data, **options):
    """A slice whose image is stored in chunks."""
    write_mat(path, changed(image=None))
    with h5py.File(path, "r+") as file:
        file["cjdata"].create_dataset("image", data=data, **options)
    return path


PIXELS = GRADIENT.T.astype(np.int16)
NOISE = np.random.default_rng(0).integers(-(2**15), 2**15, (30, 20), np.int16)


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (PIXELS, {"chunks": (7, 9)}),
        (PIXELS, {"chunks": (7, 9), "compression": "gzip"}),
        (PIXELS, {"chunks": (30, 20), "compression": "gzip", "shuffle": True}),
        (NOISE, {"chunks": (1, 1), "compression": "gzip"}),  # libhdf5 leaves these as they are
        (NOISE, {"chunks": (1, 2), "compression": "gzip", "shuffle": True}),  # nor packs these
        (NOISE, {"chunks": (30, 20), "compression": "gzip"}),
        (NOISE.astype(">i8"), {"chunks": (16, 12), "compression": "gzip", "shuffle": True}),
        (NOISE > 0, {"chunks": (16, 16), "compression": "gzip"}),
    ],
)
def test_packed_images_are_read(tmp_path, pixels, options):
    found = read_slice(packed(tmp_path / "1.mat", pixels, **options))
    np.testing.assert_array_equal(found.image, pixels.T)


@pytest.mark.parametrize("length", [1199, 1201, 1 << 20])
def test_chunk_of_another_size_is_refused(tmp_path, length):
    path = packed(tmp_path / "1.mat", PIXELS, chunks=(30, 20), compression="gzip")
    with h5py.File(path, "r+") as file:  # the chunk has 1200 bytes
        file["cjdata/image"].id.write_direct_chunk((0, 0), zlib.compress(bytes(length)))
    assert_refused(path, "does not unpack to its size")


def test_missing_chunk_is_refused(tmp_path):
    path = write_mat(tmp_path / "1.mat", changed(image=None))
    with h5py.File(path, "r+") as file:  # libhdf5 would read zeros
        image = file["cjdata"].create_dataset("image", (30, 20), "i2", chunks=(10, 20))
        image[:10] = image[20:] = 1
    assert_refused(path, "truncated or damaged")


@pytest.mark.parametrize(
    "options", [{"compression": "lzf"}, {"shuffle": True}, {"fletcher32": True}]
)
def test_foreign_packing_is_refused(tmp_path, options):
    path = packed(tmp_path / "1.mat", PIXELS, chunks=(30, 20), **options)
    assert_refused(path, "packed in a way that MATLAB does not use")


def test_image_in_very_many_chunks_is_refused(tmp_path):
    path = write_mat(tmp_path / "1.mat", changed(image=None))
    with h5py.File(path, "r+") as file:
        file["cjdata"].create_dataset("image", (4096, 4096), "i2", chunks=(1, 4095))
    assert_refused(path, "more than 4096 chunks")


@pytest.mark.parametrize("name", ["label", "PID", "tumorBorder"])
def test_long_lists_are_refused_unread(tmp_path, name):
    path = write_mat(tmp_path / "1.mat", changed(**{name: None}))
    with h5py.File(path, "r+") as file:
        file["cjdata"].create_dataset(name, (4096, 2), "u2")
    assert_refused(path, f"{name} holds 8192 numbers, expected 4096 at most")


def test_crooked_numbers_are_refused(tmp_path):
    path = write_mat(tmp_path / "1.mat", changed(image=None))
    kind = h5py.h5t.STD_I16LE.copy()
    kind.set_precision(9)
    with h5py.File(path, "r+") as file:
        space = h5py.h5s.create_simple((30, 20))
        h5py.h5d.create(file["cjdata"].id, b"image", kind, space)
    assert_refused(path, "numbers of an unusual format")
    path = write_mat(tmp_path / "2.mat", changed(image=np.zeros((30, 20), np.longdouble)))
    assert_refused(path, "does not hold numbers")


def test_enormous_file_is_refused_unopened(tmp_path):
    path = write_mat(tmp_path / "1.mat", fields())
    os.truncate(path, 2**28 + 1)  # the system stores no zeros
    assert_refused(path, "exceeds 256 MiB")


def test_links_out_of_the_file_are_not_followed(tmp_path):
    secret = write_mat(tmp_path / "secret.h5", fields())
    raw = tmp_path / "raw.bin"
    raw.write_bytes(bytes(20 * 30 * 2))
    layout = h5py.VirtualLayout((30, 20), "i2")
    layout[:] = h5py.VirtualSource(str(secret), "cjdata/image", shape=(30, 20))
    for place, fault in (
        ("external link", "a link"),
        ("soft link", "a link"),
        ("storage", "lies in"),
        ("virtual", "lies in"),
    ):
        path = write_mat(tmp_path / "1.mat", changed(image=None))
        with h5py.File(path, "r+") as file:
            group = file["cjdata"]
            if place == "external link":
                group["image"] = h5py.ExternalLink(str(secret), "cjdata/image")
            elif place == "soft link":
                group["image"] = h5py.SoftLink("/cjdata/tumorMask")
            elif place == "storage":
                group.create_dataset("image", (30, 20), "i2", external=[(str(raw), 0, 1200)])
            else:
                group.create_virtual_dataset("image", layout)
        assert_refused(path, fault)


# ------------------------------------------------------------------------ the process that reads

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits and processes")
ROOT = Path(__file__).parents[3]
MEET = """
reader.PATIENCE, read = 0.5, reader.READERS["hdf5"]
def meet(path, *rest): return {fault} if "hostile" in path else read(path, *rest)
reader.READERS = dict(hdf5=meet, dicom=meet)
"""


@pytest.fixture
def faulty(serving):
    """Let the process that reads meet a fault, an expression, with every hostile file."""
    return lambda fault: serving(MEET.format(fault=fault))


@pytest.mark.parametrize("fault", ["os.abort()", "os._exit(0)", "sum(iter(int, 1))", "1 / 0"])
def test_a_crash_or_hang_costs_one_file(tmp_path, faulty, fault):
    path, hostile = (write_mat(tmp_path / f"{name}.mat", fields()) for name in ("1", "hostile"))
    faulty(fault)
    read_slice(path)
    first = READER.process
    for _ in range(2):
        assert_refused(hostile, "damaged: reading it crashes or never ends")
        np.testing.assert_array_equal(read_slice(path).image, GRADIENT)
    assert first.returncode is not None
    assert READER.process.poll() is None
    assert READER.process.pid != first.pid


def write_looping(path):
    """A slice on which libhdf5 2.0 loops for ever: an entry of a heap leads to itself."""
    layout = h5py.VirtualLayout((30, 20), "i2")
    layout[:] = h5py.VirtualSource(".", "cjdata/tumorMask", shape=(30, 20))
    write_mat(path, changed(image=None))
    with h5py.File(path, "r+") as file:
        file["cjdata"].create_virtual_dataset("image", layout)
    content = bytearray(path.read_bytes())
    entry = content.index(b"GCOL") + 16
    content[entry + 8 : entry + 16] = (2**64 - 16).to_bytes(8, "little")  # with its header, 0
    path.write_bytes(content)
    return path


def test_a_heap_that_leads_in_circles_is_refused(tmp_path, faulty):
    faulty("None")
    assert_refused(write_looping(tmp_path / "1.mat"), "damaged")
    read_slice(write_mat(tmp_path / "2.mat", fields()))


@linux
def test_memory_is_limited(tmp_path, faulty):
    path = write_mat(tmp_path / "hostile.mat", fields())
    faulty("dict(a=reader.np.zeros(1 << 28, 'u1'))")
    assert READER.read(path, "hdf5", "", {})["a"].nbytes == 1 << 28
    faulty("dict(a=reader.np.zeros(1 << 30, 'u1'))")
    with pytest.raises(UserError, match=r"hostile\.mat: damaged"):
        READER.read(path, "hdf5", "", {})


def test_a_process_that_ended_between_two_files_costs_none(tmp_path):
    path = write_mat(tmp_path / "1.mat", fields())
    read_slice(path)
    READER.process.kill()
    READER.process.wait()
    read_slice(path)


def test_a_process_that_ends_as_it_is_asked_is_no_closed_output(tmp_path):
    path = write_mat(tmp_path / "1.mat", fields())
    read_slice(path)
    process = READER.process
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.poll = lambda: None  # it ended since it was looked at
    with pytest.raises(UserError, match=r"1\.mat: damaged: reading it crashes"):
        read_slice(path)
    read_slice(path)


def test_an_interrupted_answer_is_not_taken_for_the_next(tmp_path, monkeypatch):
    path = write_mat(tmp_path / "1.mat", fields())
    other = write_mat(tmp_path / "2.mat", fields(2 * GRADIENT))

    def interrupt(text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reader.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read_slice(other)
    np.testing.assert_array_equal(read_slice(path).image, GRADIENT)


def test_threads_take_turns(tmp_path):
    paths = [write_mat(tmp_path / f"{n}.mat", fields(n * GRADIENT)) for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_slice, paths * 10))
    for number, one in enumerate(found):
        np.testing.assert_array_equal(one.image, (number % 4 + 1) * GRADIENT)


def test_a_relative_path_is_this_processes(tmp_path, monkeypatch):
    write_mat(tmp_path / "1.mat", fields())
    read_slice(tmp_path / "1.mat")
    monkeypatch.chdir(tmp_path)
    read_slice(Path("1.mat"))


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from examples.brain_tumor.data.matlab import read_slice
print(read_slice(Path(sys.argv[2])).patient)
"""


def test_a_script_without_a_guard_elsewhere_reads(tmp_path):
    path = write_mat(tmp_path / "1.mat", fields())
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-W", "error", "script.py", ROOT, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("MR01a\n", "")


def test_the_process_that_reads_needs_no_torch():
    code = "from examples.brain_tumor.data import reader; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


KILLED = """
import os, sys
from pathlib import Path
from examples.brain_tumor.data import reader
from examples.brain_tumor.data.matlab import read_slice
path, hostile, reader.PROGRAM = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
read_slice(path)
own = reader.READER.process.pid
if os.fork() == 0:
    read_slice(path)
    print(reader.READER.process.pid != own, flush=True)
    sys.stdin.read()
    os._exit(0)
read_slice(path)
print(own, flush=True)
if sys.argv[4] == "idle":
    sys.stdin.read()
read_slice(hostile)
"""


@linux
@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_no_process_outlives_a_killed_parent(tmp_path, state):
    """Not even while one that was forked from the parent lives; that one has its own."""
    path, hostile = (write_mat(tmp_path / f"{name}.mat", fields()) for name in ("1", "hostile"))
    met = tmp_path / "met"
    os.mkfifo(met)
    meet = MEET.format(fault=f"(open({str(met)!r}, 'w').close(), sum(iter(int, 1)))")
    program = SERVE.format(change=meet)
    command = [sys.executable, "-c", KILLED, path, hostile, program, state]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as parent:
        said = {parent.stdout.readline(), parent.stdout.readline()} - {"True\n"}
        watched = os.pidfd_open(int(said.pop()))
        if state == "hanging":
            met.read_bytes()  # once the hostile file is met
        os.kill(parent.pid, signal.SIGKILL)
        ended, _, _ = select.select([watched], [], [], 60)
        os.close(watched)
    assert ended


# ---------------------------------------------------------------------------- loading and cache


def test_load_sorts_scales_and_resizes(folder):
    (folder / "notes.mat").write_text("not a slice")
    found = load_slices(folder, 24, progress=False)
    assert found.numbers == [1, 2, 10]
    assert found.labels.tolist() == [0, 1, 2]
    assert found.patients == ["P1", "P2", "P10"]
    assert found.images.shape == (3, 1, 24, 24)
    assert found.images.dtype == torch.float16
    assert found.folds is None
    assert not found.synthetic
    for image in found.images:
        assert image.min() == 0
        assert image.max() == 1
        assert (image[0].diff(dim=0) > 0).all(), "the ramp rises downwards"


def test_phantoms_are_marked(folder):
    (folder / "SYNTHETIC.txt").write_text("Phantoms.")
    planes = folder / "planes.csv"
    for text in (None, "slice,plane\n1,axial\n2,axial\n"):  # as where their making was cut off
        if text:
            planes.write_text(text)
        with pytest.raises(UserError, match=r"holds 3 phantoms, but planes\.csv lists"):
            load_slices(folder, 16, progress=False)
    planes.write_text("slice,plane\n1,axial\n2,axial\n10,axial\n")
    assert load_slices(folder, 16, progress=False).synthetic


def test_resizing_averages_before_it_samples(tmp_path):
    """Without antialiasing, every fourth pixel of these stripes would be of one colour."""
    stripes = np.tile([0, 0, 0, 1000], (64, 16)).astype(int)
    stripes[:32] = 0
    stripes[:, 32:] = 1000
    write_mat(tmp_path / "1.mat", fields(stripes))
    image = load_slices(tmp_path, 16, progress=False).images[0, 0].float()
    assert image[10:14, 2:6].mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image_is_refused(tmp_path, value):
    path = write_mat(tmp_path / "1.mat", fields(np.full((23, 23), value)))
    with pytest.raises(UserError) as caught:
        load_slices(tmp_path, 16, progress=False)
    assert str(caught.value) == f"{path}: is of one grey value throughout, expected a slice"


def test_folds_are_indexed_by_number(folder):
    folds = np.arange(ARCHIVE_SIZE, dtype=float) % 5 + 1
    for shape in ((1, -1), (-1, 1)):
        write_folds(folder, folds.reshape(shape))
        found = load_slices(folder, 16, progress=False).folds
        assert found.tolist() == [1, 2, 5]  # of 1.mat, 2.mat and 10.mat
        assert found.dtype == torch.int64


@pytest.mark.parametrize(
    ("folds", "fault"),
    [
        (np.ones((1, 3063)), "holds 3063 folds, expected 3064"),
        (np.full((1, ARCHIVE_SIZE), 6.0), "not a whole number from 1 to 5"),
        (np.full((1, ARCHIVE_SIZE), np.nan), "not a whole number from 1 to 5"),
    ],
)
def test_faulty_folds_are_refused(folder, folds, fault):
    path = write_folds(folder, folds)
    with pytest.raises(UserError, match=fault) as caught:
        load_slices(folder, 16, progress=False)
    assert str(caught.value).startswith(f"{path}: ")


def test_slice_beyond_the_folds_is_refused(folder):
    write_folds(folder, np.ones((1, ARCHIVE_SIZE)))
    write_mat(folder / "3065.mat", fields())
    with pytest.raises(UserError, match=r"cvind\.mat: has no fold for 3065\.mat"):
        load_slices(folder, 16, progress=False)


def test_folder_without_slices_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_slices(tmp_path / "absent", 16)
    write_folds(tmp_path, np.ones((1, ARCHIVE_SIZE)))
    with pytest.raises(UserError, match="holds no slices"):
        load_slices(tmp_path, 16)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    names = []

    def spy(path):
        names.append(path.name)
        return read_slice(path)

    monkeypatch.setattr(slices_module, "read_slice", spy)
    return names


def test_cache_is_used_until_something_changes(folder, decoded, tmp_path):
    cache = tmp_path / "cache"
    first = load_slices(folder, 16, cache, progress=False)
    assert decoded == ["1.mat", "2.mat", "10.mat"]
    again = load_slices(folder, 16, cache, progress=False)
    assert len(decoded) == 3
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert (first.numbers, first.patients) == (again.numbers, again.patients)
    load_slices(folder, 24, cache, progress=False)
    assert len(decoded) == 6
    os.utime(folder / "2.mat", ns=(0, 0))
    load_slices(folder, 16, cache, progress=False)
    assert len(decoded) == 9
    (folder / "10.mat").unlink()
    assert load_slices(folder, 16, cache, progress=False).numbers == [1, 2]
    assert {path.name for path in cache.iterdir()} == {"slices-16-none.npz", "slices-24-none.npz"}


def test_cache_lies_in_the_folder_by_default(folder, decoded):
    load_slices(folder, 16, progress=False)
    load_slices(folder, 16, progress=False)
    assert len(decoded) == 3
    assert [path.name for path in (folder / ".cache").iterdir()] == ["slices-16-none.npz"]


def damage_pixel(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def read_members(path):
    with np.load(path) as file:
        return dict(file)


class Payload:
    """What a hostile cache would run if it were unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def forge_pickle(path):
    payload = np.array([Payload(path.with_name("unpickled"))])
    np.savez(path, **{**read_members(path), "images": payload})


def forge_shape(path):
    members = read_members(path)
    np.savez(path, **{**members, "images": members["images"][:, :, :8]})


def forge_label(path):
    members = read_members(path)
    np.savez(path, **{**members, "labels": members["labels"] + 1})


def put_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a cache"),
    "array": put_array,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "flipped bit": damage_pixel,
    "pickle": forge_pickle,
    "shape": forge_shape,
    "label": forge_label,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_rebuilt(folder, decoded, tmp_path, damage):
    first = load_slices(folder, 16, tmp_path, progress=False)
    DAMAGES[damage](tmp_path / "slices-16-none.npz")
    again = load_slices(folder, 16, tmp_path, progress=False)
    assert len(decoded) == 6
    assert torch.equal(first.images, again.images)
    assert not (tmp_path / "unpickled").exists()
    load_slices(folder, 16, tmp_path, progress=False)
    assert len(decoded) == 6


def test_load_does_without_a_cache(folder, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert len(load_slices(folder, 16, blocked / "cache", progress=False).numbers) == 3


def test_faulty_slice_leaves_no_cache(folder, tmp_path):
    (folder / "2.mat").write_bytes(b"")
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"2\.mat: the file is empty"):
        load_slices(folder, 16, cache, progress=False)
    assert not cache.exists()


def test_real_slices(tmp_path):
    shared = Path(__file__).parents[4] / "shared"
    if not shared.is_dir():
        pytest.skip("../shared, which holds the real slices, is absent")
    numbers = [1, 709, 955, 3064]
    tool = [sys.executable, shared / "tools" / "figshare_to_mat.py", tmp_path]
    subprocess.run([*tool, "--slices", ",".join(map(str, numbers))], check=True)
    with (shared / "data" / "figshare" / "slices.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["slice"]) in numbers]
    found = load_slices(tmp_path, 64, progress=False)
    assert found.numbers == numbers
    assert [CLASS_NAMES[label] for label in found.labels] == [row["class"] for row in rows]
    assert found.folds.tolist() == [int(row["fold"]) for row in rows]
    assert read_slice(tmp_path / "955.mat").image.shape == (256, 256)
    for number in numbers:
        real = read_slice(tmp_path / f"{number}.mat")
        rows_in, columns_in = real.mask.nonzero()
        border_centre = (real.border.min(0) + real.border.max(0)) / 2
        mask_centre = [columns_in.min() + columns_in.max(), rows_in.min() + rows_in.max()]
        np.testing.assert_allclose(border_centre, np.divide(mask_centre, 2), atol=2)


# --------------------------------------------------------------------------------------- splits


def stub(counts, patients=None, folds=None):
    """A set without images: `counts` slices of each class, shuffled."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    return SliceSet(
        images=torch.zeros(len(labels), 1, 1, 1, dtype=torch.float16),
        labels=labels,
        numbers=list(range(1, len(labels) + 1)),
        patients=patients or [f"{label}-{i % 7}" for i, label in enumerate(labels.tolist())],
        folds=folds,
        synthetic=False,
    )


ARCHIVE = stub(ARCHIVE_COUNTS)


def class_counts(slices, indices):
    return slices.labels[indices].bincount(minlength=3).tolist()


def assert_partition(slices, split):
    assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(len(slices.labels)))
    assert split.train.dtype == split.test.dtype == torch.int64


def test_paper_split_has_the_papers_counts():
    split = paper_split(ARCHIVE, seed=0)
    assert class_counts(ARCHIVE, split.test) == [217, 422, 281]
    assert class_counts(ARCHIVE, split.train) == [491, 1004, 649]
    assert_partition(ARCHIVE, split)
    assert split.name == "paper"
    assert "21 of 21 patient ids have slices on both sides" in split.description


def test_paper_split_depends_on_its_seed_alone():
    first, again, other = (paper_split(ARCHIVE, seed) for seed in (0, 0, 1))
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    assert class_counts(ARCHIVE, other.test) == [217, 422, 281]


def test_swapped_split_is_the_complement():
    split, swapped = paper_split(ARCHIVE, 3), paper_split(ARCHIVE, 3, swap=True)
    assert torch.equal(split.train, swapped.test)
    assert torch.equal(split.test, swapped.train)
    assert swapped.name == "paper-swapped"


def test_paper_split_of_other_sets_is_thirty_percent():
    slices = stub((10, 21, 2))
    split = paper_split(slices, 0)
    assert class_counts(slices, split.test) == [3, 6, 1]
    assert_partition(slices, split)


@pytest.mark.parametrize("counts", [(10, 10, 1), (0, 10, 10)])
def test_paper_split_refuses_tiny_classes(counts):
    name = CLASS_NAMES[counts.index(min(counts))]
    with pytest.raises(UserError, match=f"{min(counts)} {name} slices are too few"):
        paper_split(stub(counts), 0)


def people(counts, per_patient):
    """Slices in runs of one patient, as in the archive."""
    slices = stub(counts)
    seen = [0, 0, 0]
    patients = []
    for label in slices.labels.tolist():
        patients.append(f"{label}-{seen[label] // per_patient}")
        seen[label] += 1
    return stub(counts, patients)


def test_patients_are_dealt_evenly_and_kept_apart():
    slices = people((40, 80, 60), 4)  # 10, 20 and 15 patients
    tested = []
    for fold in range(1, 6):
        split = patient_split(slices, fold, seed=0)
        assert_partition(slices, split)
        test = {slices.patients[i] for i in split.test.tolist()}
        train = {slices.patients[i] for i in split.train.tolist()}
        assert not test & train
        assert [sum(p.startswith(f"{label}-") for p in test) for label in range(3)] == [2, 4, 3]
        tested += split.test.tolist()
    assert sorted(tested) == list(range(180))
    assert split.name == "patient"
    assert "no patient id has slices on both sides" in split.description


def test_dealing_depends_on_its_seed_alone():
    slices = people((40, 80, 60), 4)
    first, again, other = (patient_split(slices, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)


def test_folds_of_cvind_decide():
    slices = people((40, 80, 60), 4)
    number_of = {patient: i for i, patient in enumerate(sorted(set(slices.patients)))}
    folds = torch.tensor([number_of[patient] % 5 + 1 for patient in slices.patients])
    slices = stub((40, 80, 60), slices.patients, folds)
    split = patient_split(slices, 2, seed=0)
    assert torch.equal(split.test, (folds == 2).nonzero()[:, 0])
    assert torch.equal(split.test, patient_split(slices, 2, seed=1).test)
    assert_partition(slices, split)
    assert "cvind.mat" in split.description


def test_patient_in_two_folds_is_refused():
    folds = torch.arange(30) % 5 + 1
    slices = stub((10, 10, 10), [f"P{i}" for i in range(29)] + ["P0"], folds)
    with pytest.raises(UserError, match="patient P0 is in fold 1 and in another"):
        patient_split(slices, 1, seed=0)
    patient_split(slices, 2, seed=0)


def test_missing_fold_is_refused():
    for fold in (0, 6):
        with pytest.raises(UserError, match=f"fold {fold} has no slices"):
            patient_split(people((40, 80, 60), 4), fold, seed=0)


def test_fold_with_all_of_a_class_is_refused():
    slices = stub((10, 10, 10), [f"P{i}" for i in range(30)])
    folds = torch.where(slices.labels == 2, 4, 1)
    with pytest.raises(UserError, match="every pituitary slice is in fold 4"):
        patient_split(stub((10, 10, 10), slices.patients, folds), 4, seed=0)
