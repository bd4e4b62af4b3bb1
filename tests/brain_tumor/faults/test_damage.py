"""Damage, other images and other processes: none of them is taken for the truth."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from examples.brain_tumor.data.slices import load_slices
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import evaluate as evaluate_module
from examples.brain_tumor.evaluation.evaluate import evaluate, read_predictions
from examples.brain_tumor.files import append_rows, locked, read_array, read_json, read_rows
from examples.brain_tumor.report.examination_tables import read_pointing
from examples.brain_tumor.reproduction.merging import collect
from examples.brain_tumor.settings import read_settings
from examples.brain_tumor.training.checkpoint import TrainingState
from examples.brain_tumor.training.loop import train
from examples.brain_tumor.training.run_folder import RECORDS
from examples.brain_tumor.use import examination
from examples.brain_tumor.use.export import export
from examples.brain_tumor.use.prediction import predict
from tests.brain_tumor.data.test_slices import fields, write_mat
from tests.brain_tumor.report.made_results import LATE, reproduction


def flip(path, place):
    """Change a bit of a file so that its text stays text."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damage_to_results_is_not_read_as_truth(trained, blobs):
    evaluate(trained, blobs)
    table = trained / "predictions.csv"
    readers = {
        "predictions.csv": lambda path: read_predictions(path),
        "predictions_views2.csv": lambda path: read_predictions(path),
        "metrics.json": lambda path: read_json(path),
        "embeddings.npy": lambda path: read_array(path),
        "angles.npy": lambda path: read_array(path),
        "settings.toml": lambda path: read_settings(path),
        "split.json": lambda path: read_json(path),
        "log.jsonl": lambda path: read_rows(path),
        "steps.jsonl": lambda path: read_rows(path),
        "environment.json": lambda path: read_json(path),
    }
    sums = dict(line.split()[::-1] for line in (trained / "SHA256SUMS").read_text().splitlines())
    assert sums == {n: hashlib.sha256((trained / n).read_bytes()).hexdigest() for n in readers}
    for name, read in readers.items():
        path = trained / name
        read(path)
        digit = path.read_bytes().rindex(b"1") if path.suffix != ".npy" else -3
        flip(path, digit)
        with pytest.raises(UserError, match=f"{name}: is damaged"):
            read(path)
        if name in RECORDS:  # which another evaluation would not replace
            with pytest.raises(UserError, match=f"{name}: is damaged"):
                evaluate(trained, blobs)
        flip(path, digit)
    evaluate(trained, blobs)
    assert len(read_predictions(table).numbers) == 9
    (trained / "SHA256SUMS").write_bytes(b"\xff")
    with pytest.raises(UserError, match="SHA256SUMS"):
        read_predictions(table)
    (trained / "SHA256SUMS").unlink()  # of a version that kept none
    assert len(read_predictions(table).numbers) == 9


def test_damage_to_what_examine_found_is_not_read_as_truth(trained, blobs, tmp_path, monkeypatch):
    evaluate(trained, blobs)
    monkeypatch.setattr(examination, "judge_strange", lambda reference: {"false_alarms": 0.1})
    monkeypatch.setattr(examination, "point", lambda reference, data: "slice,inside\n1,1\n")
    examination.examine(trained, blobs, tmp_path)
    assert "predictions.csv" in (trained / "SHA256SUMS").read_text()
    for _ in range(2):  # examined, and evaluated again
        for name, read in (("strange.json", read_json), ("pointing.csv", read_pointing)):
            digit = (trained / name).read_bytes().rindex(b"1")
            flip(trained / name, digit)
            with pytest.raises(UserError, match=f"{name}: is damaged"):
                read(trained / name)
            with pytest.raises(UserError, match=f"{name}: is damaged"):
                evaluate(trained, blobs)
            flip(trained / name, digit)
        evaluate(trained, blobs)
    (trained / "SHA256SUMS").unlink()  # of a version that kept none
    examination.examine(trained, blobs, tmp_path)
    evaluate(trained, blobs)


def test_other_images_under_the_same_numbers_are_refused(
    trained, blobs, blob_split, tiny_settings, tmp_path, traced
):
    turned = dataclasses.replace(blobs, images=blobs.images.flip((2, 3)), digest="turned")
    for use in (
        lambda slices: evaluate(trained, slices),
        lambda slices: predict(trained, [], slices, tmp_path / "answers"),
        lambda slices: export(trained, slices, tmp_path / "model"),
        lambda slices: train(tiny_settings, slices, blob_split, trained, resume=True),
    ):
        with pytest.raises(UserError, match=r"split\.json: .*other images under the same numbers"):
            use(turned)
        use(blobs)


