"""Training steps of the losses of the family, small ones in float64, to be compared."""

import torch

import angular_losses as al
from tests.family import CLASSES, FAMILY, NAMES

SIZE = 6
SCHEDULES = {
    "none": lambda: None,
    "warm-up": lambda: al.MarginWarmup(3),
    "annealing": lambda: al.LambdaAnnealing(base=3.0, gamma=1.0, minimum=0.5),
}
ADAPTIVE = ("AdaCos", "AdaFace", "CurricularFace", "KappaFace")
REFUSES_SCHEDULES = ("Circle", "SphereFace-R-v2", "SphereFace-R-v2-soft", "SphereFace-R-detached")


def build(name, schedule="warm-up", **options):
    if name not in REFUSES_SCHEDULES:
        options["schedule"] = SCHEDULES[schedule]()
    torch.manual_seed(0)
    loss = FAMILY[NAMES.index(name)].build(CLASSES, SIZE, dtype=torch.float64, **options).train()
    if hasattr(loss, "momentum"):
        loss.momentum = 0.3  # so that what moves is seen to move
    return loss


def batch(seed, num_rows=8):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (num_rows,), generator=generator)


def state(loss):
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def step(loss, seed, call=None):
    """The loss of a batch and its gradients; the same random draws for the same seed."""
    embeddings, labels = batch(seed)
    return gradients(loss, embeddings, (embeddings, labels), call, seed)


def gradients(loss, variable, given, call=None, seed=0):
    """The loss of what is given, and its gradients by the variable and by each parameter."""
    torch.manual_seed(seed)
    value = (loss if call is None else call)(*given)
    value.backward()
    variables = [variable, *loss.parameters()]
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in variables]
    for each in variables:
        each.grad = None
    return [value.detach(), *found]


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_same_state(loss, other, **tolerance):
    torch.testing.assert_close(state(loss), state(other), **tolerance)
