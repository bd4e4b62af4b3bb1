"""The files of a checkpoint: what is accepted, what is removed, what is noticed."""

import os
import pickle
import shutil
from unittest.mock import patch

import numpy
import pytest
import torch

import angular_losses as al
from angular_losses.distributed import checkpoint, load, save


def modules(num_classes=20, **options):
    torch.manual_seed(0)
    loss = al.ArcFaceLoss(num_classes, 8, scale=16.0, **options)
    return torch.nn.ModuleList([torch.nn.Linear(4, 8), loss])


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def weight_file(directory):
    return next(directory.glob("*/__0_0.distcp"))


@pytest.mark.parametrize("current", ["", "../victim/000003", "notes", "000009", "7"])
def test_current_names_only_what_save_makes(tmp_path, current):
    directory, victim = tmp_path / "2024", tmp_path / "victim" / "000003"
    victim.mkdir(parents=True)
    save(directory, modules())
    for folder in (directory, victim):
        (folder / "notes.txt").write_text("mine")
    (directory / "7").mkdir()
    (directory / "current").write_text(current)
    with pytest.raises(FileNotFoundError, match="directory: expected a complete checkpoint"):
        load(directory, modules())
    save(directory, modules())
    load(directory, modules())
    assert names(directory) == ["000002", "7", "current", "notes.txt"]
    assert names(victim) == ["notes.txt"]


def test_only_own_leftovers_are_removed(tmp_path):
    with patch.object(checkpoint, "_remove"):  # killed before it
        save(tmp_path, modules())
        save(tmp_path, modules())
    (tmp_path / "000001" / "notes.txt").write_text("mine")
    unfinished = tmp_path / "000003"
    unfinished.mkdir()
    shutil.copy(weight_file(tmp_path), unfinished / "__0_0.distcp")
    save(tmp_path, modules())
    assert names(tmp_path) == ["000001", "000004", "current"]
    assert names(tmp_path / "000001") == ["notes.txt"]


def test_order_of_writing(tmp_path):
    order = []
    sync, replace = os.fsync, checkpoint.Path.replace

    def noted(descriptor):
        order.append("sync")
        sync(descriptor)

    def replaced(path, target):
        order.append(target.name)
        return replace(path, target)

    with patch.object(os, "fsync", noted), patch.object(checkpoint.Path, "replace", replaced):
        save(tmp_path, modules())
    place = order.index("current")
    assert order[place - 2 :] == ["sync", "sync", "current", "sync"]  # the file and its directory


