"""Training: what a run leaves behind, and that stopping and resuming change nothing."""

import errno
import io
import json
import math
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import locked
from examples.brain_tumor.network import mobilenet
from examples.brain_tumor.settings import load_settings, override_settings, read_settings
from examples.brain_tumor.training import loop as training
from examples.brain_tumor.training import progress
from examples.brain_tumor.training.batches import batch_bounds
from examples.brain_tumor.training.loop import learning_rate, start, train
from examples.brain_tumor.training.run_folder import choose_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Bit-identity is promised there, and the tests run there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path):
    return [
        {key: row[key] for key in row if key not in ("seconds", "images_per_second")}
        for row in rows(path)
    ]


def interrupt_in_epoch(monkeypatch, epoch):
    """Make training stop in an epoch (from 0), after a step of it, as Ctrl-C does."""
    original = training.take_step
    seen = []

    def step(state, *arguments):
        if state.epoch == epoch:
            if seen:
                raise KeyboardInterrupt
            seen.append(state.epoch)
        return original(state, *arguments)

    monkeypatch.setattr(training, "take_step", step)


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


def test_a_run_leaves_its_files(tmp_path, tiny_settings, blobs, blob_split, capsys):
    out = tmp_path / "runs" / "blobs"
    train(tiny_settings, blobs, blob_split, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "SHA256SUMS",
        "checkpoint.pt",
        "environment.json",
        "log.jsonl",
        "settings.toml",
        "split.json",
        "steps.jsonl",
    ]
    assert read_settings(out / "settings.toml") == tiny_settings
    split = json.loads((out / "split.json").read_text())
    assert split["train"] == list(range(1, 16))  # slice numbers, not indices
    assert split["test"] == list(range(16, 25))
    assert split["synthetic"] is True
    log, steps = rows(out / "log.jsonl"), rows(out / "steps.jsonl")
    assert [row["epoch"] for row in log] == [1, 2]
    # 15 slices in batches of 7: the last slice alone is left out, BatchNorm could not use it.
    assert len(steps) == 4
    assert [row["lambda"] for row in steps] == pytest.approx(
        [1000 / (1 + 0.12 * t) for t in range(4)]
    )
    for row in steps:
        assert 0 < row["mean_target_angle"] < math.pi
        assert row["gradient_norm"] > 0
    assert log[1]["loss"] == pytest.approx((steps[2]["loss"] + steps[3]["loss"]) / 2)
    assert log[1]["lambda"] == steps[3]["lambda"]
    assert capsys.readouterr().err.count("epoch ") == 2  # no terminal, so a line each


def test_it_learns_the_blobs(tmp_path, tiny_settings, blobs, blob_split):
    still = {"rotation_degrees": 0.0, "zoom": 1.0, "brightness": 0.0, "batch_size": 16}
    settings = override_settings(tiny_settings, {"epochs": 40, "learning_rate": 3e-3, **still})
    train(settings, blobs, blob_split, tmp_path / "run")
    log = rows(tmp_path / "run" / "log.jsonl")
    assert log[0]["accuracy"] < 0.75
    assert log[-1]["accuracy"] > 0.9
    assert log[-1]["mean_target_angle"] < log[0]["mean_target_angle"] - 0.2


def test_class_centres_are_trained(tiny_settings, blob_run):
    contents = torch.load(blob_run / "checkpoint.pt", weights_only=True)
    begun = start(tiny_settings, CPU).loss.weight
    assert (contents["loss"]["weight"] - begun).abs().min() > 1e-5


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resuming_is_bit_identical(tmp_path, tiny_settings, blobs, blob_split, monkeypatch, epoch):
    settings = override_settings(tiny_settings, {"epochs": 3})
    train(settings, blobs, blob_split, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, epoch)
        with pytest.raises(KeyboardInterrupt):
            train(settings, blobs, blob_split, tmp_path / "broken")
    assert (tmp_path / "broken" / "checkpoint.pt").exists() == (epoch > 0)
    torch.manual_seed(99)
    train(settings, blobs, blob_split, tmp_path / "broken", resume=True)
    straight, broken = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("straight", "broken")
    )
    assert_same(straight, broken)
    for name in ("log.jsonl", "steps.jsonl"):
        assert without_times(tmp_path / "straight" / name) == without_times(
            tmp_path / "broken" / name
        )


