"""The command line: it explains itself, one line says what is wrong, and one run goes through."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.brain_tumor.__main__ import demo, main
from examples.brain_tumor.data import phantoms as making
from examples.brain_tumor.data.phantoms import make_phantoms
from examples.brain_tumor.data.slices import default_cache_folder
from examples.brain_tumor.download import sources
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import read_rows
from examples.brain_tumor.report import reproduction_report, run_report
from examples.brain_tumor.report.figures import run as run_figures
from examples.brain_tumor.reproduction import running
from examples.brain_tumor.reproduction.plan import plan_runs
from examples.brain_tumor.settings import read_settings, setting_fields
from examples.brain_tumor.training import loop as training
from examples.brain_tumor.use import prediction
from tests.brain_tumor.report.made_results import BUDGET, LATE, reproduction

RUNS = plan_runs(BUDGET, None)
SMALL = ["--image-size", "32", "--epochs", "2", "--batch-size", "8", "--embedding-size", "16"]
SMALL += ["--calibration", "0"]  # of ten slices a class a tenth is too few


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    make_phantoms(folder, 30, seed=0, size=64, progress=False)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fault(capsys, arguments):
    """The one line that a faulty command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def interrupt(monkeypatch, name="finish_epoch"):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, name, stop)


def test_train_evaluate_and_compare(phantoms, tmp_path, capsys):
    runs = [tmp_path / "annealed", tmp_path / "bare"]
    for run, flag in zip(runs, ("--annealing", "--no-annealing"), strict=True):
        assert main(["train", "--data", str(phantoms), "--out", str(run), flag, *SMALL]) == 0
    assert read_settings(runs[1] / "settings.toml").loss.annealing is False
    command = capsys.readouterr().out.splitlines()[-1].strip()
    assert shlex.split(command)[3:] == ["evaluate", str(runs[1]), "--data", str(phantoms)]

    assert main(["evaluate", *map(str, runs), "--data", str(phantoms), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("SYNTHETIC slices, not patients") == 2
    assert "| this run |" in printed
    for run in runs:
        report = (run / "report.md").read_text(encoding="utf-8")
        assert report.startswith("# SYNTHETIC")
        assert "the paper, Table" not in report
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_training_says_how_to_go_on(phantoms, tmp_path, capsys, monkeypatch):
    arguments = ["train", "--data", str(phantoms), "--out", str(tmp_path / "a run"), *SMALL]
    with monkeypatch.context() as patch:
        interrupt(patch)
        assert main(arguments) == 130
    message = capsys.readouterr().err
    assert message.startswith("interrupted; continue with: ")
    resume = shlex.split(message.partition("with: ")[2])
    assert resume[:3] == ["python", "-m", "examples.brain_tumor"]
    assert main(resume[3:]) == 0
    assert len(read_rows(tmp_path / "a run" / "log.jsonl")) == 2


def test_a_training_interrupted_before_its_run_began_starts_again(
    phantoms, tmp_path, capsys, monkeypatch
):
    interrupt(monkeypatch, "start")
    assert main(["train", "--data", str(phantoms), "--out", str(tmp_path / "run"), *SMALL]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command starts again"


def test_demo_runs_resumes_and_evaluates_again(phantoms, tmp_path, capsys, monkeypatch):
    overrides = {"image_size": 32, "epochs": 1, "embedding_size": 16, "calibration": 0.0}
    (tmp_path / "phantoms").symlink_to(phantoms)
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path, 30, overrides)
    demo(tmp_path, 30, overrides)
    printed = capsys.readouterr().out
    assert "resuming the training" in printed
    assert "making" not in printed  # the slices were there
    assert "| this run |" in printed
    assert "--preset paper" in printed.splitlines()[-1]
    assert str(tmp_path / "demo" / "report.md") in printed

    checkpoint = (tmp_path / "demo" / "checkpoint.pt").read_bytes()
    demo(tmp_path, 30, overrides)
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "demo" / "checkpoint.pt").read_bytes() == checkpoint


def test_demo_makes_its_slices(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(making, "make_phantoms", lambda *a, **k: made.append((a, k)))
    with pytest.raises(UserError, match="phantoms: no such folder"):
        demo(tmp_path, 30)
    ((folder, count), options), *_ = made
    assert (folder, count, options["seed"]) == (tmp_path / "phantoms", 30, 0)


def test_faults_are_one_line(phantoms, tmp_path, capsys):
    run = tmp_path / "run"
    train = ["train", "--data", phantoms, "--out", run, *SMALL]
    message = fault(capsys, ["train", "--data", tmp_path / "absent", "--out", run])
    assert "absent: no such folder" in message
    assert "figshare.com" in message
    assert "CC BY 4.0" in message
    assert "no slices" in fault(capsys, ["train", "--data", tmp_path, "--out", run])
    assert "--epochs: must be from 1" in fault(capsys, [*train, "--epochs", "0"])
    assert "--margin: must be from 0.0" in fault(capsys, [*train, "--margin", "nan"])
    message = fault(capsys, [*train, "--weights", tmp_path / "gone.safetensors"])
    assert "gone.safetensors: no such weights file" in message
    for command in ([*train, "--resume"], ["evaluate", run, "--data", phantoms]):
        assert fault(capsys, command) == f"error: {run}: no such run\n"
    assert "count" in fault(capsys, ["make-phantoms", tmp_path / "none", "--count", "0"])
    assert not run.exists()


def test_nothing_is_overwritten(phantoms, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    message = fault(capsys, ["train", "--data", phantoms, "--out", tmp_path, *SMALL])
    assert "already exists" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_faulty_slice_is_named(phantoms, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in phantoms.glob("*.mat"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "7.mat").write_bytes((data / "7.mat").read_bytes()[:3000])
    message = fault(capsys, ["train", "--data", data, "--out", tmp_path / "run", *SMALL])
    assert str(data / "7.mat") in message
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_settings_names_the_key(phantoms, tmp_path, capsys):
    arguments = ["train", "--data", str(phantoms), "--out", str(tmp_path / "run"), *SMALL]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "loss.margin differs" in fault(capsys, [*arguments, "--resume", "--margin", "3"])
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_help_shows_every_setting_and_both_presets_values(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for _, field in setting_fields():
        assert "--" + field.name.replace("_", "-") in text
    assert "paper: 275]" in text


def test_help_names_the_commands_and_ends_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("make-phantoms", "train", "evaluate", "demo"):
        assert f"\n    {command}" in text
    assert text.index("examples:") > text.index("evaluate")
    assert "CC BY 4.0" in text


@pytest.fixture(scope="module")
def finished_run(phantoms, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    calibrated = [*SMALL, "--calibration", "0.3"]
    assert main(["train", "--data", str(phantoms), "--out", str(run), *calibrated]) == 0
    return run


def test_predict_answers_what_it_can_and_says_what_it_cannot(
    phantoms, finished_run, tmp_path, capsys
):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [str(phantoms / "1.mat"), str(tmp_path / "bad.png"), str(phantoms / "2.mat")]
    arguments = ["--data", str(phantoms), "--out", str(tmp_path / "answers")]
    capsys.readouterr()
    assert main(["predict", str(finished_run), *files, *arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["SYNTHETIC", "SYNTHETIC"]
    assert "Not a medical device" in lines[-1]
    assert captured.err.startswith(f"error: {tmp_path / 'bad.png'}: ")
    assert len(list((tmp_path / "answers").glob("*.png"))) == 2


def test_an_interrupted_predict_has_shown_its_answers(
    phantoms, finished_run, tmp_path, capsys, monkeypatch
):
    read = prediction.read_unlabelled

    def stop(path):
        if path.name == "2.mat":
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(prediction, "read_unlabelled", stop)
    files = [str(phantoms / "1.mat"), str(phantoms / "2.mat")]
    arguments = ["--data", str(phantoms), "--out", str(tmp_path / "answers")]
    capsys.readouterr()
    assert main(["predict", str(finished_run), *files, *arguments]) == 130
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"SYNTHETIC: {files[0]}: ")


def test_export_says_how_far_the_files_differ(phantoms, finished_run, tmp_path, capsys, traced):
    capsys.readouterr()
    arguments = ["--data", str(phantoms), "--out", str(tmp_path / "model")]
    assert main(["export", str(finished_run), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "model.pt2: differs from the network by at most " in printed
    assert "model.onnx: differs from the network by at most " in printed
    assert "SYNTHETIC: the model computes in float32, the run in " in printed
    assert (tmp_path / "model" / "model.json").is_file()


def test_reproduce_measures_and_reports(phantoms, tmp_path, monkeypatch, capsys):
    done = []
    for name in ("run_plan", "measure"):
        monkeypatch.setattr(
            running, name, lambda *given, name=name, **more: done.append((name, given, more))
        )
    monkeypatch.setattr(
        reproduction_report, "write_reproduction_report", lambda out: out / "report.html"
    )
    arguments = ["--data", str(phantoms), "--out", str(tmp_path), "--budget", "paper"]
    assert main(["reproduce", *arguments, "--jobs", "3"]) == 0
    assert [name for name, *_ in done] == ["run_plan", "measure"]
    assert done[0][1][3].settings(None).training.epochs == 275
    assert done[0][1][4] == 3
    assert done[0][2] == {"chosen": "*", "merged": None, "minutes": None}
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert "--jobs" in fault(capsys, ["reproduce", *arguments, "--jobs", "0"])
    for minutes in ("0", "nan", "inf"):
        assert "--minutes" in fault(capsys, ["reproduce", *arguments, "--minutes", minutes])


def test_a_reproduction_with_failures_is_reported_and_fails(
    phantoms, tmp_path, monkeypatch, capsys
):
    failed = ["a: diverged", "b: diverged"]
    monkeypatch.setattr(running, "run_plan", lambda *given, **more: failed)
    monkeypatch.setattr(running, "measure", lambda *given: None)
    monkeypatch.setattr(
        reproduction_report, "write_reproduction_report", lambda out: out / "report.html"
    )
    assert main(["reproduce", "--data", str(phantoms), "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "report: " in captured.out
    assert captured.err == "error: 2 runs failed, the first: a: diverged\n"


def test_finished_runs_go_out_and_in(phantoms, tmp_path, monkeypatch, capsys, blank_figures):
    made, kept, out = reproduction(tmp_path / "made", LATE), tmp_path / "kept", tmp_path / "out"
    assert main(["collect", str(made), str(kept)]) == 0
    assert f"{len(RUNS) - len(LATE)} runs copied" in capsys.readouterr().out
    reproduction(out, tuple(run.name for run in RUNS))
    monkeypatch.setattr(running, "plan_runs", lambda *given: RUNS)
    for name in ("_begin", "measure"):
        monkeypatch.setattr(running, name, lambda *given: None)
    monkeypatch.setattr(running, "_work", lambda *given: [])
    arguments = ["--data", str(phantoms), "--out", str(out), "--merge", str(kept)]
    assert main(["reproduce", *arguments]) == 0
    printed = capsys.readouterr().out
    assert f"{kept}: {len(RUNS) - len(LATE)} finished runs taken in" in printed
    assert (out / "report.md").is_file()


def test_report_of_no_reproduction_is_one_line(tmp_path, capsys):
    assert "reproduction.json" in fault(capsys, ["report", tmp_path])


def test_download_fetches_slices_and_weights(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(sources, "download_slices", asked.append)
    monkeypatch.setattr(sources, "download_weights", lambda path: asked.append(path) or "abc")
    weights = tmp_path / "weights"
    assert main(["download", str(tmp_path), "--weights", str(weights)]) == 0
    assert asked == [tmp_path, weights]
    assert "SHA-256 abc" in capsys.readouterr().out


# ------------------------------------------------------------------------ what the system refuses


def test_pictures_by_class_go_all_the_way(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    for label, name in enumerate(("glioma", "meningioma", "no$tumor", "pituitary")):
        (data / "Training" / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(index).integers(0, 60, (40, 40), np.uint8)
            pixels[8 * label : 8 * label + 8] += 150
            Image.fromarray(pixels).save(data / "Training" / name / f"{index}.jpg")
    command = ["train", "--data", str(data), "--out", str(run), *SMALL]
    assert main(command) == 2  # the preset splits by patient
    assert "only a split by slice" in capsys.readouterr().err
    assert main([*command, "--split", "paper"]) == 0
    counts = "glioma 8, pituitary 8, no$tumor 8"
    assert f"{run}: of 32 slices: meningioma 8, {counts}\n" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "recall no$tumor" in printed
    assert "no patient ids are known" in (run / "report.md").read_text()
    out = tmp_path / "answers"
    files = [str(data / "Training" / "no$tumor"), "--data", str(data), "--out", str(out)]
    assert main(["predict", str(run), *files]) == 0
    answers = json.loads((out / "predictions.json").read_text())["predictions"]
    assert len(answers) == 8
    assert set(answers[0]["probabilities"]) == {"glioma", "meningioma", "no$tumor", "pituitary"}
    command = ["reproduce", "--data", str(data), "--out", str(tmp_path / "all")]
    assert main(command) == 2
    assert "reproduce needs the archive's slices" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_odd_names_of_classes_and_pictures(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    for name in (b"$\\frac$", b"a|b\x1b[31m", b"\xff"):
        folder = data / os.fsdecode(name)
        folder.mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(index).integers(0, 60, (40, 40), np.uint8)
            with (folder / os.fsdecode(b"\xfe%d.png" % index)).open("wb") as file:
                Image.fromarray(pixels).save(file, "PNG")
    command = ["train", "--data", str(data), "--out", str(run), *SMALL, "--split", "paper"]
    assert main(command) == 0
    assert main(["evaluate", str(run), "--data", str(data)]) == 0
    printed = capsys.readouterr()
    assert "recall \\xff | " in printed.out
    assert "recall a\\|b_[31m | " in printed.out
    assert "\x1b" not in printed.out + printed.err
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        assert "score_\\xff" in file.readline()


def test_runs_of_one_name_are_compared_by_their_folders(
    phantoms, finished_run, tmp_path, monkeypatch, blank_figures
):
    runs = [shutil.copytree(finished_run, tmp_path / name / "run") for name in ("one", "two")]
    drawn = []
    monkeypatch.setattr(
        run_figures, "plot_early", lambda path, title, runs: drawn.append(list(runs))
    )
    command = ["evaluate", *map(str, runs), "--data", str(phantoms), "--out", str(tmp_path)]
    assert main(command) == 0
    assert drawn[-1] == list(map(str, runs))


def test_a_run_is_called_as_its_folder_from_inside_too(
    phantoms, finished_run, tmp_path, monkeypatch, blank_figures
):
    monkeypatch.chdir(shutil.copytree(finished_run, tmp_path / "inside"))
    titles = []
    monkeypatch.setattr(
        run_report, "plot_reliability", lambda path, title, *bins: titles.append(title)
    )
    assert main(["evaluate", ".", "--data", str(phantoms)]) == 0
    assert titles == ["SYNTHETIC: calibrated, inside"]
    assert Path("report.md").read_text().startswith("# SYNTHETIC: HSADML, run inside\n")


def test_resuming_needs_no_imagenet_weights(phantoms, tmp_path, monkeypatch, capsys):
    weights, out = tmp_path / "weights", tmp_path / "run"
    weights.touch()
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_imagenet_weights", lambda network, path: None)
        original = training.finish_epoch

        def stop_late(state, *arguments):
            if state.epoch:
                raise KeyboardInterrupt
            return original(state, *arguments)

        patch.setattr(training, "finish_epoch", stop_late)
        command = ["train", "--data", str(phantoms), "--out", str(out), *SMALL]
        assert main([*command, "--weights", str(weights)]) == 130
    weights.unlink()
    assert main(["train", "--data", str(phantoms), "--out", str(out), "--resume"]) == 0
    assert len(read_rows(out / "log.jsonl")) == 2


def test_what_the_system_refuses_is_one_line(phantoms, finished_run, tmp_path, capsys, monkeypatch):
    assert "cannot be written" in fault(
        capsys, ["train", "--data", phantoms, "--out", "/proc/none/run", *SMALL]
    )
    name = "a" * 300
    for arguments in (
        ["train", "--data", phantoms, "--out", tmp_path / name, *SMALL],
        ["train", "--data", tmp_path / name, "--out", tmp_path / "run", *SMALL],
        ["evaluate", tmp_path / name, "--data", phantoms],
    ):
        assert "File name too long" in fault(capsys, arguments)
    run = shutil.copytree(finished_run, tmp_path / "deep")
    (run / "split.json").write_text("[" * 100_000)
    (run / "SHA256SUMS").unlink()
    assert "not readable as JSON" in fault(capsys, ["evaluate", run, "--data", phantoms])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    message = fault(capsys, ["evaluate", finished_run, "--data", phantoms])
    assert message == f"error: {phantoms}: Permission denied\n"


@pytest.mark.parametrize("name", ["settings.toml", "split.json", "checkpoint.pt", "."])
@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "examine"])
def test_a_run_that_cannot_be_read_is_one_line(
    phantoms, finished_run, tmp_path, capsys, command, name
):
    run = tmp_path / "run"
    if name == ".":
        run.symlink_to(run)
    else:
        shutil.copytree(finished_run, run)
        (run / name).unlink()
        (run / name).mkdir()
    files = [phantoms / "1.mat", "--out", tmp_path / "out"] if command == "predict" else []
    message = fault(capsys, [command, run, *files, "--data", phantoms])
    assert message.startswith(f"error: {run / name}")
    assert not (tmp_path / "out").exists()


def test_without_a_home_a_folder_that_cannot_be_written_is_read(phantoms, monkeypatch, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "access", lambda *given: False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache_folder(phantoms) == phantoms / ".cache"


@pytest.mark.skipif(os.name == "nt", reason="a shell's pipes and locales")
def test_a_closed_pipe_and_a_plain_locale_are_no_crash(phantoms, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "l\u00e4ufe")
    root = Path(__file__).parents[2]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "examples.brain_tumor", "evaluate", str(run)]
    with subprocess.Popen(
        [*command, "--data", str(phantoms)],
        cwd=root,
        env={**os.environ, **plain},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()  # no one reads
        assert process.stderr.read() == b""
    assert process.returncode == 141
