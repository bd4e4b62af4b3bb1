"""Classes shared between processes give the loss and the gradients of one process."""

import functools

import pytest
import torch

import angular_losses as al
from tests.distributed import scenarios as sharding
from tests.processes import Processes

MODES = ["dense", "stash", "recompute"]
SIZES = {1: (12,), 2: (9, 3), 3: (5, 0, 7), 4: (2, 6, 3, 1)}
# One loss of each way of summing over the classes.
KINDS = [
    *("ArcFace", "SubCenterArcFace", "L-Softmax", "SphereFace", "MV-arc-fixed", "NPCFace"),
    *("SphereFace2-C", "UniFace", "P2SGrad"),
]


def too_large(answers, tolerance):
    return {
        (rank, *case, name): error
        for rank, answer in enumerate(answers)
        for case, errors in answer.items()
        for name, error in errors.items()
        if not error <= tolerance
    }


@pytest.mark.parametrize(
    ("world", "dtype", "names"),
    [
        (1, torch.float64, KINDS),
        (2, torch.float32, [*sharding.ROWS]),
        (3, torch.float64, [*sharding.ROWS]),  # one of the ranks has no rows
        (4, torch.float64, KINDS),
    ],
)
def test_every_loss_is_that_of_one_process(processes, world, dtype, names):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-6}[dtype]
    answers = processes.run(sharding.errors_of_family, world, names, dtype, MODES, SIZES[world])
    assert not too_large(answers, tolerance)


@pytest.mark.parametrize("world", [2, 4])
def test_several_chunks_of_classes_are_those_of_one_process(processes, world):
    answers = processes.run(
        sharding.errors_in_chunks, world, KINDS, torch.float64, MODES[1:], SIZES[world]
    )
    assert not too_large(answers, 1e-10)


def test_weights_of_rows_have_the_gradients_of_one_process(processes):
    assert max(map(max, processes.run(sharding.errors_of_weights, 2))) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_number_of_bytes(processes, dtype):
    for world in (1, 2):
        assert all(processes.run(sharding.odd_rows, world, dtype))


def test_more_ranks_than_classes(processes):
    answers = processes.run(
        sharding.errors_of_family, 4, KINDS, torch.float64, MODES, (3, 3, 3, 3), 2
    )
    assert not too_large(answers, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"class_weight": torch.linspace(0.2, 2.0, 7)},
        {"ignore_index": 3},
        {"ignore_index": 3, "reduction": "none", "label_smoothing": 0.2},
        {"gradient": "detached"},
        {"memory_budget": 50_000},
        {"scale": 2000.0},
    ],
    ids=str,
)
def test_options_are_those_of_one_process(processes, options):
    names = ["ArcFace", "SubCenterArcFace", *(each for each in sharding.ROWS if "MV" in each)]
    answers = processes.run(
        sharding.errors_of_family, 3, names, torch.float64, MODES, (5, 0, 7), **options
    )
    assert not too_large(answers, 1e-10)


def test_training_mode_is_that_of_one_process(processes):
    """Running statistics too, of all rows; ElasticFace alone draws at random."""
    names = [name for name in sharding.ROWS if not name.startswith("Elastic")]
    answers = processes.run(
        sharding.errors_of_family, 4, names, torch.float64, ["auto"], (5, 0, 4, 3), train=True
    )
    assert not too_large(answers, 1e-6)  # statistics are kept in float32


def linear_negatives(*sizes, **options):
    return al.MVSoftmaxLoss(*sizes, **options)


# Each collective after the first travels during a product.
OVERLAPPED = (
    *("all_reduce", "multiply", "all_reduce ends"),
    *("_reduce_scatter", "multiply", "_reduce_scatter ends"),
)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_messages_of_a_step(processes, world):
    rows = 4
    for calls in processes.run(sharding.calls_of_a_step, world, al.ArcFaceLoss, rows):
        assert [name for name, _ in calls] == ["_all_gather", *OVERLAPPED]
        shapes = dict(calls)
        assert shapes["all_reduce"] == (2, rows * world)
        assert shapes["_reduce_scatter"] == (rows * world, sharding.SIZE)