def test_resuming_drops_what_an_interrupted_epoch_logged(
    tmp_path, tiny_settings, blobs, blob_split, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_in_epoch(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_settings, blobs, blob_split, out)
    with (out / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 0.0}\n{"epo')
    train(tiny_settings, blobs, blob_split, out, resume=True)
    log = rows(out / "log.jsonl")
    assert [row["epoch"] for row in log] == [1, 2]
    assert log[1]["loss"] > 0


def test_resuming_a_blob_run_changes_nothing(tiny_settings, blobs, blob_split, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    train(tiny_settings, blobs, blob_split, trained, resume=True)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_resuming_what_is_finished_keeps_its_sums_and_precision(
    tiny_settings, blobs, blob_split, trained
):
    with (trained / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  metrics.json\n")  # as after an evaluation
    (trained / "environment.json").write_text('{"precision": "another machine\'s"}')
    test_resuming_a_blob_run_changes_nothing(tiny_settings, blobs, blob_split, trained)


def test_another_run_is_not_overwritten(tmp_path, tiny_settings, blobs, blob_split):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, fault in (("folder", "already exists"), ("file", "is not a folder")):
        with pytest.raises(UserError, match=f"{name}: {fault}"):
            train(tiny_settings, blobs, blob_split, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes.txt"]


def test_resuming_refuses_what_does_not_fit(tmp_path, tiny_settings, blobs, blob_split, trained):
    with pytest.raises(UserError, match="holds no run"):
        train(tiny_settings, blobs, blob_split, tmp_path / "none", resume=True)
    other = override_settings(tiny_settings, {"margin": 4.0})
    with pytest.raises(UserError, match=r"settings.toml: loss.margin differs"):
        train(other, blobs, blob_split, trained, resume=True)
    blobs.patients[3] = "somebody else"
    with pytest.raises(UserError, match=r"split.json: .* other slices"):
        train(tiny_settings, blobs, blob_split, trained, resume=True)


@pytest.mark.parametrize("fault", ["truncated", "empty", "foreign", "shape", "moments", "pickle"])
def test_faulty_checkpoints_are_one_line(tiny_settings, blobs, blob_split, trained, fault):
    path = trained / "checkpoint.pt"
    contents = torch.load(path, weights_only=True)
    match fault:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            torch.save({"weights": torch.zeros(3)}, path)
        case "shape":
            contents["network"]["output.0.weight"] = torch.zeros(3, 3)
            torch.save(contents, path)
        case "moments":
            contents["optimiser"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
            torch.save(contents, path)
        case "pickle":
            torch.save({"epoch": 1, "network": print}, path)
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        train(tiny_settings, blobs, blob_split, trained, resume=True)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_failed_save_leaves_the_last_checkpoint(tiny_settings, trained, monkeypatch):
    before = (trained / "checkpoint.pt").read_bytes()

    def full_disk(path, content):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be written: No space left"):
        start(tiny_settings, CPU).save(trained)
    assert (trained / "checkpoint.pt").read_bytes() == before
    assert not list(trained.glob("*.partial"))


def test_divergence_ends_the_training(tmp_path, tiny_settings, blobs, blob_split):
    blobs.images[:2] = math.nan  # a single one could be left out, as the last of the epoch
    with pytest.raises(UserError, match="diverged in epoch 1"):
        train(tiny_settings, blobs, blob_split, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_annealing_off_logs_no_lambda(tmp_path, tiny_settings, blobs, blob_split):
    settings = override_settings(tiny_settings, {"annealing": False, "epochs": 1})
    train(settings, blobs, blob_split, tmp_path / "run")
    assert [row["lambda"] for row in rows(tmp_path / "run" / "steps.jsonl")] == [None, None]


def test_learning_rates_of_the_paper():
    paper = load_settings("paper").training
    rates = [learning_rate(paper, epoch) for epoch in (0, 124.9, 125, 174.9, 175, 274)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_cosine_goes_from_the_whole_rate_to_none():
    settings = load_settings("quick", {"epochs": 8, "learning_rate": 2.0}).training
    rates = [learning_rate(settings, epoch) for epoch in (0, 2, 4, 8)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 0.0])


def test_batches_never_hold_one_slice():
    assert batch_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert batch_bounds(9, 4) == [(0, 4), (4, 8)]
    with pytest.raises(UserError, match="1 training slices are too few"):
        batch_bounds(1, 4)


def test_precision_is_as_asked():
    assert choose_precision("bfloat16", CPU) is torch.bfloat16
    assert choose_precision("float32", CPU) is torch.float32


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ],
)
def test_precision_follows_the_hardware(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_precision("auto", CPU) is precision


def test_bfloat16_trains(tmp_path, tiny_settings, blobs, blob_split):
    settings = override_settings(tiny_settings, {"precision": "bfloat16", "epochs": 1})
    train(settings, blobs, blob_split, tmp_path / "run")
    contents = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert contents["network"]["output.0.weight"].dtype is torch.float32
    assert (
        json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "bfloat16"
    )


STILL = {"rotation_degrees": 0.0, "zoom": 1.0, "brightness": 0.0, "batch_size": 15}


@pytest.mark.parametrize(
    ("loss", "margin"),
    [
        *(("softmax", 0.0), ("modified-softmax", 0.0)),
        *(("cosface", 0.35), ("arcface", 0.5), ("subcenter-arcface", 0.5)),
    ],
)
def test_every_loss_trains(tmp_path, tiny_settings, blobs, blob_split, loss, margin):
    changed = {"loss": loss, "margin": margin, "epochs": 12, "learning_rate": 3e-3, **STILL}
    settings = override_settings(tiny_settings, changed)
    train(settings, blobs, blob_split, tmp_path / "run")
    log = rows(tmp_path / "run" / "log.jsonl")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[0]["accuracy"] is not None


def test_triplets_part_the_classes(tmp_path, tiny_settings, blobs, blob_split):
    """Their loss is the mean of the semi-hard ones that are left, and need not fall."""
    changed = {"loss": "triplet", "margin": 0.2, "epochs": 20, "learning_rate": 3e-3, **STILL}
    settings = override_settings(tiny_settings, changed)
    train(settings, blobs, blob_split, tmp_path / "run")
    assert rows(tmp_path / "run" / "log.jsonl")[0]["accuracy"] is None
    state = start(settings, CPU)
    before = parted(state.network, blobs)
    state.restore(tmp_path / "run")
    assert parted(state.network, blobs) > before + 0.3


def parted(network, slices):
    """How much larger the mean cosine within a class is than between two, of training slices."""
    with torch.no_grad():  # in training mode: two dozen steps leave BatchNorm no statistics
        embeddings = torch.nn.functional.normalize(network(slices.images[:15].float()))
    cosines, labels = embeddings @ embeddings.T, slices.labels[:15]
    alike = labels[:, None] == labels
    return (cosines[alike].mean() - cosines[~alike].mean()).item()


def test_a_margin_of_another_loss_is_refused_before_anything_is_written(
    tmp_path, tiny_settings, blobs, blob_split
):
    settings = override_settings(tiny_settings, {"loss": "cosface", "margin": 5.0})
    with pytest.raises(UserError, match=r"--margin 5.0: .* cosface .* CosFace's is 0.35"):
        train(settings, blobs, blob_split, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_saving_takes_a_bounded_share_of_the_time(monkeypatch, tmp_path):
    """A clock of its own: an epoch takes 1 s, a save 0.5 s, so the next is due 5 s later."""
    now, saved = [0.0], []

    class State:
        def save(self, out):
            saved.append(now[0])
            now[0] += 0.5

    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    save = progress.Saver(State(), tmp_path)
    for epoch in range(12):
        now[0] += 1
        save(last=epoch == 11)
    assert saved == [1.0, 6.5, 12.0, 13.5]


def test_two_processes_do_not_train_one_run(tmp_path, tiny_settings, blobs, blob_split):
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another process"):
        train(tiny_settings, blobs, blob_split, tmp_path / "run")
    train(tiny_settings, blobs, blob_split, tmp_path / "run")


def test_a_run_that_was_killed_before_it_began_can_begin(
    tmp_path, tiny_settings, blobs, blob_split
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "split.json").write_text("{")
    (tmp_path / "run" / "settings.toml.partial").write_text("[da")
    train(tiny_settings, blobs, blob_split, tmp_path / "run")


def test_a_compiled_network_trains_alike_and_is_stored_alike(
    tmp_path, tiny_settings, blobs, blob_split, monkeypatch
):
    """With the compiler's front half alone and few blocks: no minutes of C++."""
    monkeypatch.setattr(mobilenet, "BLOCKS", mobilenet.BLOCKS[:3])
    calls, compile_module = [], torch.nn.Module.compile

    def compile_quickly(module):
        calls.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    for name, compiled in (("eager", False), ("compiled", True)):
        changed = {"compile": compiled, "batch_size": 15, "dropout": 0.0, "precision": "float32"}
        train(override_settings(tiny_settings, changed), blobs, blob_split, tmp_path / name)
    assert len(calls) == 1
    eager, compiled = (rows(tmp_path / name / "steps.jsonl") for name in ("eager", "compiled"))
    losses = [[row["loss"] for row in steps] for steps in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    keys = [
        list(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"])
        for name in ("eager", "compiled")
    ]
    assert keys[0] == keys[1]


def test_the_bar_shows_now_and_then_the_mean_loss_of_the_last_steps():
    interval, steps, shown = progress.BAR_INTERVAL, [], []
    with tqdm(file=io.StringIO()) as bar:
        for step in range(interval + 2):
            steps.append(torch.full((len(progress.MEASURES),), float(step)))
            progress.show_step(bar, steps, 3, 24)
            shown.append(f"{bar.desc}{bar.postfix}")
    assert shown[:interval] == ["epoch 3/24: loss=0.000"] * interval
    assert shown[interval:] == [f"epoch 3/24: loss={(1 + interval) / 2:.3f}"] * 2
    assert bar.n == len(steps)
