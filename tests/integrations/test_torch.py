"""What torch itself brings: weight averaging, saving, functional calls, optimisers, TensorBoard."""

import copy
import warnings

import pytest
import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import angular_losses as al
from angular_losses.diagnostics import AngularMonitor
from tests.integrations import (
    examples,
    network_and_loss,
    of_tools,
    plain,
    same,
    sgd,
    state_of,
    tool,
)


def batches(number=6, size=8):
    points, labels = examples(number * size)
    return list(zip(points.split(size), labels.split(size), strict=True))


def both(network, loss):
    return torch.nn.ModuleDict({"network": network, "loss": loss})


class TestAveragedModel:
    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_centres_are_averaged_and_the_schedule_goes_on(self, use_buffers):
        model = both(*network_and_loss())
        ema = get_ema_multi_avg_fn(0.5)
        averaged = AveragedModel(model, multi_avg_fn=ema, use_buffers=use_buffers)
        optimiser, expected = sgd(*model.values()), None
        for batch in batches():
            plain(*model.values(), [batch], optimiser=optimiser)
            averaged.update_parameters(model)
            new = model["loss"].weight.detach()
            expected = new.clone() if expected is None else (expected + new) / 2
        loss = averaged.module["loss"]
        assert torch.allclose(loss.weight, expected, rtol=1e-12)
        assert not torch.allclose(loss.weight, new)
        assert (loss.schedule.step.item() == 6) is not use_buffers
        points, labels = examples(8)
        assert loss(averaged.module["network"](points), labels).isfinite()


class TestSaving:
    def test_safetensors_keeps_the_state(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        network, loss = network_and_loss(al.AdaFaceLoss)
        plain(network, loss, batches())
        state = loss.state_dict()
        safetensors.save_file(state, tmp_path / "loss.safetensors")
        loaded = safetensors.load_file(tmp_path / "loss.safetensors")
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())

    def test_a_pickled_loss_resumes_bit_for_bit(self, tmp_path):
        model = both(*network_and_loss(al.AdaFaceLoss))
        plain(*model.values(), batches())
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert repr(loaded) == repr(model)
        assert same(plain(*loaded.values(), batches()), plain(*model.values(), batches()))

    def test_a_state_dict_loads_with_weights_only(self, tmp_path):
        model = both(*network_and_loss(al.AdaFaceLoss))
        plain(*model.values(), batches())
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = both(*network_and_loss(al.AdaFaceLoss, seed=1))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert same(state_of(*other.values()), state_of(*model.values()))


class TestFunctional:
    @pytest.mark.parametrize("schedule", [None, al.MarginWarmup(10)])
    def test_gradients_of_a_functional_call(self, schedule):
        model = both(*network_and_loss(schedule=schedule)).train(schedule is None)
        points, labels = examples()

        def value(parameters):
            embeddings = torch.func.functional_call(
                model["network"],
                {k[8:]: v for k, v in parameters.items() if k[:8] == "network."},
                points,
            )
            centres = {"weight": parameters["loss.weight"]}
            return torch.func.functional_call(model["loss"], centres, (embeddings, labels))

        found = torch.func.grad(value)({k: v.detach() for k, v in model.named_parameters()})
        model["loss"](model["network"](points), labels).backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name], parameter.grad, rtol=1e-10)

    def test_an_ensemble_by_vmap(self):
        models = [both(*network_and_loss(seed=seed, schedule=None)) for seed in range(3)]
        points, labels = examples()
        parameters, _ = torch.func.stack_module_state([model["loss"] for model in models])
        embeddings = torch.stack([model["network"](points) for model in models])
        base = copy.deepcopy(models[0]["loss"])

        def value(centres, embeddings):
            return torch.func.functional_call(base, centres, (embeddings, labels))

        found = torch.func.vmap(value)(parameters, embeddings)
        expected = [m["loss"](e, labels) for m, e in zip(models, embeddings, strict=True)]
        assert torch.allclose(found, torch.stack(expected), rtol=1e-10)


class TestOptimisers:
    def test_fused_adamw_is_the_other_one(self):
        states = []
        for fused in (True, False):
            network, loss = network_and_loss()
            groups = al.parameter_groups(network, loss, lr=0.01, weight_decay=0.1)
            optimiser = torch.optim.AdamW(groups, fused=fused)
            states.append(plain(network, loss, batches(30), optimiser=optimiser))  # no warning
        assert same(*states, 1e-10)
        assert not same(states[0], state_of(*network_and_loss()), 1e-2)

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
    def test_muon_for_the_network_and_adamw_for_the_centres(self):
        network, loss = network_and_loss(dtype=torch.float32)
        before = state_of(network, loss)
        matrices, rest = [network.weight], [network.bias, *loss.parameters()]
        optimisers = torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)
        for points, labels in batches(30):
            loss(network(points.float()), labels).backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
        assert not any(torch.equal(before[k], v) for k, v in state_of(network, loss).items())