def test_messages_of_reweighted_negatives(processes):
    for calls in processes.run(sharding.calls_of_a_step, 2, linear_negatives, 4):
        first = "_all_gather", "all_reduce", "all_reduce ends", "all_reduce"
        assert [name for name, _ in calls] == [*first, *OVERLAPPED]


def test_no_matrix_of_all_logits(processes):
    classes, rows, world = 20_000, 64, 2
    peaks = processes.run(
        sharding.peak_of_a_step, world, classes, rows, memory_budget=2**21, mode="recompute"
    )
    gradient = classes // world * sharding.SIZE * 4
    matrix = rows * world * classes // world * 4
    assert max(peaks) < gradient + 2**21 + 2**19 < matrix


@pytest.mark.parametrize(
    ("world", "backbone", "build", "accumulate"),
    [
        (2, "ddp", al.ArcFaceLoss, 1),
        (2, "fsdp", al.ArcFaceLoss, 1),
        (1, "alone", al.SubCenterArcFaceLoss, 1),
        (2, "ddp", al.CurricularFaceLoss, 2),
        (2, "ddp", al.MagFaceLoss, 1),
    ],
)
def test_twenty_steps_are_those_of_one_process(processes, world, backbone, build, accumulate):
    answers = processes.run(sharding.training, world, backbone, build, accumulate=accumulate)
    for error, (first, last) in answers:
        assert error <= 1e-6
        assert last < 0.7 * first


@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_precision_training_loop(processes, compiled):
    answers = processes.run(sharding.mixed_training, 2, compiled)
    (losses, scale, weights), (others, other_scale, other_weights) = answers
    assert losses == others
    assert scale == other_scale > 2.0**10
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(*pair) for pair in zip(weights, other_weights, strict=True))


GOOD = torch.ones(2, sharding.SIZE), torch.tensor([0, 9])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ((GOOD[0], torch.tensor([0, 10])), "ValueError", "labels: expected values in [0, 10)"),
        ((GOOD[0], torch.tensor([0])), "ValueError", "labels: expected shape (2,)"),
        ((GOOD[0].int(), GOOD[1]), "TypeError", "embeddings: expected a floating-point tensor"),
        ((torch.ones(2, 5), GOOD[1]), "ValueError", "embeddings: expected shape (N, 6)"),
        ((torch.ones(5, sharding.SIZE), torch.zeros(5).long()), "ValueError", "batch_size 4"),
        ((GOOD[0], [0, 9]), "TypeError", "labels: expected an integer tensor, got [0, 9]"),
        ((*GOOD, torch.ones(3)), "ValueError", "sample_weight: expected shape (2,)"),
    ],
)
def test_bad_batch_on_one_rank(processes, bad, kind, message):
    answers = processes.run(sharding.refusals, 3, [GOOD, bad, GOOD], GOOD)
    errors = [error for error, _ in answers]
    assert errors[1].startswith(f"{kind}: ")
    assert message in errors[1]
    for error in (errors[0], errors[2]):
        assert error.startswith("ValueError: ")
        assert message in error
        assert error.endswith("(rank 1's batch)")
    assert len({loss for _, loss in answers}) == 1


@pytest.mark.parametrize(
    "other",
    [
        (GOOD[0].double(), GOOD[1]),
        (*GOOD, torch.ones(2)),
        (torch.ones(0, sharding.SIZE).requires_grad_(), GOOD[1][:0]),
    ],
    ids=["dtype", "sample_weight", "gradient"],
)
def test_batches_of_different_kinds_are_refused(processes, other):
    answers = processes.run(sharding.refusals, 2, [GOOD, other], GOOD)
    assert all("expected one dtype on all ranks" in error for error, _ in answers)


