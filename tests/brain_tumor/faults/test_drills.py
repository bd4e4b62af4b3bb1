"""The drills: what they count, and that they would notice a fault."""

import errno
import json
import operator
import os
import struct
import sys
import time

import h5py
import numpy as np
import pytest
import torch

from examples.brain_tumor import files
from examples.brain_tumor.data.matlab import read_slice
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import append_rows, read_rows, replacing
from examples.brain_tumor.settings import override_settings
from tests.brain_tumor.faults import drills, hostile_files, mutations, trial_reader
from tests.brain_tumor.faults.drills import full_disk, is_same_run, killed_runs, run_drills
from tests.brain_tumor.faults.hostile_files import malicious_archives, mutated_mats

linux = pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's limits and devices")

# ------------------------------------------------------------------------------ hostile slices


def test_hostile_slices_are_refused_or_sound(tmp_path):
    """A reproduction's report tries a thousand."""
    counts = mutated_mats(tmp_path, count=300)
    assert counts["failed"] == 0
    assert counts["refused"] + counts["read"] == counts["tried"] == 300
    assert counts["refused"] > 150
    assert counts["read"] > 15  # many a bit is a pixel's, or no one's
    assert [path.name for path in tmp_path.iterdir()] == [mutations.OUTSIDE]


def test_the_slices_are_sound_before(tmp_path):
    for seed in range(8):
        mutations.write_valid(tmp_path / "1.mat", np.random.default_rng(seed))
        found = read_slice(tmp_path / "1.mat")
        assert found.image.shape[0] in mutations.SIDES
        assert found.mask.sum() > 100


ALWAYS_REFUSED = (
    *("_missing_field", "_renamed_field", "_renamed_struct", "_folds_in_place_of_a_slice"),
    *("_chunk_bomb", "_link", "_not_a_dataset", "_stored_elsewhere", "_virtual", "_wrong_value"),
    *("_huge_shape", "_circular_index"),
)


@pytest.mark.parametrize("name", ALWAYS_REFUSED)
def test_what_is_no_slice_is_refused(tmp_path, name):
    mutations.write_valid(tmp_path / mutations.OUTSIDE, np.random.default_rng(0))
    path = tmp_path / "1.mat"
    for seed in range(6):
        generator = np.random.default_rng(seed)
        mutations.write_valid(path, generator)
        getattr(mutations, name)(path, generator)
        with pytest.raises(UserError, match=r"1\.mat: "):
            read_slice(path)


def test_spoiling_depends_on_the_seed_alone(tmp_path):
    kinds = []
    for _ in range(2):
        for seed in range(20):
            generator = np.random.default_rng(seed)
            mutations.write_valid(tmp_path / "1.mat", generator)
            kinds.append(mutations.mutate(tmp_path / "1.mat", generator))
    assert kinds[:20] == kinds[20:]
    assert len(set(kinds)) > 8


def test_checksums_are_as_libhdf5_writes_them(tmp_path):
    with h5py.File(tmp_path / "1.h5", "w", libver="latest") as file:
        file.create_group("cjdata").update({"PID": np.ones((3, 1)), "label": 1.0})
    content = (tmp_path / "1.h5").read_bytes()
    extents = mutations.header_extents(content)
    assert len(extents) == 4  # of the root, the group and two data sets
    for start, stop in extents:
        (stored,) = struct.unpack_from("<I", content, stop)
        assert mutations.checksum(content[start:stop]) == stored


class Crash:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os.abort, ()


class Glutton:
    """Takes 1.1 GiB of the process that unpickles it."""

    def __reduce__(self):
        return operator.mul, (b"x", 1_181_116_006)


class Sleeper:
    """Delays the process that unpickles it."""

    def __reduce__(self):
        return time.sleep, (60,)


@linux
def test_the_drill_notices_crashes_hangs_and_gluttony(tmp_path, monkeypatch):
    path = tmp_path / "1.mat"
    mutations.write_valid(path, np.random.default_rng(0))
    with trial_reader.TrialReader() as reader:
        assert reader.read(path) == ("read", "")
        assert reader.read(Crash()) == ("failed", "the process ended with -6")
        assert reader.read(Glutton()) == ("failed", "took more than 1 GiB of memory")
        assert reader.read(path.with_name("2.mat")) == ("refused", "")
        monkeypatch.setattr(trial_reader, "PATIENCE", 0.1)
        assert reader.read(Sleeper()) == ("failed", "no answer within 0 s")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UserError("{path}: damaged"), "refused"),
        (UserError("{path}: da\nmaged"), "failed"),
        (UserError("damaged"), "failed"),
        (ZeroDivisionError(), "failed"),
    ],
)
def test_only_one_line_that_names_the_file_is_a_refusal(tmp_path, monkeypatch, error, outcome):
    def read(path):
        raise type(error)(*(str(argument).format(path=path) for argument in error.args))

    monkeypatch.setattr(trial_reader, "read_slice", read)
    assert trial_reader._try_reading(tmp_path / "1.mat")[0] == outcome


def test_an_unsound_slice_is_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "1.mat"
    mutations.write_valid(path, np.random.default_rng(0))
    found = read_slice(path)
    changes = {"label": 3, "mask": found.mask[1:], "image": found.image * np.nan, "patient": "\n"}
    for name, value in changes.items():
        broken = type(found)(**{**vars(found), name: value})
        monkeypatch.setattr(trial_reader, "read_slice", lambda path, broken=broken: broken)
        assert trial_reader._try_reading(path) == ("failed", "not a sound slice")


