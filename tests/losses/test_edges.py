"""Losses at the edges of their input: no rows, ignored ones, small integers, no values."""

import itertools
import math
import sys
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from angular_losses import validation
from angular_losses.engine import modes
from angular_losses.engine.batch import checked
from tests.cases import in_chunks_of
from tests.family import CLASSES, FAMILY
from tests.steps import SIZE, batch, build, state

NAMES = [row.name for row in FAMILY]
SMOOTHED = {row.name for row in FAMILY if row.smoothing}
every_loss = pytest.mark.parametrize("name", NAMES)


@every_loss
def test_empty_batches(name):
    mode = ("dense", "stash", "recompute")[NAMES.index(name) % 3]
    nothing, labels = torch.empty(0, SIZE, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    class_weight = torch.rand(CLASSES, dtype=torch.float64)
    for smoothing, sub_centers, reduction in itertools.product(
        (0.0, 0.1), (1, 2), ("mean", "sum", "none")
    ):
        options = {"label_smoothing": smoothing} if name in SMOOTHED else {}
        if name != "L-Softmax" and not name.startswith("L-Softmax"):
            options["sub_centers"] = sub_centers
        loss = build(name, mode=mode, reduction=reduction, class_weight=class_weight, **options)
        before = state(loss)
        for given, more in (
            ((labels,), {}),
            ((labels, nothing[:, 0]), {"other_labels": labels, "lam": 0.3}),
        ):
            embeddings = nothing.clone().requires_grad_()
            value = loss(embeddings, *given, **more)
            assert value.shape == ((0,) if reduction == "none" else ())
            assert value.sum() == 0
            value.sum().backward()
            assert embeddings.grad.shape == (0, SIZE)
            for parameter in loss.parameters():
                assert parameter.grad is None or not parameter.grad.any()
        for key, buffer in loss.named_buffers():
            if key != "schedule.step":
                assert torch.equal(buffer, before[key]), key


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("sub_centers", [1, 2])
def test_no_row_of_an_empty_batch_is_correct(mode, sub_centers):
    loss = al.ArcFaceLoss(CLASSES, SIZE, sub_centers=sub_centers, mode=mode)
    for labels in (torch.empty(0, dtype=torch.int64), torch.empty(0, 3, dtype=torch.int64)):
        value, correct = loss(torch.empty(0, SIZE), labels, return_correct=True)
        assert value == 0
        assert correct.shape == (0,)
        assert correct.dtype == torch.bool


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.LiArcFaceLoss, al.CurricularFaceLoss])
@pytest.mark.parametrize("num_rows", [CLASSES - 1, 4 * CLASSES])  # more: both passes at once
def test_equal_sub_centres_count_as_one(num_rows, cls, mode):
    embeddings = torch.randn(num_rows, SIZE, dtype=torch.float64)
    labels = torch.randint(CLASSES, (num_rows,))
    one, three = (cls(CLASSES, SIZE, mode=mode, sub_centers=k, dtype=torch.float64) for k in (1, 3))
    with torch.no_grad():
        three.weight.copy_(one.weight.repeat_interleave(3, 0))
    rows = [embeddings.clone().requires_grad_() for _ in range(2)]
    values = [loss(x, labels) for loss, x in zip((one, three), rows, strict=True)]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(rows[1].grad, rows[0].grad)
    torch.testing.assert_close(three.weight.grad.view(CLASSES, 3, SIZE).sum(1), one.weight.grad)


@pytest.mark.parametrize("call", ["softmax", "one_vs_rest"])
def test_ignored_rows_of_the_functions_too(call):
    embeddings, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    embeddings[1] = torch.tensor([math.nan, math.inf, 0, 0])
    embeddings.requires_grad_()
    labels = torch.tensor([0, -100, 2])
    given = embeddings, weight, labels
    of_rows = torch.tensor([1.0, math.nan, 1.0])
    options = {"sample_weight": of_rows, "penalty": of_rows}
    if call == "softmax":
        value = al.margin_softmax_loss(*given, margin=torch.cos, scale=8.0 * of_rows, **options)
    else:
        value = al.one_vs_rest_loss(
            *given,
            **options,
            positive=lambda theta: theta.square(),
            negative=lambda cosine, bias: cosine.square(),
        )
    value.backward()
    assert value.isfinite()
    assert weight.grad.isfinite().all()
    assert not embeddings.grad[1].any()


