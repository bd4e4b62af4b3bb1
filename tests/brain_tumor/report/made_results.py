"""A reproduction's folder with made-up embeddings and their answers: no network is trained."""

import csv
import json
import zlib
from pathlib import Path

import numpy as np

from examples.brain_tumor.data.slices import CLASS_NAMES
from examples.brain_tumor.reproduction.plan import Budget, plan_runs
from examples.brain_tumor.settings import write_settings

MADE = {
    "image_size": 32,
    "epochs": 4,
    "learning_rate": 1e-3,
    "schedule": "cosine",
    "annealing_gamma": 1.0,
}
BUDGET = Budget("made", "paper", MADE, 3, 3, 2, 2, 48, (0.5, 2.0))
COUNT = 90  # slices, three of each patient
NUMBERS = 10 + 7 * np.arange(COUNT)
PATIENTS = np.arange(COUNT) // 3
LABELS = PATIENTS % 3
FOLDS = np.repeat(np.arange(1, 6), [9, 15, 18, 21, 27])  # of as many slices


def write_reproduction(folder: Path, synthetic: bool = False, unfinished: tuple[str, ...] = ()):
    """Write a folder as `reproduce` leaves it, but for checkpoints; return it."""
    description = {"budget": vars(BUDGET), "synthetic": synthetic, "slices": COUNT}
    (folder / "runs").mkdir(parents=True)
    (folder / "reproduction.json").write_text(json.dumps(description))
    rows = [
        {"slice": number, "class": CLASS_NAMES[label], "patient": f"P{patient:02}"}
        for number, label, patient in zip(NUMBERS, LABELS, PATIENTS, strict=True)
    ]
    write_rows(folder / "slices.csv", rows)
    for run in plan_runs(BUDGET, None):
        if run.name not in unfinished:
            write_run(folder / "runs" / run.name, run)
    return folder


SUMS = {"slices_sha256": "a", "images_sha256": "b", "weights_sha256": "c"}
LATE = ("patient-triplet-fold3", "slice-softmax-seed1")  # in the plan's order


def reproduction(folder, unfinished=(), **sums):
    """The same as a finished one stands on disk: with sums, checkpoints and environments."""
    write_reproduction(folder, unfinished=unfinished)
    path = folder / "reproduction.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SUMS, **sums}))
    for run in (folder / "runs").iterdir():
        (run / "checkpoint.pt").write_bytes(b"large")
        (run / "environment.json").write_text('{"precision": "float32", "commit": "abc"}')
    return folder


def write_run(folder, run):
    folder.mkdir()
    epochs, generator = run.settings.training.epochs, generator_of(run.name)
    train, test = sides(run.settings.data)
    (folder / "settings.toml").write_text(write_settings(run.settings))
    (folder / "metrics.json").write_text(json.dumps({"epoch": epochs}))
    split = {"train": NUMBERS[train].tolist(), "test": NUMBERS[test].tolist(), "sha256": "0" * 64}
    (folder / "split.json").write_text(json.dumps(split))
    log = [{"loss": epochs - i + generator.random(), "seconds": 1.5} for i in range(epochs)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    np.save(folder / "angles.npy", generator.uniform(0, np.pi, (COUNT, 3)))
    embeddings, mirrored = (make_embeddings(generator, noise) for noise in (0.8, 0.6))
    np.save(folder / "embeddings.npy", embeddings)
    write_rows(folder / "predictions.csv", answer(embeddings, train, test))
    write_rows(folder / "predictions_views2.csv", answer(mirrored, train, test))


def generator_of(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def make_embeddings(generator, noise):
    embeddings = np.eye(3, 6)[LABELS] + noise * generator.normal(size=(COUNT, 6))
    return (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)


def sides(data):
    """Training and test indices; a third of the slices is tested where patients are mixed."""
    if data.split.startswith("patient"):
        tested = np.equal(FOLDS, data.fold)
    else:
        order = np.random.default_rng(data.split_seed).permutation(COUNT)
        tested = np.isin(np.arange(COUNT), order[: COUNT // 3])
    train, test = np.flatnonzero(~tested), np.flatnonzero(tested)
    return (test, train) if data.split.endswith("swapped") else (train, test)


def answer(embeddings, train, test):
    rows = []
    for index in test:
        cosines = embeddings[train] @ embeddings[index]
        best = [cosines[LABELS[train] == label].max() for label in range(3)]
        named = dict(zip((f"score_{name}" for name in CLASS_NAMES), best, strict=True))
        rows.append(
            {
                "slice": NUMBERS[index],
                "patient": f"P{PATIENTS[index]:02}",
                "truth": CLASS_NAMES[LABELS[index]],
                "predicted": CLASS_NAMES[int(np.argmax(best))],
                "nearest_training_slice": NUMBERS[train[np.argmax(cosines)]],
                **named,
            }
        )
    return rows


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_answers(folder, name, file="predictions.csv"):
    """Truth, answers, scores and patients of a run, read without the code that is tested."""
    with (folder / "runs" / name / file).open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    truth, predicted = (
        np.array([CLASS_NAMES.index(row[key]) for row in rows]) for key in ("truth", "predicted")
    )
    scores = np.array([[float(row[f"score_{name}"]) for name in CLASS_NAMES] for row in rows])
    return truth, predicted, scores, np.array([row["patient"] for row in rows])
