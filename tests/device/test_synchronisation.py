"""No step of a training makes the host wait for the device."""

import pytest
import torch

import angular_losses as al
from angular_losses.diagnostics import AngularMonitor
from angular_losses.geometry import inverse_lengths
from tests import reference
from tests.cases import in_chunks_of
from tests.device.hidden import no_synchronisation
from tests.family import CLASSES, FAMILY
from tests.steps import SIZE

ROWS = 8


def problem(row, device, **options):
    torch.manual_seed(0)
    loss = row.build(CLASSES, SIZE, **options).to(device)
    embeddings = torch.randn(ROWS, SIZE, device=device, requires_grad=True)
    return loss, embeddings, (torch.arange(ROWS) % CLASSES).to(device)


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("row", FAMILY, ids=lambda row: row.name)
def test_a_training_step(device, row, mode):
    loss, embeddings, labels = problem(row, device, mode=mode)
    optimiser = torch.optim.SGD([embeddings, *loss.parameters()], lr=0.1)
    with in_chunks_of(3):
        for _ in range(2):  # the first makes what later ones keep
            with no_synchronisation(device):
                loss(embeddings, labels).backward()
                optimiser.step()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_mixed_labels(device, lam):
    loss, embeddings, labels = problem(FAMILY[0], device)
    lam = lam.to(device) if isinstance(lam, torch.Tensor) else lam
    with no_synchronisation(device):
        loss(embeddings, labels, other_labels=labels.flip(0), lam=lam).backward()


def test_weights_and_ignored_rows(device):
    class_weight = torch.linspace(0.5, 2, CLASSES)
    loss = al.ArcFaceLoss(CLASSES, SIZE, class_weight=class_weight, label_smoothing=0.1)
    embeddings = torch.randn(ROWS, SIZE, device=device, requires_grad=True)
    labels = torch.full((ROWS,), -100, device=device)
    sample_weight = torch.ones(ROWS, device=device)
    loss = loss.to(device)
    with no_synchronisation(device):
        loss(embeddings, labels, sample_weight).backward()
    assert embeddings.grad.abs().max() == 0


def test_the_monitor(device):
    loss, embeddings, labels = problem(FAMILY[0], device)
    monitor = AngularMonitor(loss)
    with monitor.attach(), no_synchronisation(device):
        loss(embeddings, labels).backward()
    assert monitor.snapshot().rows.sum() == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_lengths_of_centres(device, dtype, length):
    """In the dtype of the computation: float64 of all centres would cost more than the products."""
    torch.manual_seed(0)
    vectors = (length * torch.randn(3, 64, dtype=torch.float64)).to(dtype).to(device)
    vectors[1] = 0
    working = torch.promote_types(dtype, torch.float32)
    with no_synchronisation(device), Widest() as widest:
        found = inverse_lengths(vectors, working)
    assert widest.bytes <= working.itemsize
    assert found[1] == 0
    for index in (0, 2):
        expected = 1 / reference.norm(reference.exact(vectors[index].cpu()))
        assert found[index].item() == pytest.approx(float(expected), rel=1e-6)


class Widest(torch.utils._python_dispatch.TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **kwargs or {})
        if isinstance(found, torch.Tensor):
            self.bytes = max(self.bytes, found.dtype.itemsize)
        return found
