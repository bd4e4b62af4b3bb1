import math

import pytest
import torch

import angular_losses as al

THETA = torch.tensor([0.3, 1.2, 2.9], dtype=torch.float64)

# The margins here do not depend on it.
BATCH = torch.ones(1, 8), torch.tensor([0])


def step_once(loss):
    loss(torch.randn(4, 8), torch.arange(4))


def test_lambda_falls_as_in_the_authors_code():
    schedule = al.LambdaAnnealing(base=1000, gamma=0.12, power=2, minimum=5)
    for step in (0, 1, 10, 100, 10_000):
        schedule.step.fill_(step)
        expected = max(5, 1000 * (1 + 0.12 * step) ** -2)
        assert schedule.value().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [0, 50, 10**6])
def test_annealed_logit_is_the_papers_average(step):
    loss = al.SphereFaceLoss(4, 8, margin=4, schedule=al.LambdaAnnealing())
    loss.schedule.step.fill_(step)
    lambda_ = max(5.0, 1000 / (1 + 0.12 * step))
    expected = (lambda_ * torch.cos(THETA) + al.sphereface(THETA, 4)) / (1 + lambda_)
    assert torch.allclose(loss.margin_function(*BATCH)(THETA), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "at_share"),
    [
        (al.SphereFaceLoss, lambda share: al.sphereface(THETA, 1 + 3 * share)),
        (al.CosFaceLoss, lambda share: al.cosface(THETA, 0.35 * share)),
        (al.ArcFaceLoss, lambda share: al.arcface(THETA, 0.5 * share)),
        (
            lambda *sizes, **options: al.CombinedMarginLoss(*sizes, m1=2.0, **options),
            lambda share: al.combined(THETA, 1 + share, 0.3 * share, 0.2 * share),
        ),
    ],
)
def test_warm_up_grows_the_margin_itself(loss, at_share):
    module = loss(4, 8, schedule=al.MarginWarmup(10))
    for step, share in ((0, 0.0), (3, 0.3), (10, 1.0), (25, 1.0)):
        module.schedule.step.fill_(step)
        assert torch.allclose(module.margin_function(*BATCH)(THETA), at_share(share), atol=1e-6)


@pytest.mark.parametrize("schedule", [al.LambdaAnnealing, lambda: al.MarginWarmup(100)])
def test_steps_count_training_passes_only_and_are_saved(schedule):
    torch.manual_seed(0)
    loss = al.SphereFaceLoss(4, 8, schedule=schedule())
    for _ in range(3):
        step_once(loss)
    loss.eval()
    step_once(loss)
    assert loss.schedule.step == 3
    resumed = al.SphereFaceLoss(4, 8, schedule=schedule())
    resumed.load_state_dict(loss.state_dict())
    assert resumed.schedule.step == 3
    assert torch.equal(resumed.schedule.value(), loss.schedule.value())
    assert loss.half().schedule.step.dtype == torch.int64


def test_detached_gradient_holds_under_a_schedule():
    loss = al.SphereFaceLoss(4, 8, schedule=al.LambdaAnnealing(minimum=0), gradient="detached")
    loss.schedule.step.fill_(10**9)
    theta = THETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.margin_function(*BATCH)(theta).sum(), theta)
    assert torch.allclose(gradient, -torch.sin(THETA))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: al.LambdaAnnealing(base=-1), ValueError, r"base: .*\[0, inf\), got -1"),
        (lambda: al.LambdaAnnealing(gamma="x"), TypeError, "gamma: expected a number"),
        (lambda: al.LambdaAnnealing(power=math.nan), ValueError, "power: "),
        (lambda: al.LambdaAnnealing(minimum=-5), ValueError, "minimum: "),
        (lambda: al.MarginWarmup(0), ValueError, "steps: expected at least 1"),
        (lambda: al.MarginWarmup(1.5), TypeError, "steps: expected an int, got 1.5"),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