def train_with_centres_averaged(mesh):
    """The loss beside DistributedDataParallel, its gradient averaged where it is made."""

    def average(weight):
        dist.all_reduce(weight.grad)
        weight.grad /= dist.get_world_size()

    network, loss = network_and_loss()
    loss.weight.register_post_accumulate_grad_hook(average)
    size, rank = mesh.size(), mesh.get_rank()
    mine = [(points[rank::size], labels[rank::size]) for points, labels in batches()]
    plain(DistributedDataParallel(network), loss, mine, optimiser=sgd(network, loss), accumulate=2)
    return state_of(network, loss)


def test_centres_averaged_by_hand_train_as_in_one_process(processes):
    expected = plain(*network_and_loss(), batches(), accumulate=2)
    for state in processes.run(train_with_centres_averaged, 2):
        assert same(state, expected, 1e-10)


def centres_apart(mesh, wrap):
    """What the monitor warns of, with the loss beside DistributedDataParallel or in one too."""
    network, loss = network_and_loss()
    monitor = AngularMonitor(loss)
    of_rank = batches()[mesh.get_rank() :: mesh.size()]
    parts = DistributedDataParallel(network), DistributedDataParallel(loss) if wrap else loss
    with monitor.attach():
        plain(*parts, of_rank, optimiser=sgd(network, loss))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.snapshot(across_ranks=False)
        numbers = monitor.log(1)
    return [str(warning.message) for warning in caught], numbers["rows"]


@pytest.mark.parametrize("wrap", [True, False])
def test_the_monitor_warns_of_diverging_centres(processes, wrap):
    for messages, rows in processes.run(centres_apart, 2, wrap):
        assert rows == 48
        if wrap:
            assert not messages
        else:
            assert len(messages) == 1
            assert messages[0].startswith("weight: the class centres differ between processes")


def watched(network, loss, batches):
    monitor = AngularMonitor(loss)
    with monitor.attach():
        plain(network, loss, batches)
    return monitor.log(1)["target_mean"]


def train_fully_sharded(mesh):
    model = both(*network_and_loss())
    for part in model.values():
        fully_shard(part, mesh=mesh)
    size, rank = mesh.size(), mesh.get_rank()
    mine = [(points[rank::size], labels[rank::size]) for points, labels in batches()]
    angle = watched(*model.values(), mine)
    state = model.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}, angle


@pytest.mark.skipif(
    torch.__version__.startswith("2.6"), reason="torch 2.6: fully_shard needs a GPU"
)
def test_network_and_loss_fully_sharded_train_as_in_one_process(processes):
    network, loss = network_and_loss()
    expected = watched(network, loss, batches())
    for state, angle in processes.run(train_fully_sharded, 2):
        assert same(state, state_of(network, loss), 1e-10)
        assert angle == pytest.approx(expected)


class TestTensorBoard:
    pytestmark = of_tools

    def test_what_the_monitor_writes_can_be_read_back(self, tmp_path):
        tensorboard = tool("torch.utils.tensorboard")
        reading = tool("tensorboard.backend.event_processing.event_accumulator")
        tool("matplotlib")
        network, loss = network_and_loss()
        monitor = AngularMonitor(loss)
        with tensorboard.SummaryWriter(tmp_path) as writer, monitor.attach():
            for step in (1, 2):
                plain(network, loss, batches())
                monitor.log(step, writer, centres=True, figures=True)
        all_of_them = {"scalars": 0, "histograms": 0, "images": 0}
        events = reading.EventAccumulator(str(tmp_path), size_guidance=all_of_them).Reload()
        tags = events.Tags()
        assert len(tags["scalars"]) == len(monitor.history[0]) - 1
        for tag in tags["scalars"]:
            name = tag.removeprefix("angular/")
            written = [(event.step, event.value) for event in events.Scalars(tag)]
            kept = [(window["step"], window[name]) for window in monitor.history]
            assert written == [pytest.approx(pair, rel=1e-6, nan_ok=True) for pair in kept]
        assert {*tags["histograms"]} == {"angular/target_degrees", "angular/nearest_degrees"}
        histogram, _ = events.Histograms("angular/target_degrees")
        mean = histogram.histogram_value.sum / histogram.histogram_value.num
        radians = torch.deg2rad(torch.tensor(mean)).item()
        assert radians == pytest.approx(monitor.history[0]["target_mean"], abs=0.01)
        assert {*tags["images"]} == {"angular/angles", "angular/gradient_norms"}