def test_dead_rank():
    processes = Processes(2)
    told, nothing = processes.run(sharding.alone_after_a_death, 2, timeout=20.0)
    processes.close()
    assert nothing is None
    assert told.startswith("sharded: the other ranks could not be reached")


def test_missing_rank(processes, tmp_path):
    told, _ = processes.run(sharding.alone_while_another_waits, 2, tmp_path / "told")
    assert "did not come within the process group's timeout" in told


@pytest.mark.parametrize("optimizer", sharding.OPTIMIZERS)
@pytest.mark.parametrize("sub_centers", [1, 2])
def test_only_the_rows_sampled_move(processes, optimizer, sub_centers):
    answers = processes.run(sharding.rows_that_move, 2, optimizer, sub_centers=sub_centers)
    for steps in answers:
        for step in steps:
            rows = [row * sub_centers + k for row in step["sampled"] for k in range(sub_centers)]
            assert step["rows of gradient"] == step["moved"] == rows
            assert set(step["state"]) <= set(rows)
            assert set(step["targets"]) <= set(step["sampled"])
            assert len(step["sampled"]) == max(4, len(set(step["targets"])))  # 0.2 of 20
            assert step["bytes"] == len(rows) * sharding.SIZE * 8
        assert len({tuple(step["sampled"]) for step in steps}) == len(steps)
    of_ranks = [[step["sampled"] for step in steps] for steps in answers]
    assert of_ranks[0] != of_ranks[1]
    assert answers == processes.run(sharding.rows_that_move, 2, optimizer, sub_centers=sub_centers)


def test_ranks_sample_by_chances_of_their_own(processes):
    with_target, without = processes.run(sharding.sample_of_one_label, 2)
    assert len(with_target) == len(without) == 10
    assert with_target[0] == 0
    assert not set(with_target[1:]) <= set(without)


@pytest.mark.parametrize("optimizer", sharding.OPTIMIZERS)
def test_sample_of_all_classes(processes, optimizer):
    for is_sparse, is_equal in processes.run(sharding.sampled_against_dense, 2, optimizer):
        assert is_sparse
        assert is_equal


def test_momentum_of_sampled_rows(processes):
    assert max(processes.run(sharding.momentum_by_hand, 2)) <= 1e-12


def test_gradients_of_different_samples_add_up(processes):
    assert max(processes.run(sharding.accumulated_samples, 2)) <= 1e-12


@pytest.mark.parametrize(
    ("optimizer", "options", "numbers"),
    [
        ("sgd", {}, (3, "whole")),
        ("adamw", {}, (1, 2, 3, 4, "whole")),
        ("adamw", {"sub_centers": 3}, (2, 3, "whole")),
    ],
    ids=["sgd", "adamw", "sub-centres"],
)
def test_loading_on_another_number_of_ranks(processes, tmp_path, optimizer, options, numbers):
    def run(work, number, folder):
        world, is_sharded = (1, False) if number == "whole" else (number, True)
        return processes.run(work, world, folder, is_sharded, optimizer, **options)

    folders = [str(tmp_path / str(saved)) for saved in numbers]
    expected = [
        run(sharding.train_and_save, saved, folder)[0]
        for saved, folder in zip(numbers, folders, strict=True)
    ]
    for loaded in (1, 3, 4, "whole"):
        for of_rank in run(sharding.load_each, loaded, folders):
            for found, wanted in zip(of_rank, expected, strict=True):
                assert found == pytest.approx(wanted, rel=1e-12)


def test_sampling_resumes(processes, tmp_path):
    arguments = str(tmp_path), True, "adamw"
    expected = processes.run(sharding.train_and_save, 2, *arguments, rate=0.3)
    assert processes.run(sharding.load_and_train, 2, *arguments, rate=0.3) == expected


