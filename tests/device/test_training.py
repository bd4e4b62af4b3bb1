"""Whole training steps on the device: graphs, the compiler, memory, processes, other libraries."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

import angular_losses as al
from angular_losses.engine import kernels
from tests.family import FAMILY
from tests.steps import assert_same, batch, build, state

ROOT = Path(__file__).parents[2]
LOSSES = [row.name for row in FAMILY]
COMPILED = ["ArcFace", "SphereFace-annealed", "AdaFace", "CurricularFace", "SphereFace2-C"]


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def a_training(name, device, mode="stash"):
    """A loss, an optimiser, and the batch that a step reads."""
    loss = build(name, "none", mode=mode).to(device)
    embeddings, labels = (each.detach().to(device) for each in batch(0))
    embeddings.requires_grad_()
    return loss, torch.optim.SGD([embeddings, *loss.parameters()], lr=0.1), embeddings, labels


def steps(optimiser, loss, embeddings, labels):
    def step():
        optimiser.zero_grad(set_to_none=False)
        value = loss(embeddings, labels)
        value.backward()
        optimiser.step()
        return value

    return step


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("name", [name for name in LOSSES if "Elastic" not in name])
def test_a_captured_step_replayed_with_new_labels(cuda, name, mode):
    ours, expected = (a_training(name, cuda, mode) for _ in range(2))
    (loss, optimiser, *tensors), (reference, other, *others) = ours, expected
    step, eager = steps(optimiser, loss, *tensors), steps(other, reference, *others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        eager()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    for seed in (1, 2):
        new = batch(seed)[1].to(cuda)
        tensors[1].copy_(new)
        others[1].copy_(new)
        graph.replay()
        assert_same([value], [eager()], rtol=1e-6, atol=1e-6)
    assert_same(
        [tensors[0], *loss.parameters()], [others[0], *reference.parameters()], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(state(loss), state(reference), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step(device, name):
    if device.type == "cpu" and name != "ArcFace":
        pytest.skip("tests/losses/test_compiled_steps.py compiles all losses on the CPU")
    (loss, optimiser, *tensors), (reference, other, *others) = (
        a_training(name, device) for _ in range(2)
    )
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    step = steps(optimiser, torch.compile(loss, backend=backend), *tensors)
    eager = steps(other, reference, *others)
    for _ in range(3):
        assert_same([step()], [eager()], rtol=1e-6, atol=1e-6)
    assert_same(list(loss.parameters()), list(reference.parameters()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["stash", "recompute", "auto"])
@pytest.mark.parametrize("budget", [None, 200 * 2**20])
def test_memory_is_the_plan_s(cuda, mode, precision, budget):
    num_rows, num_classes, size = 1024, 60_000, 256
    if budget is not None and mode == "stash" and precision == "float32":
        pytest.skip("E alone takes more")
    loss = al.ArcFaceLoss(num_classes, size, mode=mode, memory_budget=budget, device=cuda)
    embeddings = torch.randn(num_rows, size, device=cuda, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,), device=cuda)
    product = torch.bfloat16 if precision == "bfloat16" else None
    options = {"product_dtype": product, "device": cuda, "mode": mode, "memory_budget": budget}
    chosen = al.plan(num_rows, num_classes, size, **options)

    def step():
        embeddings.grad = loss.weight.grad = None
        with torch.autocast("cuda", torch.bfloat16, precision == "bfloat16"):
            value = loss(embeddings, labels)
        value.backward()

    step()
    embeddings.grad = loss.weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - before - chosen.gradient_bytes
    assert measured <= 1.15 * chosen.extra_bytes


@pytest.mark.parametrize("shape", [(1, 1, 8), (129, 130, 72), (5000, 300, 512), (4096, 1024, 128)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_triton_kernel(cuda, shape, shifted):
    if not kernels.is_available(cuda, torch.bfloat16):
        pytest.skip("needs Triton and compute capability 8.0")
    num_classes, num_rows, size = shape
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(num_classes, size, device=cuda)).bfloat16()
    scaled = 32 * torch.nn.functional.normalize(torch.randn(num_rows, size, device=cuda))
    scaled = scaled.bfloat16()
    labels = torch.randint(-1, num_classes + 1, (num_rows,), device=cuda) + 7
    shift = torch.randn(num_rows, device=cuda) if shifted else None
    expected = centres.double() @ scaled.double().T
    expected = (expected if shift is None else expected - shift).exp()
    expected[torch.arange(num_classes, device=cuda)[:, None] == labels - 7] = 0

    def run():
        out = torch.empty(num_classes, num_rows, dtype=torch.bfloat16, device=cuda)
        return kernels.exponentials(centres, scaled, labels, 7, shift, out), out

    (sums, out), again = run(), run()
    torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-12)
    assert torch.equal(sums, again[0])
    assert torch.equal(out, again[1])


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_the_engine_with_and_without_the_triton_kernel(cuda, mode):
    if not kernels.is_available(cuda, torch.bfloat16):
        pytest.skip("needs Triton and compute capability 8.0")
    torch.manual_seed(0)
    loss = al.ArcFaceLoss(20_000, 128, mode=mode, device=cuda)
    embeddings = torch.randn(300, 128, device=cuda, requires_grad=True)
    labels = torch.randint(20_000, (300,), device=cuda)

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(embeddings, labels)
        return value, *torch.autograd.grad(value, [embeddings, loss.weight])

    found = gradients()
    with mock.patch.object(kernels, "is_available", return_value=False):
        expected = gradients()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


LABELS_OUT_OF_RANGE = """
import sys, torch, angular_losses as al
device, label = torch.device(sys.argv[1]), int(sys.argv[2])
loss = al.ArcFaceLoss(10, 4, device=device)
loss(torch.randn(2, 4, device=device), torch.tensor([0, label], device=device)).backward()
torch.cuda.synchronize() if device.type == "cuda" else None
"""


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_out_of_range_ends_the_process(device, label):
    """With an assertion on the device, which ends the context of the whole process."""
    if device.type == "cpu" and label == 10:
        pytest.skip("tests/losses/test_family.py has these errors on the CPU")
    ended = python("-c", LABELS_OUT_OF_RANGE, str(device), str(label), PYTHONPATH=str(ROOT))
    assert ended.returncode != 0
    where = ended.stdout + ended.stderr
    assert "labels: expected values in [0, 10)" in where


@pytest.mark.parametrize("world", [1, 2])
def test_shared_classes_beside_one_process(device, world, tmp_path):
    if device.type == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    if device.type == "cpu" and world == 2:
        pytest.skip("tests/distributed has every world on the CPU")
    arguments = ("-m", "tests.device.sharded", str(world), str(device), str(tmp_path / "store"))
    command = [sys.executable, *arguments]
    members = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(world)
    ]
    for member in members:
        output, _ = member.communicate(timeout=120)
        assert member.returncode == 0, output.decode()


def test_pml_s_interface_beside_pml(device):
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    from angular_losses.integrations import pytorch_metric_learning as ours

    torch.manual_seed(0)
    of_pml, loss = (module.ArcFaceLoss(5, 8).to(device) for module in (theirs, ours))
    loss.load_state_dict(of_pml.state_dict())
    embeddings = torch.randn(16, 8, device=device)
    labels = torch.arange(16, device=device) % 5
    found = []
    for each in (loss, of_pml):
        leaf = embeddings.clone().requires_grad_()
        each(leaf, labels).backward()
        found.append([each(leaf, labels).detach(), leaf.grad, each.W.grad])
    assert_same(*found, rtol=1e-3, atol=1e-4)


def test_a_step_of_the_example(device):
    if find_spec("h5py") is None or find_spec("safetensors") is None:
        pytest.skip("needs h5py and safetensors")
    from examples.brain_tumor.settings import load_settings
    from examples.brain_tumor.training.batches import augment
    from examples.brain_tumor.training.loop import start, take_step
    from examples.brain_tumor.training.run_folder import choose_precision

    settings = load_settings("quick")
    state = start(settings, device)
    state.network.train()
    images = torch.rand(8, 1, 64, 64, device=device)
    labels = torch.arange(8, device=device) % 3
    precision = choose_precision("auto", device)
    for _ in range(3):
        moved = augment(images, settings.augmentation, state.generator)
        measures = take_step(state, moved, labels, precision)
    assert measures[0].isfinite()