def test_runs_that_kept_no_sum_of_their_images_go_on(trained, blobs):
    path = trained / "split.json"
    split = json.loads(path.read_text())
    assert split.pop("images_sha256") == blobs.digest
    assert split.pop("classes") == list(blobs.classes)
    path.write_text(json.dumps(split))
    (trained / "SHA256SUMS").unlink()  # nor one of their split
    evaluate(trained, blobs)


def test_damage_is_found_before_the_first_evaluation(trained, blobs):
    for name in ("settings.toml", "split.json"):
        digit = (trained / name).read_bytes().rindex(b"1")
        flip(trained / name, digit)
        with pytest.raises(UserError, match=f"{name}: is damaged"):
            evaluate(trained, blobs)
        flip(trained / name, digit)
    evaluate(trained, blobs)


def test_a_run_that_goes_on_keeps_no_sums_of_its_logs(tmp_path, tiny_settings, blobs, blob_split):
    def stop(state, folder):
        save(state, folder)
        raise KeyboardInterrupt

    save, run = TrainingState.save, tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings, blobs, blob_split, run)
    evaluate(run, blobs)
    assert len(read_rows(run / "log.jsonl")) == 1
    append_rows(run / "log.jsonl", [{}])  # as a training that goes on meanwhile does
    assert len(read_rows(run / "log.jsonl")) == 2
    for _ in range(2):  # the second time there is nothing left to train
        train(tiny_settings, blobs, blob_split, run, resume=True)
        assert len(read_rows(run / "log.jsonl")) == 2
        evaluate(run, blobs)


def test_two_evaluations_of_a_run_do_not_meet(trained, blobs, monkeypatch):
    evaluate_once = evaluate_module._evaluate

    def meanwhile(*given):
        with pytest.raises(UserError, match="another process is at work"):
            evaluate(trained, blobs)
        return evaluate_once(*given)

    monkeypatch.setattr(evaluate_module, "_evaluate", meanwhile)
    evaluate(trained, blobs)
    assert not list(trained.glob(".*"))


def test_the_cache_is_rebuilt_where_a_bit_is_flipped(tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "data").mkdir()
    write_mat(tmp_path / "data" / "1.mat", fields())
    first = load_slices(tmp_path / "data", 32, cache, progress=False)
    path = cache / "slices-32-none.npz"
    whole, generator = path.read_bytes(), np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 60).tolist():
        path.write_bytes(whole)
        flip(path, place)
        again = load_slices(tmp_path / "data", 32, cache, progress=False)
        assert torch.equal(first.images, again.images)
        assert (again.digest, again.numbers, again.patients) == (first.digest, [1], ["MR01a"])


def test_what_is_collected_has_sums_and_damage_is_not_collected(tmp_path):
    made = reproduction(tmp_path / "made", LATE)
    collect(made, tmp_path / "kept")
    for own in (tmp_path / "kept" / "runs").iterdir():
        names = {line.split("  ")[1] for line in (own / "SHA256SUMS").read_text().splitlines()}
        assert names == {path.name for path in own.iterdir()} - {"SHA256SUMS"}
    path = tmp_path / "kept" / "runs" / "slice-softmax-seed0" / "embeddings.npy"
    flip(path, -3)
    with pytest.raises(UserError, match="damaged"):
        read_array(path)
    flip(path.with_name("predictions.csv"), -2)
    with pytest.raises(UserError, match=r"predictions\.csv: is damaged"):
        collect(tmp_path / "kept", tmp_path / "again")


# ------------------------------------------------------------------------------------------ locks


def test_another_name_of_a_folder_leads_to_the_same_lock(tmp_path):
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)
    with locked(folder):
        for other in (link, tmp_path / "x" / ".." / "run"):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(UserError, match="another process"), locked(other):
                pass
    assert not folder.exists()  # it was made for the lock alone


def test_a_run_may_lie_where_one_is(tmp_path, tiny_settings, blobs, blob_split, monkeypatch):
    """`train --out .`, whose own lock must not be in its way, nor may the folder above be."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    train(tiny_settings, blobs, blob_split, type(tmp_path)("."))
    assert (tmp_path / "run" / "checkpoint.pt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_lock_left_by_a_killed_process_holds_no_one_up(
    tmp_path, tiny_settings, blobs, blob_split
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    train(tiny_settings, blobs, blob_split, tmp_path / "run")


def test_a_lock_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """One process opens the lock's file, another removes it and makes a new one."""
    import fcntl

    take = fcntl.flock

    def late(descriptor, kind):
        shutil.move(tmp_path / ".lock", tmp_path / "removed")
        (tmp_path / ".lock").touch()
        take(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass
