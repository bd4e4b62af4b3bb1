import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import angular_losses as al
from angular_losses import diagnostics, margins
from tests import family
from tests.diagnostics.brute_force import batch, brute_force
from tests.processes import Processes

CLASSES, SIZE = 5, 8


def watched(loss=None, **options):
    torch.manual_seed(0)
    return diagnostics.AngularMonitor(loss or al.ArcFaceLoss(CLASSES, SIZE, margin=0.3), **options)


def rows_for(monitor, rows=40, seed=1):
    embeddings, _, labels = batch(rows, CLASSES, SIZE, seed)
    return embeddings + 2 * monitor.loss.weight.detach()[labels * monitor.loss.sub_centers], labels


@pytest.mark.parametrize("ignore", [-100, 2, 255])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_monitor_against_brute_force(sub_centers, ignore):
    options = {"sub_centers": sub_centers, "ignore_index": ignore}
    monitor = watched(al.CosFaceLoss(CLASSES, SIZE, margin=0.2, **options))
    batches = [rows_for(monitor, rows, seed) for rows, seed in ((40, 1), (0, 2), (17, 3))]
    batches[0][1][:3] = ignore
    for embeddings, labels in batches:
        monitor.update(embeddings, labels)
    snapshot = monitor.snapshot()
    embeddings, labels = map(torch.cat, zip(*batches, strict=True))
    embeddings, labels = embeddings[labels != ignore], labels[labels != ignore]
    weight = monitor.loss.weight.detach()
    target, nearest, _ = brute_force(embeddings, weight, labels, sub_centers)
    violated = np.cos(target) - 0.2 <= np.cos(nearest)
    expected = {
        "rows": len(labels),
        "not_finite": 0,
        "classes_seen": len(set(labels.tolist())),
        "target_mean": target.mean(),
        "nearest_mean": nearest.mean(),
        "violation_rate": violated.mean(),
        "error_rate": (target >= nearest).mean(),
        "margin_mean": (np.arccos(np.cos(target) - 0.2) - target).mean(),
    }
    numbers = monitor.summary()
    assert numbers == pytest.approx(snapshot.numbers, nan_ok=True)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < numbers["error_rate"] < numbers["violation_rate"] < 1
    for name, angles in (("target", target), ("nearest", nearest)):
        counts = getattr(snapshot, name)
        assert counts.tolist() == np.histogram(angles, 180, (0, math.pi))[0].tolist()
        assert numbers[f"{name}_median"] == pytest.approx(np.median(angles), abs=math.pi / 90)
    for c in set(labels.tolist()):
        own = labels.numpy() == c
        assert snapshot.rows[c] == own.sum()
        assert snapshot.target_mean[c] == pytest.approx(target[own].mean())
        assert snapshot.violation_rate[c] == pytest.approx(violated[own].mean())


def test_rows_that_are_not_finite_are_counted_apart():
    monitor = watched()
    embeddings, labels = rows_for(monitor)
    monitor.update(embeddings, labels)
    clean = monitor.summary()
    broken = torch.tensor([[torch.nan] * SIZE, [torch.inf] * SIZE, [torch.nan] * SIZE])
    monitor.update(broken, torch.tensor([0, 1, monitor.loss.ignore_index]))
    assert monitor.summary() == pytest.approx({**clean, "not_finite": 2.0}, nan_ok=True)


def test_every_k_th_batch_and_reset():
    monitor = watched(every=3)
    counted = []
    for _ in range(7):
        monitor.update(*rows_for(monitor, 10))
        monitor.update_gradients(torch.ones(CLASSES, SIZE))
        counted.append(monitor.summary()["rows"])
    assert counted == [10, 10, 10, 20, 20, 20, 30]
    assert monitor.summary()["gradient_norm_mean"] == pytest.approx(SIZE**0.5)
    monitor.reset()
    numbers = monitor.summary()
    assert numbers["rows"] == 0
    assert math.isnan(numbers["target_mean"])
    assert math.isnan(numbers["target_median"])
    assert monitor.figures() == {}