NARROW = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]


@pytest.mark.parametrize("name", ["ArcFace", "KappaFace", "UniFace"])
@pytest.mark.parametrize("dtype", NARROW)
def test_labels_of_every_integer_type(name, dtype):
    embeddings, labels = batch(2)
    loss, reference = build(name), build(name)
    assert torch.equal(loss(embeddings, labels.to(dtype)), reference(embeddings, labels))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_narrow_labels_do_not_wrap_around(backend):
    """156 is -100 in 8 bits, 259 is 3, and 200 and 300 classes are more than int8 counts."""
    torch.compiler.reset()
    embeddings, labels = torch.randn(2, SIZE), torch.tensor([156, 3])
    for classes, ignore_index in ((200, -100), (300, 259)):
        loss = al.ArcFaceLoss(classes, SIZE, reduction="none", ignore_index=ignore_index)
        call = loss if backend is None else torch.compile(loss, backend=backend, fullgraph=True)
        expected = loss(embeddings, labels)
        assert expected.count_nonzero() == 2
        assert torch.equal(call(embeddings, labels.to(torch.uint8)), expected)
        small = torch.tensor([100, -100], dtype=torch.int8)
        if ignore_index == -100:
            assert loss(embeddings, small)[1] == 0
            assert loss(embeddings, small)[0] > 0


@every_loss
def test_tensors_without_values(name):
    place = NAMES.index(name)
    row, mode = FAMILY[place], ("dense", "stash", "recompute")[place % 3]

    def run(device):
        with torch.device(device):
            loss = row.build(CLASSES, SIZE, mode=mode).train()
            embeddings = torch.randn(5, SIZE, requires_grad=True)
            for _ in range(2):
                loss(embeddings, torch.zeros(5, dtype=torch.int64)).backward()
        assert embeddings.grad.shape == embeddings.shape
        assert loss.weight.grad.shape == loss.weight.shape

    with in_chunks_of(3):
        run("meta")
        with FakeTensorMode(allow_non_fake_inputs=True):
            run("cpu")


@pytest.mark.parametrize(
    "build",
    [
        lambda: al.KappaFaceLoss(CLASSES, SIZE, torch.ones(CLASSES)),
        lambda: al.ArcFaceLoss(CLASSES, SIZE, margin=torch.rand(CLASSES)),
    ],
)
def test_settings_without_values(build):
    with torch.device("meta"):
        loss = build()
        loss(torch.randn(5, SIZE), torch.zeros(5, dtype=torch.int64)).backward()
    for _ in range(21):  # nor does the warning of forgotten centres read any
        loss(torch.randn(5, SIZE, device="meta"), torch.zeros(5, device="meta").long()).backward()


def test_a_schedule_is_where_the_loss_is_made():
    with FakeTensorMode():
        loss = al.ArcFaceLoss(CLASSES, SIZE, schedule=al.MarginWarmup(3), device="cuda")
    assert loss.schedule.step.device == loss.weight.device
    assert al.ArcFaceLoss(3, 4, schedule=al.MarginWarmup(3), device="meta").schedule.step == 0


def test_labels_on_a_device_without_assertions(monkeypatch):
    def no_kernel(*_):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_assert_async", no_kernel)
    loss, embeddings = al.ArcFaceLoss(CLASSES, SIZE), torch.randn(2, SIZE)
    compiled = torch.compile(loss, backend="eager")
    with pytest.raises(NotImplementedError):
        compiled(embeddings, torch.tensor([0, 1]))
    torch.compiler.reset()
    monkeypatch.setattr(validation, "_WITHOUT_ASSERT", ("cpu",))
    assert compiled(embeddings, torch.tensor([0, 1])).isfinite()
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 7\)"):
        loss(embeddings, torch.tensor([0, CLASSES]))


@pytest.mark.parametrize("mode", ["stash", "recompute", "dense"])
@pytest.mark.parametrize("name", ["ArcFace", "UniFace", "L-Softmax"])
def test_float64_embeddings_with_float32_centres(name, mode):
    loss, reference = (build(name, "none", mode=mode).eval() for _ in range(2))
    loss.float()
    for one, other in zip(reference.parameters(), loss.parameters(), strict=True):
        one.data.copy_(other.data)
    embeddings, labels = batch(3)
    assert torch.allclose(loss(embeddings, labels), reference(embeddings, labels), rtol=1e-13)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), (embeddings,))


