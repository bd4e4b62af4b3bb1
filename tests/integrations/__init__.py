"""The library in the tools that people use; a tool that is not installed skips its tests.

`pip install -e ".[dev,integrations]"` brings the tools.
"""

import warnings

import pytest
import torch

import angular_losses as al

# What the tools warn of is theirs; what the losses warn of is an error here as elsewhere.
of_tools = pytest.mark.filterwarnings("ignore", "error:(weight|scale):")


def tool(name):
    """The module of that name, imported whatever it warns of, or a reason to skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is missing (extra integrations)")


NUM_CLASSES, NUM_FEATURES, SIZE = 4, 16, 8


def examples(rows=32, seed=0, dtype=torch.float64):
    """Gaussian classes: points (N, 16) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (rows,), generator=generator)
    centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)
    points = centres[labels] + 0.5 * torch.randn(rows, NUM_FEATURES, generator=generator)
    return points.to(dtype), labels


def network_and_loss(cls=al.ArcFaceLoss, seed=0, dtype=torch.float64, **options):
    """The same each time; the schedule is of this loss alone."""
    torch.manual_seed(seed)
    options = {"scale": 16.0, "schedule": al.MarginWarmup(10), **options}
    network = torch.nn.Linear(NUM_FEATURES, SIZE, dtype=dtype)
    return network, cls(NUM_CLASSES, SIZE, dtype=dtype, **options)


def sgd(network, loss):
    groups = al.parameter_groups(network, loss, lr=0.05, weight_decay=1e-2)
    return torch.optim.SGD(groups, momentum=0.9)


def plain(network, loss, batches, *, accumulate=1, clip=None, optimiser=None):
    """The reference: a training loop in torch alone."""
    optimiser = optimiser or sgd(network, loss)
    for number, (points, labels) in enumerate(batches, 1):
        (loss(network(points), labels) / accumulate).backward()
        if number % accumulate:
            continue
        if clip is not None:
            parameters = [*network.parameters(), *loss.parameters()]
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        optimiser.zero_grad()
    return state_of(network, loss)


def state_of(network, loss):
    """All that training changes, copied: of the network, the centres, the loss's own state."""
    both = torch.nn.ModuleDict({"network": network, "loss": loss})
    return {name: value.clone() for name, value in both.state_dict().items()}


def differences(state, expected):
    """By name, how far two states are apart at most."""
    assert state.keys() == expected.keys()
    return {
        name: (state[name].double() - value.double()).abs().max().item()
        for name, value in expected.items()
    }


def same(state, expected, tolerance=0.0):
    return max(differences(state, expected).values()) <= tolerance