@pytest.mark.parametrize("kind", ["byte", "half", "empty", "missing"])
def test_damaged_files_are_noticed(tmp_path, kind):
    saved = modules()
    save(tmp_path, saved)
    file = weight_file(tmp_path)
    data = bytearray(file.read_bytes())
    place = data.find(saved[1].weight.detach().numpy().tobytes()[:64])
    assert place > 0
    if kind == "missing":
        file.unlink()
    else:
        data[place + 2] ^= 0xFF
        file.write_bytes({"byte": data, "half": data[: len(data) // 2], "empty": b""}[kind])
    with pytest.raises(RuntimeError, match="load: rank 0 failed"):
        load(tmp_path, modules())


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


def replaced(file, data, directory):
    """A file with other contents, whose checksum is right."""
    checksums = next(directory.glob("*/checksums.json"))
    before = checkpoint._checksum(file)
    file.write_bytes(data)
    checksums.write_text(checksums.read_text().replace(before, checkpoint._checksum(file)))


def test_planted_metadata_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoints"
    save(directory, modules())
    replaced(directory / "000001" / ".metadata", pickle.dumps(Planted()), directory)
    with pytest.raises(RuntimeError, match="expected metadata, got"):
        load(directory, modules())
    assert names(tmp_path) == ["checkpoints"]


def test_planted_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory, both = tmp_path / "checkpoints", modules()
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    optimizer.param_groups[0]["foreach"] = Planted()
    save(directory, both, optimizer)
    optimizer.param_groups[0]["foreach"] = None
    with pytest.raises(RuntimeError, match="weights_only"):
        load(directory, both, optimizer)
    assert names(tmp_path) == ["checkpoints"]


def test_other_sizes_are_a_runtime_error(tmp_path):
    save(tmp_path, modules())
    with pytest.raises(RuntimeError, match="load: rank 0 failed: ValueError"):
        load(tmp_path, modules(30))


def test_what_has_no_place_in_the_module_is_a_runtime_error(tmp_path):
    save(tmp_path, modules(5, schedule=al.MarginWarmup(10), class_weight=[1.0] * 5))
    save_of = (
        "module: expected all that was saved, missing module.1.class_weight, module.1.schedule"
    )
    with pytest.raises(RuntimeError, match=save_of):
        load(tmp_path, modules(5))


def test_another_number_of_groups_is_a_runtime_error(tmp_path):
    both, optimizer = trained()
    groups = torch.optim.AdamW([{"params": each.parameters()} for each in both])
    for one, two in ((optimizer, groups), (groups, optimizer)):
        save(tmp_path, both, one)
        numbers = len(one.param_groups), len(two.param_groups)
        with pytest.raises(RuntimeError, match="as were saved, {}, got {}".format(*numbers)):
            load(tmp_path, both, two)


def test_an_optimiser_of_other_parameters_is_a_runtime_error(tmp_path):
    both, other = modules(5), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([*both.parameters(), *other.parameters()])
    step(both, optimizer)
    with pytest.raises(
        RuntimeError, match=r"optimizer: expected the module .* \[\(2, 3\), \(2,\)\]"
    ):
        save(tmp_path, both, optimizer)


@pytest.mark.parametrize("left", ["{}", "[]"])
def test_files_without_a_checksum_are_a_runtime_error(tmp_path, left):
    save(tmp_path, modules())
    (tmp_path / "000001" / "checksums.json").write_text(left)
    with pytest.raises(RuntimeError, match=r"checksums.json: expected a checksum of each file"):
        load(tmp_path, modules())


def trained(num_classes=5, optimizer=torch.optim.AdamW, **options):
    """Network, loss and optimiser after a step."""
    both = modules(num_classes)
    made = optimizer(both.parameters(), **options)
    step(both, made)
    return both, made


def gradients(both, is_of_loss_alone=False):
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    embeddings = both[0](rows).detach() if is_of_loss_alone else both[0](rows)
    both[1](embeddings, torch.arange(6) % both[1].num_classes).backward()


def step(both, optimizer, **options):
    gradients(both, **options)
    optimizer.step()
    optimizer.zero_grad()


def assert_same_state(optimizer, other):
    parameters = (each.param_groups[0]["params"] for each in (optimizer, other))
    for one, two in zip(*parameters, strict=True):
        torch.testing.assert_close(optimizer.state.get(one, {}), other.state.get(two, {}))


def test_gradients_do_not_keep_a_state_from_being_loaded(tmp_path):
    both, optimizer = trained()
    save(tmp_path, both, optimizer)
    other = modules(5)
    fresh = torch.optim.AdamW(other.parameters())
    gradients(other)
    before = [each.grad.clone() for each in other.parameters()]
    load(tmp_path, other, fresh)
    assert_same_state(optimizer, fresh)
    assert all(map(torch.equal, before, [each.grad for each in other.parameters()]))


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    both, optimizer = trained(lr=numpy.float64(0.25), betas=(numpy.float64(0.5), 0.9))
    save(tmp_path, both, optimizer)
    load(tmp_path, both, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.9))


def test_saving_before_the_first_step_leaves_it_the_first(tmp_path):
    both, other = modules(5), modules(5)
    optimizer, unsaved = (torch.optim.AdamW(each.parameters()) for each in (both, other))
    save(tmp_path, both, optimizer)
    assert not optimizer.state
    step(both, optimizer)
    step(other, unsaved)
    assert_same_state(optimizer, unsaved)
    load(tmp_path, both, optimizer)
    assert not any(optimizer.state.values())
    step(both, optimizer)
    assert_same_state(optimizer, unsaved)


@pytest.mark.parametrize("is_begun", ["not", "the loss alone", "all"])
def test_parameters_without_a_state(tmp_path, is_begun):
    """The state of those that were not trained, and only that, is missing after loading too."""
    both, other = modules(5), modules(5)
    optimizer, fresh = (torch.optim.AdamW(each.parameters()) for each in (both, other))
    step(both, optimizer, is_of_loss_alone=True)
    save(tmp_path / "loss", both, optimizer)
    if is_begun != "not":
        step(other, fresh, is_of_loss_alone=is_begun != "all")
    load(tmp_path / "loss", other, fresh)
    assert_same_state(optimizer, fresh)
    step(both, optimizer)
    save(tmp_path / "all", both, optimizer)
    fresh.zero_grad()
    load(tmp_path / "all", other, fresh)
    assert_same_state(optimizer, fresh)
    step(both, optimizer)
    step(other, fresh)
    assert_same_state(optimizer, fresh)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ],
)
def test_the_state_of_options_that_only_the_saved_optimiser_has(tmp_path, optimizer, options):
    both, made = trained(optimizer=optimizer, lr=0.1, **options)
    save(tmp_path, both, made)
    other = modules(5)
    fresh = optimizer(other.parameters(), lr=0.2)
    load(tmp_path, other, fresh)
    assert_same_state(made, fresh)
    step(both, made)
    step(other, fresh)
    torch.testing.assert_close(dict(other.state_dict()), dict(both.state_dict()))