def test_the_margin_in_force_is_the_schedules():
    monitor = watched(al.ArcFaceLoss(CLASSES, SIZE, margin=0.4, schedule=al.MarginWarmup(4)))
    with monitor.attach():
        for share in (0, 1, 2, 3, 4, 4):
            monitor.reset()
            monitor.loss(*rows_for(monitor))
            assert monitor.summary()["margin_mean"] == pytest.approx(0.1 * share, abs=1e-7)


def test_an_attached_monitor_measures_training_batches_and_changes_nothing():
    monitor, by_hand = watched(), watched()
    by_hand.loss.load_state_dict(monitor.loss.state_dict())
    for _ in range(2):
        embeddings, labels = rows_for(monitor)
        embeddings.requires_grad_()
        with monitor.attach():
            value = monitor.loss(embeddings, labels=labels)
            value.backward()
            gradient, grad_of_centres = embeddings.grad.clone(), monitor.loss.weight.grad.clone()
            (2 * monitor.loss.eval()(embeddings, labels)).backward()
            monitor.loss.train()
        (2 * monitor.loss(embeddings, labels)).backward()  # detached again
        embeddings.grad = monitor.loss.weight.grad = by_hand.loss.weight.grad = None
        expected = by_hand.loss(embeddings, labels)
        expected.backward()
        by_hand.update(embeddings, labels)
        by_hand.update_gradients(by_hand.loss.weight.grad)
        assert torch.equal(value, expected)
        assert torch.equal(gradient, embeddings.grad)
        assert torch.equal(grad_of_centres, by_hand.loss.weight.grad)
    assert monitor.summary() == by_hand.summary()
    norms = monitor.snapshot().gradient_norm
    assert torch.allclose(norms.float(), grad_of_centres.norm(dim=1))
    assert list(monitor.loss.state_dict()) == ["weight"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_batch_that_is_recomputed_counts_once(use_reentrant):
    monitor = watched()
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        embeddings.requires_grad_()
        checkpoint(monitor.loss, embeddings, labels, use_reentrant=use_reentrant).backward()
    assert monitor.summary()["rows"] == len(labels)


@pytest.mark.parametrize("row", family.FAMILY, ids=family.NAMES)
def test_every_loss_can_be_watched(row):
    monitor = watched(row.build(family.CLASSES, SIZE))
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        monitor.loss(embeddings.requires_grad_(), labels).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == len(labels)
    assert all(math.isfinite(number) for number in numbers.values())
    assert 0 <= numbers["violation_rate"] <= 1


def test_several_labels_count_once_each():
    monitor, single = watched(), watched()
    embeddings, labels = rows_for(monitor)
    labels = torch.stack([labels, (labels + 1) % CLASSES], 1)
    labels[:4, 1] = -100
    with monitor.attach():
        monitor.loss(embeddings, labels)
    for of_rows in labels.T:
        single.update(embeddings, of_rows)
    assert monitor.summary() == pytest.approx(single.summary(), nan_ok=True)
    assert monitor.summary()["rows"] == 2 * len(labels) - 4


def test_mixed_rows_count_once_for_each_of_their_labels():
    monitor, single = watched(), watched()
    embeddings, labels = rows_for(monitor)
    others = (labels + 1) % CLASSES
    with monitor.attach():
        monitor.loss(embeddings, labels, other_labels=others, lam=0.1)
        with pytest.raises(ValueError, match="lam: expected it beside"):
            monitor.loss(embeddings, labels, other_labels=others)
    for of_rows in (labels, others):
        single.update(embeddings, of_rows)
    assert monitor.summary() == pytest.approx(single.summary(), nan_ok=True)


def test_frozen_centres_are_watched_without_their_gradient():
    monitor = watched()
    monitor.loss.weight.requires_grad_(False)
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        monitor.loss(embeddings.requires_grad_(), labels).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == len(labels)
    assert math.isnan(numbers["gradient_norm_mean"])


def test_a_window_begun_in_inference_mode_goes_on_outside():
    monitor = watched()
    with torch.inference_mode():
        monitor.update(*rows_for(monitor))
    monitor.update(*rows_for(monitor))
    assert monitor.summary()["rows"] == 80


def test_new_classes_begin_a_new_window():
    monitor = watched()
    monitor.update(*rows_for(monitor))
    monitor.loss.extend(2)
    assert monitor.summary()["rows"] == 0
    monitor.update(torch.randn(3, SIZE), torch.tensor([0, CLASSES, CLASSES + 1]))
    assert monitor.snapshot().rows.tolist() == [1, 0, 0, 0, 0, 1, 1]


def test_an_attached_monitor_measures_the_gradient_of_new_classes():
    monitor = watched()
    embeddings, labels = rows_for(monitor)
    with monitor.attach():
        monitor.loss(embeddings, labels).backward()
        old = monitor.loss.weight
        monitor.loss.extend(2)
        monitor.loss(embeddings, labels).backward()
        norms = monitor.loss.weight.grad.norm(dim=1)
        assert torch.allclose(monitor.snapshot().gradient_norm.float(), norms)
    assert not old._backward_hooks
    assert not monitor.loss.weight._backward_hooks


@pytest.mark.parametrize("plus", [False, True])
def test_random_margins_are_those_of_the_pass(plus, monkeypatch):
    """The monitor leaves the random numbers to the loss, and measures the draws to come."""
    loss = al.ElasticFaceLoss(CLASSES, SIZE, plus=plus, deviation=0.1)
    monitor, drawn = watched(loss), []
    embeddings, labels = rows_for(monitor)
    torch.manual_seed(5)
    expected = loss(embeddings, labels)
    additive = margins.additive
    monkeypatch.setattr(margins, "additive", lambda kind, m: drawn.append(m) or additive(kind, m))
    torch.manual_seed(5)
    with monitor.attach():
        assert torch.equal(loss(embeddings, labels), expected)
    assert torch.equal(drawn[0], drawn[-1])
    assert monitor.summary()["margin_mean"] == pytest.approx(drawn[0].mean().item(), rel=1e-6)


def test_lengths_of_centres_are_no_part_of_the_margin():
    monitor, angular = watched(al.LSoftmaxLoss(CLASSES, SIZE, margin=2)), watched()
    with torch.no_grad():
        monitor.loss.weight.mul_(torch.linspace(0.5, 5, CLASSES)[:, None])
    angular.loss = al.SphereFaceLoss(CLASSES, SIZE, margin=2)
    angular.loss.weight = monitor.loss.weight
    embeddings, labels = rows_for(monitor)
    for each in (monitor, angular):
        each.update(embeddings, labels)
    assert monitor.summary() == pytest.approx(angular.summary(), nan_ok=True)


def test_updates_never_need_a_value():
    # A meta tensor has none: whatever asks for one, or for a size that depends on one, raises.
    loss = al.ArcFaceLoss(CLASSES, SIZE, schedule=al.LambdaAnnealing(), device="meta")
    loss.schedule.to("meta")
    monitor = watched(loss)
    embeddings = torch.randn(9, SIZE, device="meta")
    monitor.update(embeddings, torch.zeros(9, dtype=torch.int64, device="meta"))
    monitor.update_gradients(torch.zeros(CLASSES, SIZE, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        monitor.summary()


def test_only_measured_batches_cost_a_product():
    monitor = watched(every=2)
    with FlopCounterMode(display=False) as counter:
        monitor.update(*rows_for(monitor, 30))
    assert counter.get_total_flops() == 2 * 30 * CLASSES * SIZE
    with FlopCounterMode(display=False) as counter:
        monitor.update(*rows_for(monitor, 30))
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="its compiler fails on the hook")
def test_compiled_losses_are_watched_too():
    monitor = watched(every=2)
    with monitor.attach():
        compiled = torch.compile(monitor.loss, backend="eager")
        for _ in range(4):
            compiled(*rows_for(monitor, 10)).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == 20
    assert numbers["gradient_norm_mean"] > 0


def test_the_centres_are_compared_on_demand():
    monitor = watched()
    monitor.loss.weight.data[1] = monitor.loss.weight.data[0] * 2
    monitor.loss.weight.data[4] = 0
    numbers = monitor.summary(centres=True)
    assert numbers["separation_min"] == pytest.approx(0, abs=1e-7)
    assert numbers["separation_bound"] == diagnostics.separation_bound(CLASSES, SIZE)
    assert (numbers["collapsed_pairs"], numbers["without_direction"]) == (1, 1)


class Writer:
    def __init__(self):
        self.scalars, self.histograms, self.drawn = {}, {}, {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        self.histograms[tag, step] = values

    def add_figure(self, tag, figure, step):
        self.drawn[tag, step] = figure


def test_log():
    monitor, writer = watched(), Writer()
    monitor.update(*rows_for(monitor))
    monitor.update_gradients(torch.ones(CLASSES, SIZE))
    summary = monitor.summary(centres=True)
    snapshot = monitor.snapshot()
    assert monitor.log(7, writer, centres=True, figures=True) == {"step": 7.0, **summary}
    assert writer.scalars == {(f"angular/{name}", 7): value for name, value in summary.items()}
    values = writer.histograms["angular/target_degrees", 7]
    assert torch.equal(torch.histc(values, 180, 0, 180), snapshot.target.float())
    assert [tag for tag, _ in writer.drawn] == ["angular/angles", "angular/gradient_norms"]
    assert monitor.summary()["rows"] == 0
    only_scalars = mock.Mock(spec=["add_scalar"])
    monitor.update(*rows_for(monitor))
    monitor.log(8, only_scalars, figures=True)
    monitor.log(9)
    assert [numbers["step"] for numbers in monitor.history] == [7.0, 8.0, 9.0]
    with pytest.raises(TypeError, match="writer: expected an object with add_scalar"):
        monitor.log(10, object())


def summaries(mesh):
    """Of one's own rows their number, and of those of all ranks everything."""
    monitor, rank = watched(), mesh.get_rank()
    monitor.update(*rows_for(monitor, 10 + rank, seed=rank))
    monitor.update_gradients(torch.full((CLASSES, SIZE), 1.0 + rank))
    own = monitor.summary(across_ranks=False)["rows"]
    both = monitor.summary()
    assert both == monitor.summary()
    return own, list(both.values())


def test_sums_of_all_ranks():
    processes = Processes(2)
    own, numbers = zip(*processes.run(summaries, 2), strict=True)
    processes.close()
    assert own == (10, 11)
    alone = watched()
    for rank in range(2):
        alone.update(*rows_for(alone, 10 + rank, seed=rank))
        alone.update_gradients(torch.full((CLASSES, SIZE), 1.0 + rank))
    for found in numbers:
        assert found == pytest.approx(list(alone.summary().values()))


def separations(mesh):
    from torch.distributed.fsdp import fully_shard

    monitor = watched()
    whole = monitor.summary(centres=True)
    fully_shard(monitor.loss, mesh=mesh)
    with monitor.attach():
        monitor.loss(*rows_for(watched())).backward()
    sharded = monitor.summary(centres=True)
    return [(sharded[name], whole[name]) for name in ("separation_min", "collapsed_pairs")]


def test_the_separation_under_fully_shard():
    processes = Processes(2)
    found = processes.run(separations, 2)
    processes.close()
    for of_rank in found:
        assert all(sharded == whole for sharded, whole in of_rank)


ONES, LABELS = torch.ones(2, 3), torch.zeros(2).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.AngularMonitor(torch.nn.Linear(1, 1)), TypeError, "loss:"),
        (lambda: diagnostics.AngularMonitor(al.ArcFaceLoss(1, 2)), ValueError, "loss:"),
        (lambda: watched(every=0), ValueError, "every:"),
        (lambda: watched().update(ONES, LABELS), ValueError, "embeddings: expected shape"),
        (lambda: watched().update_gradients(ONES), ValueError, "gradient:"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