def test_rank_that_dies_while_saving(processes, tmp_path):
    mortal = Processes(2)
    told, nothing = mortal.run(sharding.die_while_saving, 2, str(tmp_path), timeout=5.0)
    mortal.close()
    assert nothing is None
    assert told != "saved"
    first = processes.run(sharding.load_and_train, 2, str(tmp_path), True, "adamw")
    assert first == processes.run(sharding.train_and_save, 2, str(tmp_path), True, "adamw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000003", "current"]


@pytest.mark.parametrize(("batch_size", "num_labels"), [(None, 2), (8, 3)])
def test_mixed_rows_and_weights_of_rows(processes, batch_size, num_labels):
    assert max(processes.run(sharding.mixed_rows, 3, batch_size, num_labels)) <= 1e-10


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_random_margins_are_the_same_on_every_rank(processes, kind):
    build = functools.partial(al.ElasticFaceLoss, kind=kind, plus=True)
    (losses, is_restored), *others = processes.run(sharding.drawn_margins, 3, build)
    assert all(other == (losses, True) for other in others)
    assert is_restored
    assert losses[0] != losses[1]


def test_centres_are_drawn_where_they_stay(processes):
    draws = processes.run(sharding.drawn_centres, 3, 1000, seed=5)
    assert [len(centres) for centres in draws] == [334, 334, 332]
    centres = torch.cat(draws)
    assert len(centres.unique(dim=0)) == 1000
    assert centres.std().item() == pytest.approx(64**-0.5, rel=0.02)
    again = processes.run(sharding.drawn_centres, 3, 1000, seed=5)
    assert torch.equal(centres, torch.cat(again))
    assert not torch.equal(draws[0], processes.run(sharding.drawn_centres, 3, 1000, seed=6)[0])


@pytest.mark.parametrize("classes_over_all", [True, False])
def test_a_mesh_of_two_dimensions(processes, classes_over_all):
    assert max(processes.run(sharding.two_dimensions, 4, classes_over_all)) <= 1e-10


def test_unshard_and_what_is_rejected(processes):
    expected = [
        "RuntimeError: init: expected an unsharded loss, use unshard(loss)",
        "RuntimeError: drop_sub_centers: expected an unsharded loss, use unshard(loss)",
        "TypeError: loss: expected an unsharded loss, got a sharded one",
        "TypeError: loss: expected a sharded one, got SubCenterArcFaceLoss",
        "TypeError: loss: expected a sharded one, got SubCenterArcFaceLoss",
        "ValueError: optimizer: expected it to hold the weight of the loss",
        "TypeError: loss: expected a loss of this package, got Linear(",
        "ValueError: backbone: expected one of 'exact', 'ddp', got 'fsdp'",
        "ValueError: sample_rate: expected a number in [0, 1], got -0.1",
        "ValueError: batch_size: expected at least 1, got 0",
        "ValueError: sample_rate: expected 1 for P2SGradLoss, which is a sum over all classes",
        "ValueError: sample_rate: expected 1 with label smoothing",
        "ValueError: loss: its t has values, and cannot be on the meta device",
        "ValueError: loss: its bias has values, and cannot be on the meta device",
        "TypeError: seed: expected an int, got 1.5",
        "ValueError: mesh: expected a DeviceMesh of one dimension, such as mesh['classes'], got D",
        "ValueError: mesh: expected a DeviceMesh of one dimension, such as mesh['classes'], got N",
        "TypeError: loss: expected an unsharded loss, use unshard(loss)",
    ]
    for is_plain, has_its_centres, told in processes.run(sharding.whole_again, 2):
        assert is_plain
        assert has_its_centres
        for found, start in zip(told, expected, strict=True):
            assert found.startswith(start)


def test_ranks_draw_their_own_centres_anew(processes):
    answers = processes.run(sharding.drawn_anew, 2)
    for first, second in answers:
        assert torch.equal(first, answers[0][0])
        assert not (first == second).any()
        assert len(first.unique()) == first.numel()
