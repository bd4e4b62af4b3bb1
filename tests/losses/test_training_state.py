"""A training step moves schedule and statistics once: checkpointed, compiled, mixed, validated."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from angular_losses.losses import state as states
from tests.cases import in_chunks_of
from tests.family import CLASSES
from tests.steps import (
    ADAPTIVE,
    SCHEDULES,
    SIZE,
    assert_same,
    assert_same_state,
    batch,
    build,
    state,
    step,
)

needs_hooks_in_force = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="needs torch 2.8"
)


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace"])
def test_two_reentrant_passes_are_two_steps(name):
    loss = build(name)
    first, second = (checkpoint(loss, *batch(seed), use_reentrant=True) for seed in (0, 1))
    assert loss.schedule.step == 0
    (first + second).backward()
    assert loss.schedule.step == 2


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace", "SphereFace2-C", "ElasticFace-arc"])
def test_a_pass_without_gradients_moves_nothing(name):
    loss = build(name)
    step(loss, 0)
    before = state(loss)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            loss(*batch(1))
    torch.testing.assert_close(state(loss), before)
    reference = build(name)
    assert_same(step(loss, 2), [step(reference, 0), step(reference, 2)][1])


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace"])
def test_a_frozen_network_trains_centres(name):
    loss = build(name)
    embeddings, labels = batch(0)
    loss(embeddings.detach(), labels)
    assert loss.schedule.step == 1
    step(reference := build(name), 0)
    assert_same_state(loss, reference)


@pytest.mark.parametrize("schedule", ["warm-up", "annealing"])
@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace", "SphereFace2-C"])
def test_same_step(name, schedule):
    loss, reference = build(name, schedule), build(name, schedule)
    for seed in range(3):
        expected = step(reference, seed)
        assert_same(step(loss, seed), expected)
        with loss.same_step():
            assert_same(step(loss, seed), expected)
            step(loss, seed + 10)
        assert_same_state(loss, reference)
    with loss.same_step(), contextlib.suppress(ValueError):
        loss(torch.zeros(2, SIZE), torch.tensor([0, CLASSES]))
    step(loss, 3)
    assert loss.schedule.step == 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace", "SphereFace2-C", "Li-ArcFace"])
@pytest.mark.parametrize("order", ["together", "forwards", "backwards"])
def test_recomputed_passes_use_their_own_state(name, schedule, order):
    loss, reference = build(name, schedule), build(name, schedule)
    weighted = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def network(embeddings, labels, loss=loss):  # the loss may be anywhere inside
        return weighted * loss(embeddings.tanh().exp(), labels).square()

    def gradients_of(call):
        batches = [batch(seed) for seed in range(4)]
        values = [call(*given) for given in batches]
        if order == "together":
            sum(values).backward()
        else:
            for value in values if order == "forwards" else reversed(values):
                value.backward()
        return [embeddings.grad for embeddings, _ in batches]

    found = gradients_of(lambda *given: checkpoint(network, *given, use_reentrant=False))
    expected = gradients_of(lambda *given: network(*given, loss=reference))
    assert_same(found, expected)
    assert_same_state(loss, reference)


def passes_of(loss):
    return [each for each in states._passes if each.loss() is loss]


def test_a_pass_is_forgotten_with_its_graph():
    loss = build("AdaFace")
    value = checkpoint(loss, *batch(0), use_reentrant=False)
    assert len(passes_of(loss)) == 1
    value.backward()
    del value
    assert not passes_of(loss)


def test_a_failed_batch_leaves_the_buffers_in_place():
    loss = build("CurricularFace")
    t, steps = loss.t, loss.schedule.step
    with pytest.raises(ValueError, match="sample_weight: expected shape"):
        loss(*batch(0), torch.ones(3))
    assert loss.t is t
    assert loss.schedule.step is steps
    assert steps == 0
    step(loss, 0)
    assert loss.t is t  # moved in place: whoever holds it sees it move
    assert loss.schedule.step is steps


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace"])
def test_state_is_copied_and_saved(name):
    loss = build(name)
    step(loss, 0)
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), build(name)]
    twins[2].load_state_dict(loss.state_dict())
    expected = step(loss, 1)
    for twin in twins:
        assert_same(step(twin, 1), expected)
        assert_same_state(twin, loss)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_statistics_see_both_labels_of_a_mixed_row(name):
    loss, reference = build(name), build(name)
    embeddings, labels = batch(0)
    others = (labels + 1) % CLASSES
    value = loss(embeddings, others, other_labels=labels, lam=0.0)
    assert torch.allclose(value, reference(embeddings, labels))
    assert_same_state(loss, reference)
    # A row of two halves is like the two rows.
    halves, rows = build(name), build(name)
    halves(embeddings, labels, other_labels=others, lam=0.5)
    twice = embeddings.repeat(2, 1), torch.cat([labels, others])
    rows(*twice)
    for key in halves.statistics:
        if key != "deviation":  # unbiased, by the number of rows
            assert torch.allclose(getattr(halves, key), getattr(rows, key)), key
    if name == "KappaFace":
        assert torch.allclose(2 * halves.direction_sums, rows.direction_sums)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_statistics_in_half_precision(name):
    full, half = build(name).float(), build(name).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    for seed in range(15):
        embeddings, labels = batch(seed)
        rounded = embeddings.detach().bfloat16()
        full(rounded.float(), labels)
        half(rounded, labels)
    for key, buffer in half.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), key
        torch.testing.assert_close(buffer, full.get_buffer(key), rtol=1e-2, atol=1e-2)


def test_a_loss_takes_a_copy_of_its_schedule():
    schedule = al.MarginWarmup(10)
    first, second = (al.ArcFaceLoss(CLASSES, SIZE, schedule=schedule) for _ in range(2))
    first(torch.randn(4, SIZE), torch.arange(4))
    assert (first.schedule.step, second.schedule.step, schedule.step) == (1, 0, 0)


SETTINGS = ("Circle", "SphereFace2-C", "SphereFace2-A", "NPCFace", "SphereFace-R-v2", "UniFace")
SETTINGS += ("MV-arc-adaptive", "InterTopK-cos", "CurricularFace", "L-Softmax", "MagFace")


@pytest.mark.parametrize("mode", ["stash", "recompute"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_changed_before_backward(name, mode):
    loss = build(name, mode=mode)
    value = loss(*batch(0))
    (expected,) = torch.autograd.grad(value, loss.weight, retain_graph=True)
    for key, setting in vars(loss).items():
        if isinstance(setting, float):
            setattr(loss, key, setting + 0.3)
    (found,) = torch.autograd.grad(value, loss.weight)
    assert torch.equal(found, expected)


def test_passes_without_gradients_between_a_checkpoint_and_its_backward():
    torch.manual_seed(0)
    first = al.ArcFaceLoss(4, 6, schedule=al.MarginWarmup(4))
    second = copy.deepcopy(first)
    embeddings, labels = torch.randn(8, 6, requires_grad=True), torch.arange(8) % 4
    values = first(embeddings, labels), checkpoint(second, embeddings, labels, use_reentrant=False)
    gradients = []
    for loss, value in zip((first, second), values, strict=True):
        with torch.no_grad():
            loss(embeddings, labels)  # a metric
        gradients.append(torch.autograd.grad(value.square(), [embeddings])[0])
        assert loss.schedule.step == 1
    torch.testing.assert_close(*gradients)


def test_statistics_get_weights_as_numbers():
    class Counting(al.MarginLoss):
        def __init__(self):
            super().__init__(4, 6, 8.0)
            self.register_statistic("seen", 0.0, per_class=True)

        def target(self, theta, share):
            return theta.cos()

        def observe(self, embeddings, labels, weights):
            each = torch.ones(len(labels)) if weights is None else weights
            self.seen.index_add_(0, labels, each)

    loss = Counting()
    loss(torch.randn(4, 6), torch.tensor([0, 1, 2, -100]))
    assert loss.seen.tolist() == [1.0, 1.0, 1.0, 0.0]


@needs_hooks_in_force
@pytest.mark.parametrize("mode", ["stash", "recompute"])
@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.CurricularFaceLoss, al.SphereFace2Loss])
def test_a_checkpointed_network_runs_twice(cls, mode):
    network, calls = torch.nn.Linear(SIZE, SIZE), []
    network.register_forward_hook(lambda *_: calls.append(1))
    loss, (embeddings, labels) = cls(CLASSES, SIZE, mode=mode), batch(0)
    with in_chunks_of(2):
        value = checkpoint(
            lambda rows: loss(network(rows.float()), labels), embeddings, use_reentrant=False
        )
        assert len(calls) == 1
        value.backward()
    assert len(calls) == 2


@contextlib.contextmanager
def evaluating(loss):
    loss.eval()
    try:
        yield
    finally:
        loss.train()


@needs_hooks_in_force
@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace", "sampled"])
@pytest.mark.parametrize("separately", [False, True])
@pytest.mark.parametrize("before", [None, "without gradients", "evaluation", "detached"])
def test_passes_checkpointed_together_use_their_own_states(name, separately, before):
    """Three passes of which two are recomputed in one go; another one may come before these.

    A factor of them, but in evaluation: that is not recomputed with the state it had.
    """
    found = []
    for checkpointed in (False, True):
        loss = build("ArcFace" if name == "sampled" else name)
        batches = [batch(seed) for seed in range(3)]
        if name == "sampled":
            torch.manual_seed(0)
            loss = al.sample_classes(al.ArcFaceLoss(50, SIZE, dtype=torch.float64), 0.2)
        (first, labels), *others = batches

        def both(*given, loss=loss, batches=batches):
            factor = 1.0
            if before is not None:
                context = {"without gradients": torch.no_grad(), "evaluation": evaluating(loss)}
                with context.get(before, contextlib.nullcontext()):
                    value = loss(given[0], batches[0][1] + 7 * (name == "sampled")).detach()
                factor = 1.0 if before == "evaluation" else value
            return tuple(
                factor * loss(rows, of) for rows, (_, of) in zip(given, batches[1:], strict=True)
            )

        value, rows = loss(first, labels), [each for each, _ in others]
        values = checkpoint(both, *rows, use_reentrant=False) if checkpointed else both(*rows)
        if separately:
            values[0].backward(retain_graph=True)
            values[1].backward()
            value.backward()
        else:
            (value + sum(values)).backward()
        weight = loss.weight.grad
        weight = weight.to_dense() if weight.is_sparse else weight
        found.append([weight, *(embeddings.grad for embeddings, _ in batches)])
        found.append(state(loss))
    assert_same(found[0], found[2])
    torch.testing.assert_close(found[1], found[3])


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_same_step_may_be_checkpointed(name, use_reentrant):
    loss, reference = build(name), build(name)
    for seed in range(2):
        step(loss, seed)
        step(reference, seed)
        for view in (2, 3):
            with loss.same_step():
                value = checkpoint(loss, *batch(view), use_reentrant=use_reentrant)
            value.backward()
    assert_same_state(loss, reference)
    value = checkpoint(loss, *batch(4), use_reentrant=use_reentrant)
    value.backward()
    step(reference, 4)
    assert_same_state(loss, reference)


def change_in_place(cosine, target):
    changed = cosine.exp()
    return changed.add_(1).square_() / 20  # autograd needs what exp returned


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_negatives_that_change_what_they_need_are_refused(mode, checkpointed):
    embeddings, labels = batch(0)
    weight = torch.randn(CLASSES, SIZE, dtype=torch.float64, requires_grad=True)

    def call(rows):
        return al.margin_softmax_loss(
            *(rows, weight, labels),
            margin=torch.cos,
            scale=4.0,
            negatives=change_in_place,
            mode=mode,
        )

    if checkpointed and mode == "dense":  # of which checkpointing keeps no version
        return
    with pytest.raises(RuntimeError, match=r"in.?place"):
        (
            checkpoint(call, embeddings, use_reentrant=False) if checkpointed else call(embeddings)
        ).backward()


def test_hooks_of_saved_tensors_of_any_kind():
    loss, (embeddings, labels) = build("CurricularFace"), batch(0)
    for unpack in (torch.Tensor.clone, lambda saved: saved):
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.clone, unpack):
            loss(embeddings, labels).backward()
        assert not [region for region in states._regions.values() if loss in region]  # nor kept
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        loss(embeddings, labels).backward()
    assert loss.schedule.step == 3
