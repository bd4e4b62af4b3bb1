"""The figures of the explanation pages.

python docs/explanation/figures.py docs/images
"""

import math
import sys
from pathlib import Path

import mpmath
import torch
from matplotlib.figure import Figure
from torch import Tensor

import angular_losses as al
from angular_losses import negatives

ANGLES = torch.linspace(0, math.pi, 361, dtype=torch.float64)
# Loss, title and settings.
MARGINS = {
    "NormalizedSoftmaxLoss": ("no margin", {}),
    "SphereFaceLoss": ("m = 4", {"margin": 4}),
    "SphereFaceRLoss": ("v1, m = 1.5", {}),
    "LSoftmaxLoss": ("m = 2, lengths 1", {"margin": 2}),
    "CosFaceLoss": ("m = 0.35", {}),
    "ArcFaceLoss": ("m = 0.5", {}),
    "CombinedMarginLoss": ("1, 0.3, 0.2", {}),
    "LiArcFaceLoss": ("m = 0.45", {}),
    "MagFaceLoss": ("at length 60", {}),
    "AdaFaceLoss": ("at mean quality", {}),
    "CircleLoss": ("m = 0.25", {}),
    "ElasticFaceLoss": ("mean, m = 0.5", {}),
}
NEGATIVES = {
    "CurricularFace, t = 0.5": lambda c, f: negatives.curricularface(c, f, torch.tensor(0.5)),
    "MV-Softmax, t = 0.2": lambda c, f: negatives.mv_softmax(c, f, 0.2, adaptive=True),
    "NPCFace": lambda c, f: negatives.npcface(c, f, 1.1, 0.2),
    "Circle, m = 0.25": lambda c, f: negatives.circle(c, 0.25),
    "SphereFace-R v2, m = 1.5": lambda c, f: negatives.divided_angle(c, 1.5),
}
EXPONENTS = [-8 + i / 4 for i in range(33)]


def curve(name: str, theta: Tensor = ANGLES) -> tuple[Tensor, Tensor]:
    """The target logit before scaling of a loss, and its derivative, at angles (N,)."""
    loss = getattr(al, name)(10, 4, **MARGINS[name][1]).eval()
    theta = theta.clone().requires_grad_()
    embeddings = torch.zeros(len(theta), 4)
    embeddings[:, 0] = 60.0
    if name == "AdaFaceLoss":
        embeddings[:, 0] = loss.mean
    if name == "LSoftmaxLoss":
        torch.nn.init.constant_(loss.weight, 0.5)  # of length 1
    labels = torch.zeros(len(theta), dtype=torch.int64)
    target = loss.margin_function(embeddings, labels)(theta)
    (slope,) = torch.autograd.grad(target.sum(), theta)
    return target.detach(), slope


def margin_functions() -> Figure:
    """Target logits and slopes on common axes."""
    figure = Figure(figsize=(9, 8.5), layout="constrained")
    for ax, (name, (setting, _)) in zip(
        figure.subplots(4, 3, sharex=True, sharey=True).flat, MARGINS.items(), strict=True
    ):
        value, slope = curve(name)
        ax.plot(ANGLES, ANGLES.cos(), color="0.7")
        ax.plot(ANGLES, value, color="#0072b2", label="target logit")
        ax.plot(ANGLES, slope, color="#d55e00", linestyle="--", label="its slope")
        ax.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        ax.set_title(f"{name.removesuffix('Loss')}, {setting}", fontsize=9)
        ax.set(ylim=(-4.2, 1.2), xticks=[0, math.pi / 2, math.pi])
        ax.set_xticklabels(["0", "π/2", "π"])
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.supxlabel("target angle θ in radians")
    return figure


def reweighted_negatives() -> Figure:
    """The logit of a negative before scaling, as a function of its cosine."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    cosine = torch.linspace(-1, 1, 401, dtype=torch.float64)
    target = torch.full((), 0.3, dtype=torch.float64)
    for ax, (name, function) in zip(
        figure.subplots(1, 5, sharey=True), NEGATIVES.items(), strict=True
    ):
        ax.plot(cosine, cosine, color="0.7")
        ax.plot(cosine, function(cosine, target), color="#0072b2")
        ax.set_title(name, fontsize=8)
    figure.supxlabel("cosine of the negative (target logit 0.3)")
    return figure


def pair_at(theta: mpmath.mpf) -> tuple[Tensor, Tensor]:
    """Two float32 vectors at approximately that angle."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(64, 2, dtype=torch.float64)).Q.T
    return u.float(), (math.cos(theta) * u + math.sin(theta) * v).float()


def exact_angle(u: Tensor, v: Tensor) -> mpmath.mpf:
    """The angle of two vectors in 50 digits."""
    with mpmath.workdps(50):
        first, second = ([mpmath.mpf(x) for x in vector.tolist()] for vector in (u, v))
        dot, norm_u, norm_v = (
            mpmath.fsum(a * b for a, b in zip(p, q, strict=True))
            for p, q in ((first, second), (first, first), (second, second))
        )
        sine = mpmath.sqrt(norm_u * norm_v - dot**2)
        return mpmath.atan2(sine, dot)


def angle_errors() -> dict[str, list[float]]:
    """Relative errors of the angle, by acos of a float32 cosine and by `angle_between`."""
    found: dict[str, list[float]] = {"theta": [], "acos": [], "angle_between": []}
    for exponent in EXPONENTS:
        u, v = pair_at(min(10**exponent, 1.5))
        exact = exact_angle(u, v)
        unit_u, unit_v = (torch.nn.functional.normalize(x, dim=0) for x in (u, v))
        by_acos = torch.acos((unit_u @ unit_v).clamp(-1, 1)).item()
        found["theta"].append(float(exact))
        for name, value in (("acos", by_acos), ("angle_between", al.angle_between(u, v).item())):
            found[name].append(float(abs(value - exact) / exact))
    return found


def precision() -> Figure:
    """The relative error of an angle by acos and by `angle_between`."""
    found = angle_errors()
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.loglog(found["theta"], found["acos"], "o-", ms=3, color="#d55e00", label="acos, float32")
    ours = [max(error, 1e-17) for error in found["angle_between"]]
    ax.loglog(found["theta"], ours, "s-", ms=3, color="#0072b2", label="angle_between")
    ax.set(xlabel="angle in radians", ylabel="relative error", ylim=(5e-18, 10))
    ax.legend(frameon=False)
    return figure


def draw(folder: Path) -> list[Path]:
    """Write all figures into a folder."""
    figures = {
        "margin_functions": margin_functions,
        "negatives": reweighted_negatives,
        "precision": precision,
    }
    paths = [folder / f"explanation_{name}.png" for name in figures]
    for path, make in zip(paths, figures.values(), strict=True):
        make().savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
    return paths


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
