"""accelerate: the loss is prepared as the network is."""

import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

import angular_losses as al
from angular_losses.diagnostics import AngularMonitor
from angular_losses.distributed import (
    clip_grad_norm_,
    load,
    save,
    shard,
    shard_optimizer,
    unshard,
)
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

accelerate = tool("accelerate")
pytestmark = of_tools


def batches(size=8):
    return DataLoader(TensorDataset(*examples()), batch_size=size)


def in_order(epochs=3):
    """The batches of two ranks together: accelerate deals out whole ones in turn."""
    return [*batches(8)] * epochs


def train(accelerator, network, loss, optimiser, loader, epochs=3):
    for _ in range(epochs):
        for points, labels in loader:
            with accelerator.accumulate(network, loss):
                accelerator.backward(loss(network(points), labels))
                optimiser.step()
                optimiser.zero_grad()


def on_each(mesh, work, *arguments):
    """With the process group that is there, as under torchrun or `accelerate launch`."""
    size, rank = mesh.size(), mesh.get_rank()
    variables = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    try:
        return work(*arguments)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        for name in (*variables, "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]


def prepared(cls, folder):
    accelerator = accelerate.Accelerator(cpu=True)
    network, loss = network_and_loss(cls=cls)
    parts = network, loss, sgd(network, loss), batches(4)
    parts = accelerator.prepare(*parts)
    train(accelerator, *parts)
    accelerator.save_state(folder)
    whole = [accelerator.unwrap_model(part) for part in parts[:2]]
    state = state_of(*whole)
    train(accelerator, *parts)
    later = state_of(*whole)
    accelerator.load_state(folder)
    back = state_of(*whole)
    train(accelerator, *parts)
    return state, back, later, state_of(*whole)


@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.AdaFaceLoss])
def test_two_processes_train_like_one_and_resume_bit_for_bit(processes, tmp_path, cls):
    expected = plain(*network_and_loss(cls=cls), in_order())
    answers = processes.run(on_each, 2, prepared, cls, tmp_path, timeout=300.0)
    for state, back, later, resumed in answers:
        assert same(state, expected, 1e-10)
        assert same(back, state)
        assert same(resumed, later)
        assert not same(later, state, 1e-2)


def sharded(folder):
    """As docs/how_to/distributed_training.md has it: the network alone is prepared."""
    accelerator = accelerate.Accelerator(cpu=True)
    network, loss = network_and_loss()
    shard(loss, init_device_mesh("cpu", (accelerator.num_processes,)), backbone="ddp")
    optimiser = sgd(network, loss)
    shard_optimizer(optimiser, loss)
    network, optimiser, loader = accelerator.prepare(network, optimiser, batches(4))
    for _ in range(3):
        for points, labels in loader:
            accelerator.backward(loss(network(points), labels))
            clip_grad_norm_([network, loss], 0.5)
            optimiser.step()
            optimiser.zero_grad()
    training = torch.nn.ModuleList([accelerator.unwrap_model(network), loss])
    state, before = state_of(training[0], unshard(loss)), loss.weight.detach().clone()
    save(folder, training, optimiser.optimizer)
    loss.weight.data.zero_()
    load(folder, training, optimiser.optimizer)
    assert torch.equal(loss.weight, before)
    return state


def test_sharded_centres_train_like_one_process(processes, tmp_path):
    expected = plain(*network_and_loss(), in_order(), clip=0.5)
    for state in processes.run(on_each, 2, sharded, tmp_path, timeout=300.0):
        assert same(state, expected, 1e-10)


def forgotten(folder):
    accelerator = accelerate.Accelerator(cpu=True)
    network, loss = network_and_loss()
    optimiser = sgd(network, loss)
    network, optimiser, loader = accelerator.prepare(network, optimiser, batches(4))
    train(accelerator, network, loss, optimiser, loader)
    accelerator.save_state(folder)
    monitor = AngularMonitor(loss)
    with pytest.warns(UserWarning, match=r"weight: .*differ.*processes"):
        monitor.log(1)
    return loss.weight.detach().clone()


def test_the_monitor_warns_of_a_loss_that_is_not_prepared(processes, tmp_path):
    first, second = processes.run(on_each, 2, forgotten, tmp_path, timeout=300.0)
    assert (first - second).abs().max() > 1e-3
    assert len([*tmp_path.glob("model*")]) == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_process_is_a_plain_loop(accumulate):
    try:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        network, loss = network_and_loss()
        parts = accelerator.prepare(network, loss, sgd(network, loss), batches())
        train(accelerator, *parts)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
    expected = plain(*network_and_loss(), [*batches()] * 3, accumulate=accumulate)
    assert same(state_of(network, loss), expected, 1e-12)
