"""Sharded losses in the middle of real trainings: wrappers, clipping, interrupts, replicas."""

import math

import pytest
import torch

import angular_losses as al
from angular_losses.distributed import clip_grad_norm_
from tests.distributed import trainings


@pytest.mark.parametrize(
    "how",
    [
        "ddp, network",
        "ddp, both but the centres",
        "fully_shard, network",
        "fully_shard, both but the centres",
    ],
)
def test_training_loop_as_one_process(processes, tmp_path, how):
    for max_norm in (None, 0.1):
        arguments = how, str(tmp_path), max_norm
        assert max(processes.run(trainings.training, 2, *arguments)) <= 1e-10


def test_clipped_with_sampled_classes(processes, tmp_path):
    arguments = "ddp, network", str(tmp_path), 0.1
    errors = processes.run(trainings.training, 2, *arguments, sample_rate=0.999)
    assert max(errors) <= 1e-10
    assert max(processes.run(trainings.norm_of_sampled, 3)) <= 1e-10


def test_an_infinite_norm_clips_nothing():
    network = torch.nn.Linear(2, 1, bias=False)
    network(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert clip_grad_norm_(network, math.inf) == 5
    assert network.weight.grad.tolist() == [[3.0, 4.0]]
    network.weight.grad[0, 0] = math.inf
    assert clip_grad_norm_(network, math.inf) == math.inf
    assert network.weight.grad.tolist() == [[math.inf, 4.0]]
    with pytest.raises(ValueError, match="max_norm: "):
        clip_grad_norm_(network, -math.inf)


def test_sub_centres_saved_in_a_wrapper(processes, tmp_path):
    assert all(processes.run(trainings.sub_centres_saved_in_a_wrapper, 2, str(tmp_path)))


def test_overflow_on_one_rank(processes):
    assert processes.run(trainings.overflow_on_one_rank, 2) == [(True, 1.0)] * 2


@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ("ddp, both", "_ddp_params_and_buffers_to_ignore = ['loss.weight']"),
        ("fully_shard, both", "fully_shard(module, ignored_params={loss.weight})"),
    ],
)
def test_wrappers_of_the_centres_are_refused(processes, how, advice):
    for told in processes.run(trainings.refused_wrapper, 2, how):
        assert told.startswith("RuntimeError: ")
        assert advice in told


def test_statistics_over_the_mesh(processes):
    assert max(processes.run(trainings.statistics_of_some_ranks, 4)) <= 1e-6


@pytest.mark.parametrize(("classes", "sub_centers"), [(13, 1), (2, 2)])
def test_gathered_directions_are_kept_by_class(processes, tmp_path, classes, sub_centers):
    before = None
    for world, sizes in ((1, (12,)), (3, (5, 0, 7)), (4, (2, 6, 3, 1)), (2, (9, 3))):
        folder = str(tmp_path / str(world))
        arguments = classes, sub_centers, before, folder, sizes
        assert all(processes.run(trainings.gathered_directions, world, *arguments))
        before = folder


@pytest.mark.parametrize("kind", [al.ArcFaceLoss, al.MagFaceLoss, al.CurricularFaceLoss])
def test_ignored_rows_that_are_not_finite(processes, kind):
    assert all(processes.run(trainings.ignored_rows, 2, kind))


def test_a_budget_is_too_small_on_all_ranks(processes):
    (first, value), *others = processes.run(trainings.one_budget, 3, timeout=20.0)
    assert first.startswith("ValueError: memory_budget: expected at least")
    assert others == [(first, value)] * 2


def test_labels_on_another_device(processes):
    for told, _ in processes.run(trainings.labels_elsewhere, 2, timeout=20.0):
        assert told.startswith("ValueError: labels: expected device cpu")


def test_uneven_numbers_of_batches(processes):
    assert max(processes.run(trainings.uneven_numbers, 2, timeout=20.0)) <= 1e-10


@pytest.mark.parametrize("sub_centers", [1, 2])
def test_sampled_classes_are_positives_and_the_rate(processes, sub_centers):
    labels = [0, 3, 3, 21, 39]
    for rate, extra in ((0.0, 0), (0.05, 0), (0.3, 6)):
        found = processes.run(trainings.sampled_classes, 2, rate, labels, sub_centers=sub_centers)
        for (sampled, is_right), positives in zip(found, ({0, 3}, {1, 19}), strict=True):
            assert is_right
            assert positives <= set(sampled)
            assert len(sampled) == max(extra, 2)
    found = processes.run(trainings.sampled_classes, 2, 0.0, [0], sub_centers=sub_centers)
    assert found == [([0], True), ([], True)]


@pytest.mark.parametrize("build", [al.ArcFaceLoss, al.AdaFaceLoss, al.CurricularFaceLoss])
def test_replicas_as_one_process(processes, build):
    assert max(processes.run(trainings.replicas, 4, build, 1.0, (3, 3, 4, 2))) <= 1e-6


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_replicas_of_other_rows_and_weights(processes, is_weighted, reentrant):
    arguments, options = [al.ArcFaceLoss, 1.0, (5, 4, 1, 2)], {"reentrant": reentrant}
    if is_weighted:
        arguments.append(torch.linspace(0.0, 2.0, 12))
        options["class_weight"] = torch.linspace(0.2, 3.0, trainings.CLASSES)
    assert max(processes.run(trainings.replicas, 4, *arguments, **options)) <= 1e-6


