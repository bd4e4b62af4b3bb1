"""A reproduction, small: what it leaves, what it does again and what not, and its report."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples.brain_tumor.data.phantoms import MARKER_NAME, _write
from examples.brain_tumor.data.slices import load_slices
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import read_rows
from examples.brain_tumor.report import reproduction_report
from examples.brain_tumor.report.reproduction_report import write_reproduction_report
from examples.brain_tumor.reproduction import running as reproduction
from examples.brain_tumor.reproduction import speed
from examples.brain_tumor.reproduction.plan import Budget, plan_runs
from examples.brain_tumor.reproduction.running import (
    complete_run,
    is_finished,
    measure,
    run_plan,
)

CHANGES = {
    **{"image_size": 32, "epochs": 1, "learning_rate": 1e-3, "schedule": "cosine"},
    **{"width": 0.25, "embedding_size": 16},
    "annealing_gamma": 1.0,
}
TINY = Budget("tiny", "paper", CHANGES, 2, 2, 1, 1, 48, (2.0,))
CHOSEN = (
    "slice-sphereface-m5-seed0",
    "slice-softmax-seed0",
    "patient-sphereface-m5-fold1",
    "slice-cosface-seed0",
)
SPLIT_NAMES = ("meningioma", "glioma", "pituitary")


def some_runs(budget, weights):
    return [run for run in plan_runs(budget, weights) if run.name in CHOSEN]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """90 slices of 45 patients with a blob whose place tells the class, as .mat files."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    corner = np.array([[6.0, 6.0], [12.0, 6.0], [12.0, 12.0], [6.0, 12.0]])
    for number in range(1, 91):
        label = number % 3
        picture = generator.integers(0, 200, (32, 32)).astype(np.int16)
        border = corner + 6 * label
        picture[6 + 6 * label : 13 + 6 * label, 6 + 6 * label : 13 + 6 * label] += 800
        patient = f"P{number % 3}{(number - 1) // 6}"
        _write(folder / f"{number}.mat", label, patient, picture, border)
    (folder / MARKER_NAME).write_text("made for a test\n")
    rows = [f"{number},{('axial', 'coronal')[number % 2]}" for number in range(1, 91)]
    (folder / "planes.csv").write_text("slice,plane\n" + "\n".join(rows) + "\n")
    return folder


