"""A training step moves schedule and statistics once: checkpointed, compiled, mixed, validated."""

import contextlib
import copy
import math
import pickle
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from tests.family import CLASSES, FAMILY, NAMES

SIZE = 6
SCHEDULES = {
    "none": lambda: None,
    "warm-up": lambda: al.MarginWarmup(3),
    "annealing": lambda: al.LambdaAnnealing(base=3.0, gamma=1.0, minimum=0.5),
}
ADAPTIVE = ("AdaCos", "AdaFace", "CurricularFace", "KappaFace")


def refuses_schedules(row):
    refusing = ("Circle", "SphereFace-R-v2", "SphereFace-R-v2-soft", "SphereFace-R-detached")
    return row.name in refusing


def build(name, schedule="warm-up", **options):
    row = FAMILY[NAMES.index(name)]
    if not refuses_schedules(row):
        options["schedule"] = SCHEDULES[schedule]()
    torch.manual_seed(0)
    loss = row.build(CLASSES, SIZE, dtype=torch.float64, **options).train()
    if hasattr(loss, "momentum"):
        loss.momentum = 0.3  # so that what moves is seen to move
    return loss


def batch(seed, num_rows=8):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (num_rows,), generator=generator)


def state(loss):
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def step(loss, seed, call=None, batch=batch):
    """The loss of a batch and its gradients; the same random draws for the same seed."""
    torch.manual_seed(seed)
    embeddings, labels = batch(seed)
    value = (loss if call is None else call)(embeddings, labels)
    value.backward()
    gradients = [embeddings.grad, *(parameter.grad for parameter in loss.parameters())]
    loss.zero_grad()
    return [value.detach(), *gradients]


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_same_state(loss, other):
    torch.testing.assert_close(state(loss), state(other))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpointed_step_is_one_step(name, schedule):
    if schedule == "none" and name not in ADAPTIVE:
        pytest.skip("nothing moves")
    plain = build(name, schedule)
    for use_reentrant in (False, True):
        loss, reference = copy.deepcopy(plain), copy.deepcopy(plain)
        for seed in range(3):

            def checkpointed(*given, loss=loss, reentrant=use_reentrant):
                return checkpoint(loss, *given, use_reentrant=reentrant)

            found, expected = step(loss, seed, checkpointed), step(reference, seed)
            # Reentrant checkpointing returns what its first pass found, under no_grad: the
            # statistics had not moved by then.
            first = 1 if use_reentrant and loss.statistics else 0
            assert_same(found[first:], expected[first:])
            assert_same_state(loss, reference)


@pytest.mark.parametrize("name", [*ADAPTIVE, "ArcFace"])
def test_two_reentrant_passes_before_a_backward_pass_are_two_steps(name):
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
def test_passes_of_the_same_step_use_its_state_and_move_none(name, schedule):
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
def test_statistics_of_a_loss_in_half_precision_are_those_in_full(name):
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
def test_settings_changed_before_the_backward_pass_change_nothing(name, mode):
    loss = build(name, mode=mode)
    value = loss(*batch(0))
    (expected,) = torch.autograd.grad(value, loss.weight, retain_graph=True)
    for key, setting in vars(loss).items():
        if isinstance(setting, float):
            setattr(loss, key, setting + 0.3)
    (found,) = torch.autograd.grad(value, loss.weight)
    assert torch.equal(found, expected)


def awkward(seed):
    """A batch with a row that is ignored, in which there is NaN, and labels in 16 bits."""
    embeddings, labels = batch(seed)
    labels[3] = -100
    with torch.no_grad():
        embeddings[3] = math.nan
    return embeddings, labels.to(torch.int16)


def compiled_alike(name, schedule, backend, dynamic, steps, batch=awkward, **tolerance):
    torch.compiler.reset()
    loss, reference = build(name, schedule), build(name, schedule)
    compiled = torch.compile(loss, backend=backend, dynamic=dynamic)
    for seed in range(steps):
        found = step(loss, seed, compiled, batch)
        assert_same(found, step(reference, seed, reference, batch), **tolerance)
        assert_same_state(loss, reference)


ONE_OF_A_CLASS = {
    type(row.build(CLASSES, SIZE)): row.name
    for row in reversed(FAMILY)
    if "Elastic" not in row.name
}


# The compiler looks at .grad of what crosses a gap in the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", sorted(ONE_OF_A_CLASS.values()))
def test_compiled_steps_are_those_of_eager_mode(name):
    compiled_alike(name, "warm-up", "aot_eager", None, 3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("ArcFace", 0), ("ArcFace", 1), ("AdaCos", 0), ("InterTopK-arc", 0), ("NPCFace", 0)],
)
def test_a_compiled_step_of_no_row_or_one(name, num_rows):
    compiled_alike(name, "annealing", "aot_eager", None, 1, lambda seed: batch(seed, num_rows))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)
@pytest.mark.parametrize(
    ("name", "schedule", "dynamic"),
    [("SphereFace", "warm-up", None), ("AdaFace", "annealing", True)],
)
def test_inductor_too(name, schedule, dynamic):
    compiled_alike(name, schedule, "inductor", dynamic, 5, rtol=1e-6, atol=1e-6)
