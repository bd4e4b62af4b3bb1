"""What the margin explorer has to show, by the losses' forward passes and without its data.

The page is held to it by explorer.mjs, and its data by tests/test_explorer.py.
"""

import math

import torch

import angular_losses as al

ANGLES = (0, 17, 45, 72, 90, 121, 163)


def adaface(classes, quality, scale):
    """AdaFace about lengths of 50, and the length of an embedding of that quality."""
    loss = al.AdaFaceLoss(classes, 2, scale=scale, h=0.333, dtype=torch.float64)
    loss.mean.fill_(50.0)
    loss.deviation.fill_(10.0)
    return loss, 50 + quality * 10.001 / 0.333


def magface(classes, length, scale):
    return al.MagFaceLoss(classes, 2, scale=scale, lambda_g=0.0, dtype=torch.float64), length


def with_margin(loss, name="margin", **settings):
    def build(classes, value, scale):
        given = {} if name is None else {name: value}
        options = {**given, **settings, "scale": scale, "dtype": torch.float64}
        return loss(classes, 2, **options), 1.0

    return build


# What is on the page, the value its slider gets, and the loss.
CASES = [
    ("softmax", 1.0, with_margin(al.NormalizedSoftmaxLoss, None)),
    ("sphereface", 1.375, with_margin(al.SphereFaceLoss)),
    ("sphereface", 4.0, with_margin(al.SphereFaceLoss)),
    ("cosface", 0.35, with_margin(al.CosFaceLoss)),
    ("arcface", 0.5, with_margin(al.ArcFaceLoss)),
    ("arcface", 1.25, with_margin(al.ArcFaceLoss)),
    ("combined", 0.3, with_margin(al.CombinedMarginLoss, "m2", m1=1.0, m3=0.2)),
    ("liarcface", 0.45, with_margin(al.LiArcFaceLoss)),
    ("spherefacer-v1", 1.5, with_margin(al.SphereFaceRLoss, kind="v1")),
    ("spherefacer-v2", 2.0, with_margin(al.SphereFaceRLoss, kind="v2")),
    ("lsoftmax", 2.5, with_margin(al.LSoftmaxLoss)),
    ("circle", 0.25, with_margin(al.CircleLoss)),
    ("magface", 75.0, magface),
    ("adaface", -0.7, adaface),
    ("adaface", 0.4, adaface),
    *(
        (f"arcface-{beyond}", 0.6, with_margin(al.ArcFaceLoss, beyond=beyond))
        for beyond in ("plain", "linear", "shifted", "clamped", "cosine", "easy")
    ),
]


def place(*angles):
    """Directions in the plane at these angles, (N, 2)."""
    turns = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([turns.cos(), turns.sin()], 1)


def row_loss(build, value, scale, embedding, centres):
    """The loss of one embedding of class 0, at an angle in the plane, with centres at others."""
    loss, length = build(len(centres), value, scale)
    with torch.no_grad():
        loss.eval().weight.copy_(place(*centres))
        return loss(length * place(embedding), torch.tensor([0])).item()


def logit_and_gradient(build, value, scale, theta):
    loss, length = build(2, value, scale)
    with torch.no_grad():
        loss.eval().weight.copy_(place(0.0, 1.0))
    embedding, label = length * place(0.0), torch.tensor([0])
    angle = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    logit = scale * loss.margin_function(embedding, label)(angle)
    return logit.item(), torch.autograd.grad(logit.sum(), angle)[0].item()


def boundary(build, value, scale, other):
    """Where the loss between two classes is log 2, on the way to the other centre; by bisection."""
    low, high = 0.0, other
    for _ in range(50):
        middle = (low + high) / 2
        of_other = row_loss(build, value, scale, middle, (0.0, other)) > math.log(2)
        low, high = (low, middle) if of_other else (middle, high)
    return low


def expected(scale=24, classes=100, other=75):
    """A row for each loss and angle; angles in degrees, gradients per radian."""
    away = math.radians(other)
    rows = []
    for name, value, build in CASES:
        edge = boundary(build, value, scale, away)
        for degree in ANGLES:
            theta = math.radians(degree)
            logit, gradient = logit_and_gradient(build, value, scale, theta)
            centres = (theta, *([-away] * (classes - 1)))
            rows.append(
                {
                    **{"loss": name, "value": value, "theta": degree},
                    **{"s": scale, "C": classes, "other": other},
                    "logit": logit,
                    "gradient": gradient,
                    "probability": math.exp(-row_loss(build, value, scale, 0.0, centres)),
                    "boundary": edge,
                }
            )
    return rows
