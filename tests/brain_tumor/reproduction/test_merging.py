"""Finished runs go from one reproduction into another, whole and of the same data, or not."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import check_sum, write_sums
from examples.brain_tumor.report.reproduction_report import write_reproduction_report
from examples.brain_tumor.reproduction.merging import collect, merge
from examples.brain_tumor.reproduction.plan import PROPOSED, plan_runs
from examples.brain_tumor.reproduction.results import read_reproduction
from tests.brain_tumor.report.made_results import BUDGET, LATE, SUMS, reproduction

RUNS = plan_runs(BUDGET, None)
RESULTS = Path(__file__).parents[3] / "examples/brain_tumor/results"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = reproduction(tmp_path_factory.mktemp("made") / "out", LATE)
    measured = {"device": "cpu", "threads": 1, "precision": "bfloat16", "image_size": 224}
    seconds = {"batch_size": 32, "step": 1.6, "floor": 1.28, "batch": 0.04}
    (folder / "speed.json").write_text(json.dumps(measured | seconds))
    return folder


@pytest.fixture(scope="module")
def collected(made):
    assert len(collect(made, made.with_name("kept"))) == len(RUNS) - len(LATE)
    return made.with_name("kept")


@pytest.fixture
def kept(collected, tmp_path):
    return shutil.copytree(collected, tmp_path / "kept")


def test_what_is_collected_is_small_and_reports_the_same(made, kept, blank_figures):
    assert not list(kept.rglob("checkpoint.pt"))
    ours, theirs = read_reproduction(made), read_reproduction(kept)
    assert theirs.missing == ours.missing == list(LATE)
    for one, other in zip(ours.results, theirs.results, strict=True):
        assert one.metrics == other.metrics
    halved = np.load(kept / "runs" / "slice-softmax-seed0" / "embeddings.npy")
    whole = np.load(made / "runs" / "slice-softmax-seed0" / "embeddings.npy")
    assert halved.dtype == np.float16
    assert halved == pytest.approx(whole, abs=1e-3)
    assert not (kept / "runs" / "slice-softmax-seed1").exists()
    for unused in ("patient-softmax-fold1", "slice-sphereface-m5-swapped-seed0"):
        assert (made / "runs" / unused / "embeddings.npy").exists()
        assert not (kept / "runs" / unused / "embeddings.npy").exists()
    report = write_reproduction_report(kept)
    text = report.with_suffix(".md").read_text()
    assert "Not finished, 2 of " in text
    assert "a training step 20 images/s" in text


def test_the_neighbours_of_wrong_slices_are_kept_of_older_results_too(made, kept):
    ours, theirs = read_reproduction(made), read_reproduction(kept)
    runs = zip(ours.select("patient", PROPOSED), theirs.select("patient", PROPOSED), strict=True)
    wanted = [(one.neighbours(ours.slices), other) for one, other in runs]
    for neighbours, other in wanted:
        assert other.neighbours(theirs.slices) == neighbours
        (other.folder / "neighbours.csv").unlink()  # as in what was collected before
        for nearest in other.neighbours(theirs.slices).values():
            assert len(nearest) == 1
    write_sums(wanted[0][1].folder, ["predictions.csv", "split.json"])
    assert collect(made, kept) == []
    for neighbours, other in wanted:
        assert other.neighbours(theirs.slices) == neighbours
        check_sum(other.folder / "neighbours.csv")


def test_collecting_again_adds_what_was_finished_since(made, kept, tmp_path):
    more = reproduction(tmp_path / "more", LATE[:1])
    assert collect(more, kept) == [LATE[1]]
    assert collect(more, kept) == []


def test_merging_adds_finished_runs_and_leaves_ones_own(kept, tmp_path):
    own = tuple(run.name for run in RUNS[4:])
    out = reproduction(tmp_path / "out", own)
    before = (out / "runs" / RUNS[0].name / "predictions.csv").stat()
    (out / "runs" / RUNS[5].name).mkdir()  # begun, not finished
    (out / "runs" / RUNS[5].name / "checkpoint.pt").write_bytes(b"half")
    taken = merge(kept, out, RUNS)
    assert taken == [run.name for run in RUNS[4:] if run.name not in LATE]
    assert read_reproduction(out).missing == list(LATE)
    after = (out / "runs" / RUNS[0].name / "predictions.csv").stat()
    assert after.st_mtime_ns == before.st_mtime_ns
    assert not (out / "runs" / RUNS[5].name / "checkpoint.pt").exists()
    assert merge(kept, out, RUNS) == []


@pytest.mark.parametrize("key", SUMS)
def test_runs_of_other_data_or_weights_are_refused(kept, tmp_path, key):
    out = reproduction(tmp_path / "out", tuple(run.name for run in RUNS[1:]), **{key: "other"})
    with pytest.raises(UserError, match=f"{key} is '.' there and 'other' in"):
        merge(kept, out, RUNS)
    with pytest.raises(UserError, match=f"{key} is '.' there and 'other' in"):
        collect(out, kept)
    assert len(read_reproduction(out).results) == 1


def test_a_run_of_other_settings_is_refused(kept, tmp_path):
    out = reproduction(tmp_path / "out", (RUNS[0].name,))
    path = kept / "runs" / RUNS[0].name / "settings.toml"
    path.write_text(path.read_text().replace("batch_size = 32", "batch_size = 16"))
    (path.parent / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"training\.batch_size differs from the plan's"):
        merge(kept, out, RUNS)
    assert not (out / "runs" / RUNS[0].name).exists()


def test_a_merge_that_was_cut_off_goes_on(kept, tmp_path):
    out = reproduction(tmp_path / "out", (RUNS[0].name,))
    half = out / "runs" / f"{RUNS[0].name}.partial"
    shutil.copytree(kept / "runs" / RUNS[0].name, half)
    (half / "metrics.json").write_text("{")
    assert merge(kept, out, RUNS) == [RUNS[0].name]
    assert not half.exists()
    assert read_reproduction(out).results[0].metrics


def test_git_leaves_the_committed_results_as_they_are():
    """Their sums are of bytes, and git for Windows would end their lines otherwise."""
    run = next((RESULTS / "runs").iterdir())
    command = ["git", "check-attr", "text", str(run / "predictions.csv")]
    found = subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not in a repository")
    assert found.stdout.endswith("text: unset\n")
