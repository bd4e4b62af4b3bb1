"""Independent references in 50 digits: angles by acos of the cosine, margins as the papers print.

Nothing here calls the package. Inputs are the exact values of the rounded tensors, so that what is
measured is the package's own error and not that of its inputs.
"""

import mpmath as mp
import torch

mp.mp.dps = 50


def exact(vector):
    """The exact values of a 1-D tensor of any dtype."""
    return [mp.mpf(value) for value in vector.double().tolist()]


def dot(first, second):
    return mp.fdot(first, second)


def norm(vector):
    return mp.sqrt(dot(vector, vector))


def angle(first, second):
    """The angle of two exact vectors by acos; pi / 2 when one of them is zero."""
    length = norm(first) * norm(second)
    if length == 0:
        return mp.pi / 2
    return mp.acos(max(mp.mpf(-1), min(mp.mpf(1), dot(first, second) / length)))


def tangent(first, second):
    """The gradient of the angle with respect to ``first``: minus the unit tangent over the norm."""
    length, other_length = norm(first), norm(second)
    u = [value / length for value in first]
    v = [value / other_length for value in second]
    cosine = dot(u, v)
    towards = [b - cosine * a for a, b in zip(u, v, strict=True)]
    sine = norm(towards)
    if sine < mp.mpf(10) ** -24:  # parallel or opposite: acos of a 50-digit cosine holds 25
        return [mp.mpf(0)] * len(first)
    factor = -1 / (sine * length)
    return [factor * value for value in towards]


def sphereface(theta, m):
    """Eq. (7) of SphereFace: the interval [k pi / m, (k + 1) pi / m] that holds theta."""
    m = mp.mpf(m)
    k = 0
    while theta > (k + 1) * mp.pi / m and k < mp.ceil(m) - 1:
        k += 1
    return (-1) ** k * mp.cos(m * theta) - 2 * k


def cosface(theta, m):
    return mp.cos(theta) - mp.mpf(m)


def arcface(theta, m):
    """cos(theta + m) up to pi; past it the mirror image below -1, which falls on."""
    m = mp.mpf(m)
    if theta + m <= mp.pi:
        return mp.cos(theta + m)
    return -2 - mp.cos(theta + m)


def x2_softmax(theta, a, h, k):
    return mp.mpf(a) * (theta - mp.mpf(h)) ** 2 + mp.mpf(k)


def combined(theta, m1, m2, m3):
    phi = mp.mpf(m1) * theta + mp.mpf(m2)
    turns = 0
    while phi - turns * mp.pi > mp.pi:
        turns += 1
    # Each half turn further is the first one, moved down by 2.
    return mp.cos(phi - turns * mp.pi) - 2 * turns - mp.mpf(m3)


def derivative(margin, theta):
    """d margin / d theta by central differences, whose error is far below 1e-12 in 50 digits."""
    step = mp.mpf(10) ** -20
    return (margin(theta + step) - margin(theta - step)) / (2 * step)


def loss(embedding, weight, label, margin, scale):
    """-log softmax of the margin logits, for one exact embedding."""
    scale = mp.mpf(scale)
    logits = [scale * mp.cos(angle(embedding, centre)) for centre in weight]
    logits[label] = scale * margin(angle(embedding, weight[label]))
    others = mp.fsum(mp.exp(z - logits[label]) for j, z in enumerate(logits) if j != label)
    return mp.log1p(others)


def relative_error(computed, expected):
    """Norm of the difference over the norm of the expected vector, as a float."""
    computed = exact(computed) if isinstance(computed, torch.Tensor) else computed
    difference = [a - b for a, b in zip(computed, expected, strict=True)]
    size = norm(expected)
    return float(norm(difference) / size) if size else float(norm(difference))