@pytest.mark.parametrize(
    ("rate", "row_weight", "reason"),
    [
        (0.5, None, "sparse gradients"),
        (1.0, torch.ones(12, requires_grad=True), "sample_weight: expected none that needs"),
    ],
)
def test_replicas_that_are_refused(processes, rate, row_weight, reason):
    arguments = al.ArcFaceLoss, rate, (3, 3, 3, 3), row_weight
    for told in processes.run(trainings.refused_replicas, 4, *arguments, timeout=20.0):
        assert told.startswith("RuntimeError: ")
        assert reason in told


def test_sampled_classes_in_replicas_are_refused(processes):
    for told in processes.run(trainings.refused_sampling, 2):
        assert told.startswith("RuntimeError: DistributedDataParallel: expected it without sampled")


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_momentum_is_loaded_by_an_optimiser_without(processes, tmp_path, rate):
    folder = str(tmp_path)
    assert max(processes.run(trainings.loaded_momentum, 2, folder, rate)) <= 1e-12


@pytest.mark.parametrize(("build", "rate"), [(al.ArcFaceLoss, 0.3), (al.ElasticFaceLoss, 1.0)])
def test_checkpointed_steps_draw_as_they_did(processes, build, rate):
    assert max(processes.run(trainings.pending_steps, 2, build, rate)) <= 1e-9


def test_another_call_on_a_rank_is_refused(processes):
    for told in processes.run(trainings.other_calls, 2, timeout=20.0):
        assert all(", the same call, " in each for each in told)


def test_evaluations_do_not_enlarge_messages(processes):
    for before, evaluation, after in processes.run(trainings.messages_after_an_evaluation, 2):
        assert before == after
        assert len(before) == len(evaluation) == 1


def test_weights_of_one_rank_may_need_gradients(processes):
    assert processes.run(trainings.weights_of_one_rank, 2) == [True, False]


def test_copies_and_averages(processes):
    assert processes.run(trainings.copies, 2) == [(True, True, True, True)] * 2


def test_refused_optimizers(processes):
    for *unprepared, rprop, adafactor in processes.run(trainings.refused_optimizers, 2):
        for each in unprepared:
            assert each.startswith("RuntimeError: optimizer: expected it to be prepared")
        assert rprop.startswith("TypeError: optimizer: expected one that can begin with a row")
        assert adafactor.startswith("TypeError: optimizer: expected an element-wise one")


def test_unprepared_optimizers_are_not_saved(processes, tmp_path):
    for told in processes.run(trainings.refused_saves, 2, str(tmp_path)):
        assert told[1::2] == ["nothing"] * 2
        for each in told[::2]:
            assert each.startswith("RuntimeError: save: rank 0 failed: RuntimeError: optimizer: ")


@pytest.mark.parametrize("sub_centers", [1, 2])
def test_optimizer_prepared_twice(processes, tmp_path, sub_centers):
    assert all(processes.run(trainings.prepared_twice, 2, str(tmp_path), sub_centers))


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_full_states_of_torch(processes, sub_centers):
    answers = processes.run(trainings.full_states, 2, sub_centers, timeout=20.0)
    assert answers == [(True,) * 4] * 2


def test_fully_shard_of_uneven_sub_centres_is_saved(processes, tmp_path):
    answers = processes.run(trainings.uneven_sub_centres, 2, str(tmp_path), timeout=20.0)
    assert answers == [(True,) * 3] * 2


def test_assigned_centres_are_those_of_a_rank_alone(processes):
    assert processes.run(trainings.assigned, 2) == [0, 0]


def test_steps_around_sampled_rows(processes, tmp_path):
    folder = str(tmp_path)
    for values, is_same, told in processes.run(trainings.steps_around_sampled_rows, 2, folder):
        assert values == ["interrupted"]
        assert is_same
        assert "weight: expected" in told
        assert told.startswith("RuntimeError: save: rank 0 failed: RuntimeError")


def test_failure_of_one_rank_while_saving(processes, tmp_path):
    for of_zero, of_one in processes.run(trainings.failing_saves, 2, str(tmp_path), timeout=20.0):
        assert of_zero.startswith("RuntimeError: save: rank 0 failed: OSError")
        assert of_one.startswith("RuntimeError: save: rank 1 failed: OSError")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("world", "sizes"), [(1, (5,)), (2, (4, 1)), (4, (2, 0, 3, 1))])
def test_logits_and_new_classes(processes, world, sizes):
    for sub_centers in (1, 2):
        answers = processes.run(trainings.logits, world, sub_centers, sizes)
        assert max(error for error, _ in answers) <= 1e-10
        rows = [rows for _, (rows, _) in answers]
        assert sum(rows) == 16 * sub_centers
        assert rows[0] == -(-16 // world) * sub_centers