def in_this_process(jobs, out):
    """Instead of processes, which first import all anew."""
    return ThreadPoolExecutor(1)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory, few_trees):
    """A reproduction of the chosen runs, all finished, with its report."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "plan_runs", some_runs)
        patch.setattr(reproduction, "_pool", in_this_process)
        assert run_plan(data, None, out, TINY, jobs=1) == []
        patch.setattr(speed, "ROUNDS", 2)
        measure(data, None, out, TINY)
    write_reproduction_report(out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(reproduction, "plan_runs", some_runs)


def test_every_run_has_its_folder(finished):
    assert {path.name for path in (finished / "runs").iterdir() if path.is_dir()} == set(CHOSEN)
    for run in some_runs(TINY, None):
        assert is_finished(finished / "runs" / run.name, run)
    described = json.loads((finished / "reproduction.json").read_text())
    assert described["slices"] == 90
    assert described["synthetic"] is True
    start, end = read_rows(finished / "sessions.jsonl")
    assert start["jobs"] == 1
    assert start["runs left"] == end["finished"] == len(CHOSEN)
    assert end["failed"] == []
    assert "torch" in start


def test_a_report_of_phantoms_says_so_everywhere(finished):
    text = (finished / "report.md").read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert len(titles) > 12
    assert all(title.startswith("SYNTHETIC: ") for title in titles)
    captions = re.findall(r"^!\[(.*)\]", text, re.MULTILINE)
    assert captions
    assert all(caption.startswith("SYNTHETIC: ") for caption in captions)
    assert not re.search(r"^\| the paper", text, re.MULTILINE)
    assert "98.69" not in text
    assert text.count("Not a medical device") == 2


def test_a_report_holds_what_ran(finished):
    text = (finished / "report.md").read_text()
    for path in re.findall(r"\]\((figures/.*?\.png)\)", text):
        assert (finished / path).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((finished / "runs" / CHOSEN[1] / "metrics.json").read_text())
    recall = 100 * metrics["recall"][0]
    row = next(line for line in text.splitlines() if line.startswith("| SoftMax"))
    assert f"{int(recall * 100) / 100:.2f}" in row
    missing = len(plan_runs(TINY, None)) - len(CHOSEN)
    assert f"Not finished, {missing} of " in text
    assert f"{len(CHOSEN)} of {len(CHOSEN) + missing} runs are finished" in text
    assert re.search(r"^\| trainings killed and resumed +\| 20 ", text, re.MULTILINE)
    page = (finished / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") == text.count("](figures/")


def test_real_slices_stand_beside_the_paper(copy, blank_figures):
    path = copy / "reproduction.json"
    path.write_text(path.read_text().replace('"synthetic": true', '"synthetic": false'))
    write_reproduction_report(copy)
    text = (copy / "report.md").read_text()
    assert "SYNTHETIC" not in text
    rows = [line for line in text.splitlines() if line.startswith("| the paper")]
    assert any("98.69" in row for row in rows)
    assert any("95.47" in row for row in rows)
    assert "printed by the paper" in text
    assert "missed" in text or "reached" in text


def test_the_report_needs_the_folder_alone_and_comes_out_the_same(copy):
    before = (copy / "report.md").read_bytes(), (copy / "report.html").read_bytes()
    for kept in copy.glob("runs/*/classifications.json"):
        kept.unlink()
    shutil.rmtree(copy / "figures")
    write_reproduction_report(copy)
    assert ((copy / "report.md").read_bytes(), (copy / "report.html").read_bytes()) == before


def test_what_is_finished_is_left_alone(copy, data, few, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in copy.glob("runs/*/*")}
    monkeypatch.setattr(reproduction, "_task", None)  # nothing may be handed out
    assert run_plan(data, None, copy, TINY, jobs=1) == []
    assert {path: path.stat().st_mtime_ns for path in copy.glob("runs/*/*")} == before


def test_an_unevaluated_run_is_evaluated_and_not_trained_again(copy, data, few):
    run = copy / "runs" / CHOSEN[0]
    metrics, checkpoint = (run / "metrics.json").read_bytes(), (run / "checkpoint.pt").stat()
    (run / "metrics.json").unlink()
    slices = load_slices(data, 32, progress=False)
    planned = next(one for one in some_runs(TINY, None) if one.name == CHOSEN[0])
    complete_run(run, planned.settings, slices)
    assert json.loads((run / "metrics.json").read_bytes()) == json.loads(metrics)
    assert (run / "checkpoint.pt").stat().st_mtime_ns == checkpoint.st_mtime_ns


@pytest.mark.parametrize("other", ["budget", "weights", "data"])
def test_another_reproduction_is_not_mixed_in(copy, data, few, tmp_path, other):
    budget, weights = TINY, None
    if other == "budget":
        budget = replace(TINY, changes={**CHANGES, "epochs": 2})
    elif other == "weights":
        weights = tmp_path / "weights.safetensors"
        save_file({"stem.conv.weight": torch.zeros(1)}, weights)
    else:
        data = Path(shutil.copytree(data, tmp_path / "data"))
        (data / "90.mat").unlink()
        planes = (data / "planes.csv").read_text().splitlines()
        (data / "planes.csv").write_text("\n".join(planes[:-1]))
    with pytest.raises(UserError, match=r"reproduction\.json: .* goes on with its own"):
        run_plan(data, weights, copy, budget, jobs=1)


def test_a_folder_of_something_else_is_refused(data, few, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        run_plan(data, None, tmp_path, TINY, jobs=1)
    with pytest.raises(UserError, match="no such weights file"):
        run_plan(data, tmp_path / "absent", tmp_path / "new", TINY, jobs=1)
    with pytest.raises(UserError, match=r"reproduction\.json"):
        write_reproduction_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["notes.txt"]


def test_a_name_that_no_run_has_is_refused(data, tmp_path):
    with pytest.raises(UserError, match="--only slice-shpere: no run has such a name, unlike "):
        run_plan(data, None, tmp_path / "out", TINY, jobs=1, chosen="slice-shpere")
    assert not (tmp_path / "out" / "reproduction.json").exists()


def test_faulty_weights_leave_a_folder_that_others_can_begin(data, few, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        run_plan(data, weights, tmp_path / "new", TINY, jobs=1)
    assert not (tmp_path / "new").exists()


def test_a_failing_run_keeps_none_of_the_others(data, tmp_path, monkeypatch):
    from examples.brain_tumor.settings import override_settings

    chosen = [run for run in some_runs(TINY, None) if run.name in (CHOSEN[1], CHOSEN[3])]
    bad = override_settings(chosen[1].settings, {"margin": 5.0})
    broken = type(chosen[1])(chosen[1].name, chosen[1].group, chosen[1].training, bad)
    monkeypatch.setattr(reproduction, "plan_runs", lambda budget, weights: [broken, chosen[0]])
    monkeypatch.setattr(reproduction, "_pool", in_this_process)
    failures = run_plan(data, None, tmp_path / "out", TINY, jobs=1)
    assert len(failures) == 1
    assert failures[0].startswith(f"{CHOSEN[3]}: --margin 5.0: ")
    assert is_finished(tmp_path / "out" / "runs" / CHOSEN[1], chosen[0])
    assert read_rows(tmp_path / "out" / "sessions.jsonl")[-1]["failed"] == failures


SCRIPT = """
import sys
from pathlib import Path