# -------------------------------------------------------------------------- killed and resumed


@linux
def test_kills_change_nothing(tmp_path):
    """A reproduction's report tries twenty."""
    counts = killed_runs(tmp_path, kills=3)
    assert counts.pop("runs") >= 1
    assert counts == {"tried": 3, "survived": 3, "failed": 0}


def test_runs_that_differ_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(drills, "TINY", override_settings(drills.TINY, {"epochs": 4}))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        drills._run(folder)
    assert is_same_run(one, other)
    contents = torch.load(other / "checkpoint.pt", weights_only=True)
    weight = contents["network"]["output.0.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    (other / "checkpoint.pt").rename(other / "kept.pt")
    torch.save(contents, other / "checkpoint.pt")
    assert not is_same_run(one, other)
    (other / "kept.pt").replace(other / "checkpoint.pt")
    assert is_same_run(one, other)
    for name in ("metrics.json", "predictions.csv", "embeddings.npy", "angles.npy"):
        content = (other / name).read_bytes()
        (other / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert not is_same_run(one, other)
        (other / name).write_bytes(content)
    rows = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    rows[3]["loss"] += 1e-9
    (other / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (other / "SHA256SUMS").unlink()
    assert not is_same_run(one, other)


# --------------------------------------------------------------------------------- full disks


@linux
def test_full_disks_leave_the_previous_files(tmp_path):
    assert full_disk(tmp_path) == {"tried": 19, "survived": 19, "failed": 0}


@linux
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "report.md").write_text("before")
    (tmp_path / "report.md.partial").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught, replacing(tmp_path / "report.md") as temporary:
        temporary.write_text("after")
    assert str(caught.value) == (
        f"{tmp_path / 'report.md'}: cannot be written: No space left on device"
    )
    assert (tmp_path / "report.md").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def fail_as_torch_does(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        try:
            raise OSError(errno.EDQUOT, "as the library puts it")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - nor does torch


def fail_by_a_bug(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("a bug")


def test_the_systems_reason_is_found_behind_a_librarys(tmp_path):
    fault = rf"x\.pt: cannot be written: {os.strerror(errno.EDQUOT)}$"
    with pytest.raises(UserError, match=fault):
        fail_as_torch_does(tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_a_fault_of_the_program_stays_one(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        fail_by_a_bug(tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_bytes_are_stored_before_the_name(tmp_path, monkeypatch):
    seen = []

    def spy(descriptor):
        seen.append((os.fstat(descriptor).st_size, (tmp_path / "x").exists()))

    monkeypatch.setattr(files.os, "fsync", spy)
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("twelve bytes")
    assert seen == [(12, False)]


def test_lines_are_stored_before_what_follows(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda one: seen.append(os.fstat(one).st_size))
    append_rows(tmp_path / "log", [{"loss": 0.5}])
    assert seen == [len('{"loss": 0.5}\n')]


def test_without_locks_there_is_no_file_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows, which removes no open file
    with files.locked(tmp_path / "new"):
        assert list((tmp_path / "new").iterdir()) == []
    assert not (tmp_path / "new").exists()


def test_a_missing_folder_is_named(tmp_path):
    path, fault = tmp_path / "absent" / "x", "absent.x: cannot be written: No such file"
    with pytest.raises(UserError, match=fault):
        append_rows(path, [{}])
    with pytest.raises(UserError, match=fault), replacing(path) as temporary:
        temporary.write_text("x")


def test_appending_adds_to_the_end(tmp_path):
    for name in ("one", "two ü"):
        append_rows(tmp_path / "log", [{"name": name}])
    assert read_rows(tmp_path / "log") == [{"name": "one"}, {"name": "two ü"}]
    assert (tmp_path / "log").read_text().count("\n") == 2


# ----------------------------------------------------------------------------------- archives


def test_malicious_archives_are_refused_and_counted(tmp_path):
    assert malicious_archives(tmp_path) == {"tried": 9, "refused": 9, "failed": 0}


@pytest.mark.parametrize("fault", ["reads all", "says more", "leaves something"])
def test_an_archive_that_gets_through_is_counted(tmp_path, monkeypatch, capsys, fault):
    def unpack(path, folder):
        if path.stem != "bomb" or fault != "reads all":
            if path.stem == "bomb" and fault == "leaves something":
                (folder.parent / "out").touch()
            lines = "\nmore" if path.stem == "bomb" and fault == "says more" else ""
            raise UserError(f"{path}: refused{lines}")

    monkeypatch.setattr(hostile_files, "unpack", unpack)
    counts = malicious_archives(tmp_path)
    assert counts["failed"] >= 1
    assert counts["refused"] + counts["failed"] == 9
    assert "malicious archive bomb.zip: " in capsys.readouterr().err


# -------------------------------------------------------------------------------- all of them


def test_run_drills_runs_each_in_its_own_folder(tmp_path, monkeypatch):
    seen = []
    for name in (
        *("mutated_mats", "killed_runs", "full_disk"),
        *("poisoned_checkpoints", "malicious_archives"),
    ):

        def drill(folder, name=name):
            seen.append((name, folder, list(folder.iterdir())))
            return {"tried": len(seen)}

        monkeypatch.setattr(drills, name, drill)
    counts = run_drills(tmp_path)
    assert [count["tried"] for count in counts.values()] == [1, 2, 3, 4, 5]
    assert [entry[0] for entry in seen][1] == "killed_runs"
    assert len({folder for _, folder, _ in seen}) == 5
    assert all(folder.parent == tmp_path and not content for _, folder, content in seen)