def test_momentum_of_some_parameters(tmp_path):
    both, other = modules(5), modules(5)
    made = torch.optim.SGD(both.parameters(), lr=0.1, momentum=0.9)
    step(both, made, is_of_loss_alone=True)
    save(tmp_path, both, made)
    fresh = torch.optim.SGD(other.parameters(), lr=0.1)
    load(tmp_path, other, fresh)
    assert_same_state(made, fresh)


def test_parameters_that_are_integers(tmp_path):
    both, other = modules(5), modules(5)
    for each in (both, other):
        table = torch.zeros(3, dtype=torch.int8)
        each.append(torch.nn.ParameterList([torch.nn.Parameter(table, requires_grad=False)]))
    made, fresh = (torch.optim.AdamW(each.parameters()) for each in (both, other))
    step(both, made)
    save(tmp_path, both, made)
    load(tmp_path, other, fresh)
    assert_same_state(made, fresh)


@pytest.mark.parametrize("is_frozen", [(True, False), (False, True), (True, True)])
def test_the_state_of_frozen_parameters(tmp_path, is_frozen):
    both, optimizer = trained()
    other = modules(5)
    fresh = torch.optim.AdamW(other.parameters())
    for module, is_frozen_there in zip((both, other), is_frozen, strict=True):
        module[0].requires_grad_(not is_frozen_there)
    save(tmp_path, both, optimizer)
    load(tmp_path, other, fresh)
    assert [each[0].weight.requires_grad for each in (both, other)] == [not f for f in is_frozen]
    assert_same_state(optimizer, fresh)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_options_of_a_scheduler_that_is_there_once(tmp_path, kind):
    both, optimizer = trained(lr=kind(0.5))
    save(tmp_path / "without", both, optimizer)
    optimizer.param_groups[0]["lr"] = kind(0.25)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    save(tmp_path / "with", both, optimizer)
    optimizer = torch.optim.AdamW(both.parameters(), lr=kind(0.125))
    load(tmp_path / "with", both, optimizer)
    assert optimizer.param_groups[0]["initial_lr"] == 0.25
    load(tmp_path / "without", both, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["initial_lr"]) == (0.5, 0.25)


class Counted(torch.nn.Module):
    """A module with a state that is no tensor."""

    number = 0

    def get_extra_state(self):
        return self.number

    def set_extra_state(self, state):
        self.number = state


def test_states_that_are_no_tensors_are_loaded(tmp_path):
    both, other = (torch.nn.ModuleList([Counted(), *modules()]) for _ in range(2))
    both[0].number = 3
    save(tmp_path, both)
    load(tmp_path, other)
    assert other[0].number == 3


def test_options_that_are_dictionaries(tmp_path):
    both, optimizer = trained()
    optimizer.param_groups[0]["notes"] = {"rate": 0.1, "decay": 0.2}
    save(tmp_path, both, optimizer)
    optimizer.param_groups[0]["notes"]["rate"] = 0.3
    load(tmp_path, both, optimizer)
    assert optimizer.param_groups[0]["notes"] == {"rate": 0.1, "decay": 0.2}
    load(tmp_path, both, torch.optim.AdamW(both.parameters()))


def test_state_of_another_kind_of_optimizer_is_refused(tmp_path):
    both, optimizer = trained()
    save(tmp_path, both, optimizer)
    for kind in (torch.optim.SGD, torch.optim.RMSprop):
        with pytest.raises(RuntimeError, match="Missing key in checkpoint"):
            load(tmp_path, both, kind(both.parameters(), lr=0.1, momentum=0.9))


def test_states_that_are_not_of_the_rows_of_sub_centres(tmp_path):
    both, other = (modules(5, sub_centers=3) for _ in range(2))
    optimizer, fresh = (torch.optim.Adafactor(each.parameters()) for each in (both, other))
    step(both, optimizer)
    save(tmp_path, both, optimizer)
    load(tmp_path, other, fresh)
    assert_same_state(optimizer, fresh)


def test_sub_centres_of_two_names(tmp_path):
    both, other = (modules(5, sub_centers=3) for _ in range(2))
    for each in (both, other):
        each.append(torch.nn.ModuleList([each[1]]))
    optimizer, fresh = (torch.optim.AdamW(each.parameters()) for each in (both, other))
    step(both, optimizer)
    save(tmp_path, both, optimizer)
    reader, _ = checkpoint._reader(tmp_path / "000001")
    saved = reader.read_metadata().state_dict_metadata
    for key in ("module.1.weight", "module.2.0.weight", "optimizer.state.1.weight.exp_avg"):
        assert saved[key].size == (5, 3, 8)
    load(tmp_path, other, fresh)
    assert torch.equal(both[1].weight, other[1].weight)
    assert_same_state(optimizer, fresh)
