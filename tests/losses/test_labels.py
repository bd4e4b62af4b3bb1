"""Several labels a row."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from angular_losses import AdaFaceLoss, ArcFaceLoss, CurricularFaceLoss, SphereFace2Loss
from angular_losses.losses import labels as columns

SIZE, CLASSES, ROWS = 6, 7, 5
LOSSES = (ArcFaceLoss, AdaFaceLoss, CurricularFaceLoss, SphereFace2Loss)
LABELS = torch.tensor([[0, 1, 6], [2, -100, -100], [3, 4, -100], [5, 5, 5], [-100, -100, -100]])


def made(cls, **options):
    torch.manual_seed(3)
    return cls(CLASSES, SIZE, dtype=torch.float64, **options).eval()


def rows():
    return torch.randn(ROWS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cls", LOSSES)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_weighted_sum_over_labels(cls, is_weighted):
    of_rows = made(cls, reduction="none")
    label_weight, given = torch.tensor([3, 1, 2, 3, 1])[:, None].expand_as(LABELS).pow(-1.0), {}
    if is_weighted:
        label_weight = torch.rand(LABELS.shape, dtype=torch.float64)
        given["label_weight"] = label_weight.masked_fill(LABELS == -100, math.nan)
    counts = label_weight.double().masked_fill(LABELS == -100, 0)
    embeddings = rows().requires_grad_()
    each = torch.stack([of_rows(embeddings, labels) for labels in LABELS.T], 1)
    expected = (each * counts).sum(1)
    found = of_rows(embeddings, LABELS, **given)
    assert torch.allclose(found, expected)
    sample_weight = torch.rand(ROWS, dtype=torch.float64)
    mean = made(cls)(embeddings, LABELS, sample_weight, **given)
    expected = (sample_weight * expected).sum() / (sample_weight[:, None] * counts).sum()
    assert torch.allclose(mean, expected)
    wanted, gradient = (torch.autograd.grad(value, embeddings)[0] for value in (expected, mean))
    assert torch.allclose(wanted, gradient)


@pytest.mark.parametrize("is_filled", [False, True])
def test_statistics_count_a_row_once(is_filled):
    several, single = made(AdaFaceLoss).train(), made(AdaFaceLoss).train()
    embeddings, labels = rows(), torch.arange(ROWS)
    three, given = labels[:, None].repeat(1, 3), {}
    if is_filled:
        three[:, 1:] = -100
        given["label_weight"] = torch.ones(ROWS, 3)
    several(embeddings, three, **given)
    single(embeddings, labels)
    for name in several.statistics:
        assert torch.allclose(getattr(several, name), getattr(single, name))


def test_a_row_is_correct_for_any_of_its_labels():
    loss = made(ArcFaceLoss)
    embeddings = loss.weight.detach()[:ROWS]  # each nearest to the class of its number
    labels = torch.tensor([[3, 0], [1, -100], [0, 1], [-100, 3], [-100, -100]])
    _, correct = loss(embeddings, labels, return_correct=True)
    assert correct.tolist() == [True, True, False, True, False]


def test_labels_without_weight_are_not_a_rows_own():
    loss = made(ArcFaceLoss)
    embeddings, of_each = loss.weight.detach()[:2], torch.arange(CLASSES).expand(2, CLASSES)
    shares = torch.eye(CLASSES, dtype=torch.float64)[[0, 2]]
    _, correct = loss(embeddings, of_each, label_weight=shares, return_correct=True)
    assert correct.tolist() == [True, False]
    labels, others = torch.tensor([0, 2]), torch.tensor([3, 1])
    for lam, expected in ((1.0, [True, False]), (0.5, [True, True])):
        _, correct = loss(embeddings, labels, other_labels=others, lam=lam, return_correct=True)
        assert correct.tolist() == expected


def test_even_weights_keep_the_digits_of_float64():
    of_rows, labels = made(ArcFaceLoss, reduction="none"), LABELS[:1].expand(ROWS, 3)
    each = torch.stack([of_rows(rows(), labels[:, k]) for k in range(3)])
    assert torch.allclose(of_rows(rows(), labels), each.mean(0), rtol=1e-14)


def test_weights_on_devices_without_float64(monkeypatch):
    monkeypatch.setattr(columns, "precise_dtype", lambda device: torch.float32)
    _, even = columns.several(rows(), LABELS, None, -100, CLASSES)
    _, shares = columns.mixed(rows(), LABELS[:, 0], LABELS[:, 1], 0.3)
    assert even.dtype == shares.dtype == torch.float32


def test_ignored_rows_may_hold_anything():
    loss, embeddings = made(ArcFaceLoss), rows()
    embeddings[4] = math.nan
    embeddings.requires_grad_()
    loss(embeddings, LABELS).backward()
    assert embeddings.grad.isfinite().all()
    assert not embeddings.grad[4].any()


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        (LABELS[:3], {}, r"labels: expected shape \(5,\), or \(5, K\) .* got \(3, 3\)"),
        (LABELS[:, :0], {}, r"labels: expected .* got \(5, 0\)"),
        (
            LABELS,
            {"label_weight": torch.ones(5)},
            r"label_weight: .*\(5, 3\).* got \(5,\)",
        ),
        (LABELS[:, 0], {"label_weight": torch.ones(5)}, r"label_weight: expected it with labels"),
        (LABELS[:, 0], {"label_weight": torch.ones(5), "lam": 0.3}, "label_weight: .* without"),
        (LABELS, {"other_labels": LABELS[:, 0], "lam": 0.3}, r"labels: expected shape \(5,\)"),
        (LABELS + 3, {}, "labels: "),
        (
            LABELS[:, 0],
            {"other_labels": LABELS[:, 0], "lam": torch.tensor(1.5)},
            r"lam: .* got 1.5",
        ),
        (
            LABELS[:, 0],
            {"other_labels": LABELS[:, 0], "lam": torch.tensor([0, 1, 0.5, 0, -0.1])},
            r"lam: .*\[0, 1\], got -0.1",
        ),
    ],
)
def test_what_does_not_fit_is_named(labels, more, message):
    with pytest.raises(ValueError, match=message):
        made(ArcFaceLoss)(rows(), labels, **more)


def test_one_hot_labels_are_refused_and_soft_ones_over_all_classes_are_not():
    loss, embeddings, labels = ArcFaceLoss(5, 8), torch.randn(3, 8), torch.tensor([1, 0, 4])
    one_hot = torch.nn.functional.one_hot(labels, 5)
    with pytest.raises(ValueError, match=r"^labels: .* zeros and ones; pass labels\.argmax\(1\)"):
        loss(embeddings, one_hot)
    of_all = torch.arange(5).expand(3, 5)
    found = loss(embeddings, of_all, label_weight=one_hot.float())
    assert found.item() == pytest.approx(loss(embeddings, labels).item(), rel=1e-6)
    filled = torch.tensor([[0, 1, 0, 0, 0]]).expand(3, 5)
    loss(embeddings, filled, label_weight=(filled == 0).float())
    loss(embeddings, torch.tensor([[0, 1, -100, -100, -100]]).expand(3, 5))
    loss(embeddings, of_all.to(torch.uint16))
    ArcFaceLoss(5, 8, ignore_index=0)(embeddings, one_hot)


def test_the_second_labels_are_named():
    with pytest.raises(ValueError, match=r"^other_labels: expected shape \(4,\)"):
        ArcFaceLoss(3, 6)(
            *(torch.randn(4, 6), torch.arange(4) % 3),
            other_labels=torch.arange(5) % 3,
            lam=0.3,
        )


def test_a_share_from_the_host_is_not_copied():
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if any(isinstance(each, torch.Tensor) and not each.is_meta for each in arguments):
                assert "to_copy" not in str(function)
            return function(*arguments, **(options or {}))

    embeddings = torch.randn(4, 6, device="meta")
    labels = torch.zeros(4, dtype=torch.int64, device="meta")
    loss = ArcFaceLoss(3, 6, device="meta")
    with Copies():
        loss(embeddings, labels, other_labels=labels, lam=torch.tensor(0.3))
