"""Errors of the target logit and its gradient, compared with pytorch-metric-learning's.

    python -m benchmarks.accuracy

For random pairs of embedding and class centre at a given angle: the share of pairs whose embedding
gradient holds NaN, or is all zeros where the true one is not, and the worst relative errors of the
logit and of the gradient among the others. The reference is computed in 50 digits from the exact
values of the rounded inputs. ArcFace past pi - m is PML's own definition for both.
"""

import argparse
import platform

import mpmath as mp
import pytorch_metric_learning
import torch
from pytorch_metric_learning import losses as pml

import angular_losses as al
from angular_losses.engine.chunks import Inputs, Others, Settings
from angular_losses.engine.operators import margin_parts
from tests import reference
from tests.strategies import pair_at


def arcface_of_pml(theta):
    m = mp.mpf(0.5)
    return mp.cos(theta + m) if theta <= mp.pi - m else mp.cos(theta) - m * mp.sin(m)


LOSSES = {
    "ArcFace": (
        lambda theta: al.arcface(theta, 0.5, beyond="linear"),
        arcface_of_pml,
        lambda *sizes: pml.ArcFaceLoss(*sizes, margin=float(mp.degrees(0.5))),
    ),
    "CosFace": (
        lambda theta: al.cosface(theta, 0.35),
        lambda theta: reference.cosface(theta, 0.35),
        lambda *sizes: pml.CosFaceLoss(*sizes, margin=0.35),
    ),
    "SphereFace": (
        lambda theta: al.sphereface(theta, 4),
        lambda theta: reference.sphereface(theta, 4),
        lambda *sizes: pml.SphereFaceLoss(*sizes, margin=4),
    ),
}
ANGLES = [1e-6, 3e-4, 1e-2, 1.0, 3.1]
PRECISIONS = ["float32", "bfloat16 autocast", "bfloat16"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32, help="pairs for each row (default 32)")
    parser.add_argument("--dimensions", type=int, default=512, help="d (default 512)")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, CPU, "
        f"pytorch-metric-learning (PML) {pytorch_metric_learning.__version__}; "
        f"d = {options.dimensions}, "
        f"{options.pairs} pairs a row, seeds 0 to {options.pairs - 1}\n"
    )
    print("| precision | loss | theta | ours: NaN, dead, logit, gradient | PML: the same |")
    print("|---|---|---|---|---|")
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        for theta in ANGLES:
            pairs = [
                pair_at(theta, options.dimensions, seed=seed, dtype=dtype)
                for seed in range(options.pairs)
            ]
            embeddings, weight = map(torch.stack, zip(*pairs, strict=True))
            exact = [tuple(map(reference.exact, pair)) for pair in pairs]
            for name, (margin, expected, peer) in LOSSES.items():
                truth = [target_and_gradient(expected, *pair) for pair in exact]
                cells = []
                for target in (ours(margin), theirs(peer)):
                    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
                        cells.append(describe(*measure(target, embeddings, weight), truth))
                print(f"| {precision} | {name} | {theta:g} | {' | '.join(cells)} |", flush=True)


def ours(margin):
    """Our target logit before scaling, from the angle that the losses compute by default."""
    settings = Settings(64.0, 2048, torch.float32, True, True)

    def target(embeddings, weight):
        inputs = Inputs(embeddings, weight, torch.arange(len(weight)))
        return margin(margin_parts(inputs, settings, Others()).theta)

    return target


def theirs(peer):
    """PML's target logit before scaling; each pair has a class of its own."""

    def target(embeddings, weight):
        loss = peer(*weight.shape)
        loss.W.data = weight.T.contiguous()
        loss.cast_types(embeddings.dtype, embeddings.device)
        return loss.modify_cosine_of_target_classes(loss.get_cosine(embeddings).diagonal())

    return target


def measure(target, embeddings, weight):
    embeddings = embeddings.clone().requires_grad_()
    logits = target(embeddings, weight)
    logits.float().sum().backward()
    return logits.detach(), embeddings.grad


def target_and_gradient(expected, first, second):
    theta = reference.angle(first, second)
    slope = reference.derivative(expected, theta)
    return expected(theta), [slope * value for value in reference.tangent(first, second)]


def describe(logits, gradients, truth):
    nan = ~gradients.isfinite().all(1)
    alive = torch.tensor([any(gradient) for _, gradient in truth])
    dead = (gradients == 0).all(1) & alive
    logit_error, gradient_error = 0.0, 0.0
    for row, (logit, gradient) in enumerate(truth):
        if nan[row] or dead[row]:
            continue
        off = abs(mp.mpf(logits[row].item()) - logit) / max(1, abs(logit))
        logit_error = max(logit_error, float(off))
        gradient_error = max(gradient_error, reference.relative_error(gradients[row], gradient))
    errors = f"{logit_error:.0e}, {gradient_error:.0e}" if not (nan | dead).all() else "-, -"
    return f"{nan.float().mean():.0%}, {dead.float().mean():.0%}, {errors}"


if __name__ == "__main__":
    main()