class Unpacked:
    def __init__(self):
        self.times = 0

    def __call__(self, tensor):
        self.times += 1
        return tensor


@pytest.mark.parametrize("name", ["ArcFace", "SphereFace2-C", "UniFace"])
def test_saved_tensors_are_unpacked_once(name):
    packed, unpacked = Unpacked(), Unpacked()
    loss = build(name, mode="stash")
    with torch.autograd.graph.saved_tensors_hooks(packed, unpacked):
        loss(*batch(0)).backward()
    assert 0 < unpacked.times <= packed.times


@pytest.mark.parametrize("is_native", [False, True])
def test_processors_without_bfloat16(monkeypatch, is_native):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_native)
    embeddings, weight = torch.randn(2, 4), torch.randn(5000, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = modes.choose(checked(embeddings, weight, torch.zeros(2).long()), "auto", None)
    assert chosen.product_dtype == (torch.bfloat16 if is_native else torch.float32)


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_nearest_classes_despite_rounding(kind, monkeypatch):
    """At least k are penalised in each row; not fewer because two products round otherwise."""
    monkeypatch.setattr(modes, "_multiplies_bfloat16", lambda device: True)
    penalised = []

    def counted(cosine, threshold, m, *, angular):
        penalised.append((cosine >= threshold).sum(0))
        return cosine

    monkeypatch.setattr(al.negatives, "nearest_penalty", counted)
    torch.manual_seed(0)
    loss = al.InterTopKLoss(5000, 32, kind=kind, k=3)
    labels = torch.arange(16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss(torch.randn(16, 32), labels)
    assert sum(penalised).min() >= 3


@pytest.mark.parametrize("weights", ["sample", "class", "ignored", "several"])
def test_the_default_device_does_not_matter(weights):
    with torch.device("meta"):
        class_weight = [1.0] * CLASSES if weights == "class" else None
        loss = al.ArcFaceLoss(CLASSES, SIZE, device="cpu", class_weight=class_weight)
    embeddings, labels = torch.randn(4, SIZE), torch.tensor([0, 1, 2, 0])
    if weights == "ignored":
        labels[0] = loss.ignore_index
    if weights == "several":
        labels = torch.stack([labels, labels + 1], 1)
    sample_weight = torch.rand(4) if weights == "sample" else None
    expected = loss(embeddings, labels, sample_weight)
    with torch.device("meta"):
        assert torch.equal(loss(embeddings, labels, sample_weight), expected)


def test_losses_in_several_threads():
    interval, errors = sys.getswitchinterval(), []

    def train():
        loss = al.ArcFaceLoss(CLASSES, SIZE, schedule=al.MarginWarmup(10**6))
        embeddings, labels = torch.randn(4, SIZE, requires_grad=True), torch.tensor([0, 1, 2, 0])
        try:
            for _ in range(50):
                values = [checkpoint(loss, embeddings, labels, use_reentrant=False) for _ in "1234"]
                sum(values).backward()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    sys.setswitchinterval(1e-5)
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


class OfLengths(al.MarginLoss):
    """A loss of which all depends on 1 / the lengths of the embeddings."""

    def row_target(self, embeddings, labels):
        inverse = 1 / embeddings.norm(dim=1)
        return lambda theta, share: torch.cos(theta) - 0.1 * share * inverse

    def row_scale(self, embeddings):
        return 8 / embeddings.norm(dim=1)

    def penalty(self, embeddings):
        return 1 / embeddings.norm(dim=1)


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_what_is_computed_of_ignored_rows_does_not_matter(mode):
    loss = OfLengths(CLASSES, SIZE, 8.0, mode=mode)
    embeddings, labels = torch.randn(4, SIZE, requires_grad=True), torch.tensor([0, -100, 2, 0])
    found = torch.autograd.grad(loss(embeddings, labels), [embeddings, loss.weight])
    kept = labels != -100
    fewer = torch.autograd.grad(loss(embeddings[kept], labels[kept]), [embeddings, loss.weight])
    torch.testing.assert_close(found, fewer)