if __name__ == "__main__":  # the workers need none of it
    from examples.brain_tumor.reproduction import running as reproduction
    from tests.brain_tumor.reproduction.test_running import TINY, some_runs

    reproduction.plan_runs = lambda *given: some_runs(*given)[-2:]
    reproduction.run_plan(Path(sys.argv[1]), None, Path(sys.argv[2]), TINY, jobs=2)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for processes as Linux does")
def test_workers_die_with_their_parent_and_the_same_plan_goes_on(
    data, finished, tmp_path, monkeypatch
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(data), str(out)]
    runs = first, last = some_runs(TINY, None)[-2:]
    stand_still = out / "runs" / last.name / "split.json.partial"
    stand_still.parent.mkdir(parents=True)
    os.mkfifo(stand_still)  # who writes here waits for a reader: this run does not end
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not is_finished(out / "runs" / first.name, first):
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    watched = [os.pidfd_open(int(child)) for child in children]
    process.send_signal(signal.SIGKILL)
    process.wait()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 100)[0], "a worker outlives its parent"
        os.close(descriptor)
    assert len(children) >= 2
    assert not is_finished(stand_still.parent, last)
    stand_still.unlink()
    monkeypatch.setattr(reproduction, "plan_runs", lambda budget, weights: runs)
    monkeypatch.setattr(reproduction, "_pool", in_this_process)
    assert run_plan(data, None, out, TINY, jobs=1) == []
    for run in runs:
        one, other = (
            json.loads((folder / "runs" / run.name / "metrics.json").read_text())
            for folder in (out, finished)
        )
        assert one == other


def test_what_the_minutes_do_not_allow_is_left_for_the_same_command(
    data, tmp_path, few, capsys, monkeypatch
):
    out = tmp_path / "out"
    assert run_plan(data, None, out, TINY, jobs=1, minutes=0.01) == []
    assert "0.01 min are over" in capsys.readouterr().out
    start, end = read_rows(out / "sessions.jsonl")
    assert start["runs left"] == len(CHOSEN)
    assert end["finished"] == 0
    assert end["failed"] == []
    monkeypatch.setattr(reproduction, "_pool", in_this_process)
    assert run_plan(data, None, out, TINY, jobs=1, chosen=CHOSEN[1], minutes=60) == []
    assert read_rows(out / "sessions.jsonl")[-1]["finished"] == 1


def test_samples_are_those_of_the_planes(finished):
    with np.load(finished / "samples.npz") as samples:
        cells = set(samples.files)
    assert cells == {f"{name} {plane}" for name in SPLIT_NAMES for plane in ("axial", "coronal")}


def test_speed_is_measured(finished):
    found = json.loads((finished / "speed.json").read_text())
    assert min(found["step"], found["floor"], found["batch"]) > 0
    assert (found["image_size"], found["batch_size"]) == (32, 32)
    assert "images/s" in (finished / "report.md").read_text()


def test_report_sections_of_an_empty_reproduction(data, few, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "plan_runs", lambda budget, weights: [])
    run_plan(data, None, tmp_path / "out", TINY, jobs=1)
    assert write_reproduction_report(tmp_path / "out").name == reproduction_report.PAGE
