"""Warnings of likely mistakes: given where they apply, once, and nowhere else."""

import functools
import warnings

import pytest
import torch

import angular_losses as al
from angular_losses.losses.usage_warnings import FORGOTTEN_AFTER
from tests.batches import batch
from tests.family import FAMILY


class TestScale:
    def test_a_scale_too_small_for_the_classes_is_warned_of(self):
        with pytest.warns(UserWarning, match=r"scale: 8 is small for 100000 classes.*13\.7"):
            al.ArcFaceLoss(100_000, 1, scale=8.0)
        al.ArcFaceLoss(100_000, 1, scale=14.0)
        al.SphereFaceLoss(100_000, 1, scale=None)
        al.P2SGradLoss(100_000, 1)

    def test_the_warning_is_right_about_the_best_of_all_centres(self):
        """On a regular simplex, where the others' cosine is -1 / (C - 1)."""
        num_classes = 50
        least = 49 / 50 * torch.tensor(9.0 * 49).log().item()
        others = torch.full((num_classes - 1,), -1 / (num_classes - 1))
        cosine = torch.cat([torch.ones(1), others])
        assert (least * cosine).softmax(0)[0].item() == pytest.approx(0.9, abs=1e-6)


class TestUnitVectors:
    LOSSES = (
        al.AdaFaceLoss,
        al.MagFaceLoss,
        al.LSoftmaxLoss,
        functools.partial(al.SphereFaceLoss, scale=None),
        functools.partial(al.SphereFaceRLoss, normalization="soft"),
    )

    @pytest.mark.parametrize("build", LOSSES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_warning_says_so_once(self, build, dtype):
        loss, (points, labels) = build(5, 8), batch()
        unit = torch.nn.functional.normalize(points).to(dtype)
        labels = labels.clone()
        labels[0] = loss.ignore_index
        with pytest.warns(UserWarning, match="embeddings: all have length 1, and ") as said:
            loss(torch.cat([points[:1].to(dtype), unit[1:]]), labels)
        assert said[0].filename == __file__
        loss(unit, labels)

    @pytest.mark.parametrize("build", [*LOSSES, al.ArcFaceLoss, al.SphereFaceLoss])
    @pytest.mark.parametrize("quiet", ["lengths", "eval", "no graph", "no rows"])
    def test_no_warning_where_there_is_no_reason(self, build, quiet):
        loss, (points, labels) = build(5, 8).train(quiet != "eval"), batch()
        if quiet != "lengths" or build in (al.ArcFaceLoss, al.SphereFaceLoss):
            points = torch.nn.functional.normalize(points)
        rows = 0 if quiet == "no rows" else 12
        with torch.set_grad_enabled(quiet != "no graph"):
            loss(points[:rows], labels[:rows])


class TestForgottenParameters:
    @staticmethod
    def train(loss, network, optimiser, steps, *, accumulate=1):
        for step in range(steps):
            points, labels = batch(step)
            loss(network(points), labels).backward()
            if (step + 1) % accumulate == 0:
                optimiser.step()
                optimiser.zero_grad()

    # The compiler looks at .grad of what enters a graph.
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_warning_says_so_once(self, compiled):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        called = torch.compile(loss, backend="aot_eager") if compiled else loss
        self.train(called, network, optimiser, FORGOTTEN_AFTER)
        with pytest.warns(UserWarning, match=r"weight: .*parameter_groups") as said:
            self.train(called, network, optimiser, 1)
        assert said[0].filename == __file__
        self.train(called, network, optimiser, 2 * FORGOTTEN_AFTER)

    def test_no_accumulation_is_too_long(self):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        optimiser = torch.optim.SGD(al.parameter_groups(network, loss, lr=0.1))
        steps = 3 * FORGOTTEN_AFTER
        self.train(loss, network, optimiser, 2 * steps, accumulate=steps)

    def test_the_steps_of_another_model_do_not_count(self):
        loss = al.ArcFaceLoss(5, 8)
        loss(*batch()).backward()
        other, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        optimiser = torch.optim.SGD(al.parameter_groups(network, other, lr=0.1))
        self.train(other, network, optimiser, 2 * FORGOTTEN_AFTER)

    @pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    def test_no_warning_where_the_centres_learn(self, optimiser):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        groups = al.parameter_groups(network, loss, lr=1e-6)
        self.train(loss, network, optimiser(groups), 2 * FORGOTTEN_AFTER, accumulate=16)

    def test_no_warning_where_they_are_changed_unseen_by_autograd(self):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2 * FORGOTTEN_AFTER):
            self.train(loss, network, optimiser, 1)
            loss.weight.data = loss.weight.data * 1.01

    def test_no_warning_where_they_are_parametrised(self):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        torch.nn.utils.parametrizations.weight_norm(loss)
        optimiser = torch.optim.SGD(al.parameter_groups(network, loss, lr=0.1))
        self.train(loss, network, optimiser, 2)

    def test_new_classes_are_watched_anew(self):
        loss, network = al.ArcFaceLoss(5, 8), torch.nn.Linear(8, 8)
        optimiser = torch.optim.SGD(al.parameter_groups(network, loss, lr=0.1))
        self.train(loss, network, optimiser, 3)
        loss.extend(2)
        with pytest.warns(UserWarning, match="weight: "):
            self.train(loss, network, optimiser, FORGOTTEN_AFTER + 1)

    @pytest.mark.parametrize("quiet", ["eval", "frozen", "no graph"])
    def test_no_warning_where_they_are_not_meant_to_learn(self, quiet):
        loss, network = al.ArcFaceLoss(5, 8).train(quiet != "eval"), torch.nn.Linear(8, 8)
        loss.weight.requires_grad_(quiet != "frozen")
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        for step in range(2 * FORGOTTEN_AFTER):
            points, labels = batch(step)
            with torch.set_grad_enabled(quiet != "no graph"):
                value = loss(network(points), labels)
            if quiet != "no graph":
                value.backward()
            optimiser.step()


def test_no_loss_warns_with_its_defaults():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in FAMILY:
            row.build(7, 8)
