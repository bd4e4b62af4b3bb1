"""Losses of a user's own: the statistics that they register, and what is said of their mistakes."""

import pytest
import torch

import angular_losses as al
from angular_losses import distributed
from tests.processes import Processes

SIZE, CLASSES = 6, 5


class Counting(al.MarginLoss):
    """A margin that grows with the number of rows seen of a class."""

    def __init__(self, num_classes, embedding_size, scale=8.0, **options):
        super().__init__(num_classes, embedding_size, scale, **options)
        self.register_statistic("steps", 2.0)
        self.register_statistic("seen", 0.5, per_class=True)

    def observe(self, embeddings, labels, weights):
        self.steps += 1
        each = torch.ones(len(labels)) if weights is None else weights
        self.seen.index_add_(0, labels, each.to(self.seen.dtype))

    def row_target(self, embeddings, labels):
        seen = self.seen.index_select(0, labels)
        return lambda theta, share: torch.cos(theta) - 0.01 * share * seen


def batch():
    torch.manual_seed(0)
    return torch.randn(6, SIZE), torch.tensor([0, 1, 2, 3, 4, 1])


def test_a_statistic_is_a_buffer_with_a_first_value():
    loss = Counting(CLASSES, SIZE, dtype=torch.float16)
    assert loss.statistics == ("steps", "seen")
    assert al.MarginLoss.statistics == ()
    assert repr(loss) == "Counting(5, 6, scale=8.0)"
    assert (loss.steps.dtype, loss.steps.shape) == (torch.float32, ())
    loss.float()(*batch())
    assert {"steps", "seen"} <= loss.state_dict().keys()
    assert loss.steps == 3
    assert loss.seen.tolist() == [1.5, 2.5, 1.5, 1.5, 1.5]
    loss.reset_parameters()
    assert loss.steps == 2
    assert loss.seen.tolist() == [0.5] * 5


def test_a_statistic_is_made_where_the_centres_are():
    loss = Counting(CLASSES, SIZE, device="meta")
    assert loss.steps.is_meta
    assert loss.seen.is_meta
    loss.to_empty(device="cpu").reset_parameters()
    assert loss.seen.tolist() == [0.5] * 5


def test_a_registered_statistic_is_listed_once():
    class Declared(Counting):
        statistics = ("seen", "norms")

        def __init__(self):
            super().__init__(CLASSES, SIZE)
            self.register_buffer("norms", torch.zeros(7))

    loss = Declared()
    loss(*batch())
    assert loss.statistics == ("seen", "norms", "steps")
    loss.extend(2)
    assert loss.norms.shape == (7,)  # of classes or not, it is the user's


def test_new_classes_have_the_first_value_of_a_statistic():
    loss = Counting(CLASSES, SIZE)
    embeddings, labels = batch()
    loss(embeddings, labels)
    loss.extend(2)
    assert loss.steps == 3
    assert loss.seen.tolist() == [1.5, 2.5, 1.5, 1.5, 1.5, 0.5, 0.5]
    loss(embeddings, labels + 2)
    assert loss.seen.tolist() == [1.5, 2.5, 2.5, 3.5, 2.5, 1.5, 1.5]


def test_a_margin_that_is_a_number_is_no_margin_of_classes():
    class Following(al.MarginLoss):
        def __init__(self):
            super().__init__(CLASSES, SIZE, 8.0)
            self.register_statistic("margin", 0.1)

        def target(self, theta, share):
            return torch.cos(theta) - share * self.margin

    loss = Following()
    loss.extend(2)
    assert loss.margin.shape == ()


def _seen(mesh):
    loss = distributed.shard(Counting(CLASSES, SIZE), mesh)
    embeddings, labels = batch()
    mine = slice(0, 4) if mesh.get_rank() == 0 else slice(4, 6)
    loss(embeddings[mine], labels[mine])
    loss.extend(2)
    return loss.seen.tolist()


def test_statistics_of_a_sharded_loss_are_those_of_all_rows():
    processes = Processes(2)
    try:
        assert processes.run(_seen, 2) == [[1.5, 2.5, 1.5, 1.5, 1.5, 0.5, 0.5]] * 2
    finally:
        processes.close()


class Misnamed(Counting):
    statistics = ("mean_cosin",)


class WithoutFunction(al.MarginLoss):
    def row_target(self, embeddings, labels):
        pass


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            Misnamed(CLASSES, SIZE),
            ValueError,
            "statistics: expected the names of buffers, got 'mean_cosin'",
        ),
        (
            WithoutFunction(CLASSES, SIZE, 8.0),
            TypeError,
            "row_target: expected a function of theta and share, got None",
        ),
    ],
)
def test_mistakes_are_named(loss, error, message):
    with pytest.raises(error, match=message):
        loss(*batch())
