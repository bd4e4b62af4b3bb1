"""One table of the losses with the paper each is held to; every test of one runs over it.

A new loss is one more row. ``paper`` calls tests/papers.py with the settings of the loss, in eval
mode: the losses of the rows, by a formula that the package has no part in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import angular_losses as al
from tests import papers

COUNTS = torch.tensor([5.0, 900.0, 30.0, 30.0, 200.0, 1.0, 64.0])
CLASSES = len(COUNTS)


@dataclass(frozen=True)
class Row:
    name: str
    build: Callable[..., al.MarginLoss]
    paper: Callable[..., torch.Tensor]
    # Whether the gradient is that of the value; not where the paper takes a part as constant.
    exact: bool = True
    smoothing: bool = True


def fixed(name, build, paper, *, exact=True, smoothing=True, **settings):
    """A row whose paper needs settings alone, all of them attributes of the loss or given here."""

    def formula(loss, embeddings, weight, labels):
        given = {k: v(loss) if callable(v) else v for k, v in settings.items()}
        return paper(embeddings, weight, labels, **given)

    return Row(name, build, formula, exact, smoothing)


def of(name: str) -> Callable[[Any], Any]:
    return lambda loss: getattr(loss, name)


def with_defaults(cls, **settings):
    def build(classes, size, **options):
        return cls(classes, size, **{**settings, **options})

    return build


def curricular(classes, size, **options):
    loss = al.CurricularFaceLoss(classes, size, **options)
    loss.t.fill_(0.3)
    return loss


def adaface(classes, size, **options):
    loss = al.AdaFaceLoss(classes, size, **options)
    loss.mean.fill_(2.5)
    loss.deviation.fill_(0.75)
    return loss


def kappaface(classes, size, **options):
    loss = al.KappaFaceLoss(classes, size, COUNTS[:classes], **options)
    loss.margin.copy_(torch.linspace(0.1, 0.6, classes))
    return loss


def magface_formula(loss, embeddings, weight, labels):
    (l_a, u_a), (l_margin, u_margin) = loss.length_bounds, loss.margin_bounds
    rows = papers.magface(
        embeddings,
        weight,
        labels,
        scale=loss.scale,
        l_a=l_a,
        u_a=u_a,
        l_margin=l_margin,
        u_margin=u_margin,
    )
    return rows + loss.lambda_g * papers.magface_g(embeddings, l_a=l_a, u_a=u_a)


def soft_formula(loss, embeddings, weight, labels):
    rows = papers.spherefacer(embeddings, weight, labels, margin=loss.margin, kind=loss.kind)
    return rows + papers.spherefacer_norm(embeddings, scale=loss.scale, t=loss.t)


MARGIN = {"margin": of("margin")}
MARGIN_AND_SCALE = {"margin": of("margin"), "scale": of("scale")}
LDAM = papers.ldam_margins(COUNTS, max_margin=0.5)
A, B = papers.landmark_coefficients(COUNTS, low=0.05, high=0.5, power=0.25)
LANDMARK = papers.landmark_margins(COUNTS, a=A, b=B, power=0.25)

FAMILY = [
    fixed("NormalizedSoftmax", al.NormalizedSoftmaxLoss, papers.adacos, scale=of("scale")),
    fixed("SphereFace", with_defaults(al.SphereFaceLoss, scale=None), papers.sphereface, **MARGIN),
    fixed(
        "SphereFace-annealed",
        lambda *sizes, **options: al.SphereFaceLoss(
            *sizes,
            **{"scale": None, "schedule": al.LambdaAnnealing(base=3.0, minimum=3.0), **options},
        ),
        papers.sphereface,
        annealing=3.0,
        **MARGIN,
    ),
    *(
        fixed(
            f"SphereFace-R-{kind}",
            with_defaults(al.SphereFaceRLoss, kind=kind),
            papers.spherefacer,
            kind=kind,
            **MARGIN_AND_SCALE,
        )
        for kind in ("v0", "v1", "v2")
    ),
    Row(
        "SphereFace-R-soft",
        with_defaults(al.SphereFaceRLoss, normalization="soft"),
        soft_formula,
    ),
    Row(
        "SphereFace-R-v2-soft",
        with_defaults(al.SphereFaceRLoss, kind="v2", normalization="soft"),
        soft_formula,
    ),
    fixed(
        "SphereFace-R-detached",
        with_defaults(al.SphereFaceRLoss, kind="v2", gradient="detached"),
        papers.spherefacer,
        exact=False,
        kind="v2",
        detach_characteristic=True,
        **MARGIN_AND_SCALE,
    ),
    fixed("L-Softmax", al.LSoftmaxLoss, papers.large_margin_softmax, **MARGIN),
    fixed(
        "L-Softmax-annealed",
        lambda *sizes, **options: al.LSoftmaxLoss(  # a schedule belongs to one loss
            *sizes, **{"schedule": al.LambdaAnnealing(base=3.0, minimum=3.0), **options}
        ),
        papers.large_margin_softmax,
        annealing=3.0,
        **MARGIN,
    ),
    fixed(
        "CosFace",
        al.CosFaceLoss,
        papers.ldam,
        margins=lambda loss: torch.full((loss.num_classes,), loss.margin, dtype=torch.float64),
        scale=of("scale"),
    ),
    fixed("ArcFace", al.ArcFaceLoss, papers.subcenter_arcface, sub_centers=1, **MARGIN_AND_SCALE),
    fixed(
        "SubCenterArcFace",
        al.SubCenterArcFaceLoss,
        papers.subcenter_arcface,
        sub_centers=of("sub_centers"),
        **MARGIN_AND_SCALE,
    ),
    fixed(
        "LDAM",
        with_defaults(al.CosFaceLoss, margin=LDAM, scale=30.0),
        papers.ldam,
        margins=LDAM,
        scale=30.0,
    ),
    fixed(
        "ArcFace-landmarks",
        with_defaults(al.ArcFaceLoss, margin=LANDMARK),
        papers.subcenter_arcface,
        sub_centers=1,
        scale=of("scale"),
        margin=LANDMARK,
    ),
    fixed("Li-ArcFace", al.LiArcFaceLoss, papers.li_arcface, **MARGIN_AND_SCALE),
    fixed(
        "X2-Softmax",
        with_defaults(al.X2SoftmaxLoss, h=-0.2),
        papers.x2_softmax,
        **{name: of(name) for name in ("a", "h", "k", "scale")},
    ),
    fixed("AdaCos", al.AdaCosLoss, papers.adacos, scale=lambda loss: loss.scale.double()),
    fixed(
        "AdaFace",
        adaface,
        papers.adaface,
        exact=False,
        h=of("h"),
        mean=2.5,
        std=0.75,
        eps=1e-3,
        clip=(1e-3, 100.0),
        **MARGIN_AND_SCALE,
    ),
    Row(
        "MagFace",
        with_defaults(al.MagFaceLoss, length_bounds=(1.0, 4.0)),
        magface_formula,
    ),
    *(
        fixed(
            f"ElasticFace-{kind}",
            with_defaults(al.ElasticFaceLoss, kind=kind),
            papers.elasticface,
            kind=kind,
            margins=of("margin"),
            scale=of("scale"),
        )
        for kind in ("arc", "cos")
    ),
    fixed(
        "KappaFace",
        kappaface,
        papers.kappaface,
        margins=lambda loss: loss.margin.double(),
        scale=of("scale"),
    ),
    fixed(
        "CurricularFace",
        curricular,
        papers.curricularface,
        t=lambda loss: loss.t.double(),
        **MARGIN_AND_SCALE,
    ),
    *(
        fixed(
            f"MV-{kind}-{'adaptive' if adaptive else 'fixed'}",
            with_defaults(al.MVSoftmaxLoss, kind=kind, adaptive=adaptive),
            papers.mv_softmax,
            kind={"arc": "arc", "cos": "am"}[kind],
            adaptive=adaptive,
            t=of("t"),
            **MARGIN_AND_SCALE,
        )
        for kind in ("arc", "cos")
        for adaptive in (True, False)
    ),
    *(
        fixed(
            f"NPCFace{'-easy' if easy else ''}",
            with_defaults(al.NPCFaceLoss, beyond="easy" if easy else "decreasing"),
            papers.npcface,
            exact=False,
            margin=of("mask_margin"),
            m0=of("margin"),
            m1=of("m1"),
            t=of("t"),
            a=of("a"),
            scale=of("scale"),
            easy_margin=easy,
        )
        for easy in (False, True)
    ),
    fixed(
        "Circle",
        al.CircleLoss,
        papers.circle,
        exact=False,
        margin=of("margin"),
        gamma=of("scale"),
    ),
    *(
        fixed(
            f"InterTopK-{kind}",
            with_defaults(al.InterTopKLoss, kind=kind, k=2, sub_centers=sub_centers),
            papers.inter_topk,
            kind=kind,
            k=2,
            sub_centers=sub_centers,
            penalty=of("nearest_penalty"),
            **MARGIN_AND_SCALE,
        )
        for kind, sub_centers in (("arc", 1), ("cos", 3))
    ),
    *(
        fixed(
            f"SphereFace2-{kind}",
            with_defaults(al.SphereFace2Loss, kind=kind),
            papers.sphereface2,
            smoothing=False,
            bias=of("bias"),
            t=of("t"),
            balance=of("balance"),
            kind=kind,
            **MARGIN_AND_SCALE,
        )
        for kind in ("C", "A")
    ),
    fixed(
        "SphereFace2-detached",
        with_defaults(al.SphereFace2Loss, gradient="detached"),
        papers.sphereface2,
        exact=False,
        smoothing=False,
        bias=of("bias"),
        t=of("t"),
        balance=of("balance"),
        detach_characteristic=True,
        **MARGIN_AND_SCALE,
    ),
    fixed(
        "UniFace",
        al.UniFaceLoss,
        papers.uniface,
        smoothing=False,
        bias=of("bias"),
        balance=of("balance"),
        **MARGIN_AND_SCALE,
    ),
    fixed("P2SGrad", al.P2SGradLoss, papers.p2sgrad, smoothing=False),
]
NAMES = [row.name for row in FAMILY]
