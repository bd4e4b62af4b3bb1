"""Angles, margins and losses on the device, in each precision, beside references."""

import math

import pytest
import torch

import angular_losses as al
from tests import reference
from tests.cases import CASES, in_chunks_of
from tests.family import CLASSES, FAMILY
from tests.steps import SIZE
from tests.strategies import ANGLES, pair_at

MANY, ROWS, DEPTH = 5000, 64, 96  # more classes than are multiplied in full precision
PRECISIONS = {  # of the products, and of the gradients that are in it themselves
    "float32": (torch.float32, 1e-5),
    "bfloat16": (torch.bfloat16, 2e-2),
    "float16": (torch.float16, 2e-2),
}


@pytest.mark.parametrize("theta", ANGLES)
def test_angle_and_gradient_against_50_digits(device, theta):
    first, second = pair_at(theta, 128, seed=7)
    exact = reference.exact(first), reference.exact(second)
    on_device = [each[None].to(device).requires_grad_() for each in (first, second)]
    angle = al.angle_between(*on_device)
    angle.sum().backward()
    assert abs(float(reference.mp.mpf(angle.item()) - reference.angle(*exact))) <= 1e-15
    for each, pair in zip(on_device, (exact, exact[::-1]), strict=True):
        error = reference.relative_error(each.grad[0].cpu(), reference.tangent(*pair))
        assert error <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_margins_against_50_digits(device, case):
    theta = torch.linspace(0.01, math.pi - 0.01, 37, dtype=torch.float64)
    found = case.margin(theta.to(device)).cpu()
    expected = [float(case.expected(each)) for each in reference.exact(theta)]
    assert found.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def results(loss, embeddings, labels):
    """The loss and its gradients, in float64 on the CPU."""
    embeddings = embeddings.clone().requires_grad_()
    value = loss(embeddings, labels)
    value.backward()
    found = [value, embeddings.grad, *(each.grad for each in loss.parameters())]
    return [each.detach().double().cpu() for each in found if each is not None]


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("row", FAMILY, ids=lambda row: row.name)
def test_losses_against_float64(device, row, mode):
    torch.manual_seed(0)
    loss = row.build(CLASSES, SIZE, mode=mode).eval()
    truth = row.build(CLASSES, SIZE, mode="dense", dtype=torch.float64).eval()
    truth.load_state_dict(loss.state_dict())
    embeddings, labels = 3 * torch.randn(8, SIZE), torch.arange(8) % CLASSES
    expected = results(truth, embeddings.double(), labels)
    with in_chunks_of(3):
        found = results(loss.to(device), embeddings.to(device), labels.to(device))
    for each, true in zip(found, expected, strict=True):
        assert (each - true).norm() <= 1e-4 * true.norm() + 1e-6


def of_many_classes(device, mode, **options):
    torch.manual_seed(0)
    loss = al.ArcFaceLoss(MANY, DEPTH, mode=mode, **options)
    truth = al.ArcFaceLoss(MANY, DEPTH, mode="dense", dtype=torch.float64)
    truth.load_state_dict(loss.state_dict())
    labels = torch.randint(MANY, (ROWS,))
    nearness = torch.linspace(0, 2, ROWS)[:, None]
    embeddings = torch.randn(ROWS, DEPTH) / DEPTH**0.5 + nearness * loss.weight.detach()[labels]
    return loss.to(device), truth, embeddings, labels


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_against_float64(device, precision, mode):
    dtype, tolerance = PRECISIONS[precision]
    loss, truth, embeddings, labels = of_many_classes(device, mode)
    expected = results(truth, embeddings.double(), labels)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = results(loss, embeddings.to(device), labels.to(device))
    for each, true in zip(found, expected, strict=True):
        assert (each - true).norm() <= tolerance * true.norm()


@pytest.mark.parametrize("num_classes", [5, MANY])
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_scaled_gradients_do_not_underflow_in_float16(device, mode, num_classes):
    """Those of embeddings in float16, through a GradScaler's factor."""
    torch.manual_seed(0)
    loss = al.ArcFaceLoss(num_classes, DEPTH, mode=mode)
    truth = al.ArcFaceLoss(num_classes, DEPTH, mode="dense", dtype=torch.float64)
    truth.load_state_dict(loss.state_dict())
    # Long, and at their centres: of gradients far below 6e-8, the least of float16.
    labels = torch.arange(ROWS) % num_classes
    embeddings = 100 * loss.weight.detach()[labels] + torch.randn(ROWS, DEPTH)
    embeddings, labels = embeddings.half().to(device), labels.to(device)
    _, expected, *_ = results(truth, embeddings.double().cpu(), labels.cpu())
    embeddings.requires_grad_()
    factor = 2.0 ** math.floor(math.log2(1e4 / expected.abs().max()))
    (factor * loss.to(device)(embeddings, labels)).backward()
    found = embeddings.grad.double().cpu() / factor
    assert (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_float16_with_a_grad_scaler(device, mode):
    loss, _, embeddings, labels = of_many_classes(device, mode)
    network = torch.nn.Linear(DEPTH, DEPTH, device=device)
    optimiser = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    losses = []
    for _ in range(10):
        with torch.autocast(device.type, torch.float16):
            value = loss(network(embeddings.to(device)), labels.to(device))
        optimiser.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(value.detach())
    assert scaler.get_scale() >= 2.0**12  # no step was skipped
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_deterministic_algorithms_repeat_bit_by_bit(device, precision, mode):
    loss, _, embeddings, labels = of_many_classes(device, mode)
    labels = labels % 8  # several rows of a class add to the gradient of its centre
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (
            results_under_autocast(loss, embeddings.to(device), labels.to(device), precision)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def results_under_autocast(loss, embeddings, labels, precision):
    loss.zero_grad()
    with torch.autocast(embeddings.device.type, torch.bfloat16, precision == "bfloat16"):
        return results(loss, embeddings, labels)
