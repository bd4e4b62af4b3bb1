"""Suggested scales and margins, mean directions of classes, parameter groups of an optimiser."""

import math

import numpy as np
import pytest
import torch

import angular_losses as al
from tests.batches import batch, rows_of


class TestScale:
    def test_suggested_scale_gives_the_probability_it_promises(self):
        for num_classes in (3, 1000, 10**6):
            for probability in (0.5, 0.9, 0.99):
                scale = al.suggest_scale(num_classes, probability)
                cosine = torch.full((num_classes,), 0.0, dtype=torch.float64)
                cosine[0] = 0.5**0.5
                found = (scale * cosine).softmax(0)[0].item()
                assert found == pytest.approx(probability, rel=1e-9) or scale == 1.0

    def test_adacos_starts_from_it(self):
        assert al.AdaCosLoss(500, 4).scale.item() == pytest.approx(al.suggest_scale(500))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((2,), "num_classes: expected at least 3"),
            ((10, 0.0), "target_probability: expected a number above 0"),
            ((10, 1.0), r"target_probability: expected a number in \[0, 1\)"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            al.suggest_scale(*arguments)


class TestMargin:
    @pytest.mark.parametrize(("num_classes", "size"), [(2, 5), (6, 5), (9, 6), (7, 2)])
    @pytest.mark.parametrize("kind", ["arc", "cos"])
    def test_best_centres_satisfy_it_up_to_a_third_of_their_angle(self, num_classes, size, kind):
        """On arrangements that reach the bound: simplex, cross-polytope, polygon."""
        if num_classes <= size + 1:
            points = torch.eye(num_classes, dtype=torch.float64)
            centres = points - points.mean(0)
        elif size == 2:
            turns = 2 * math.pi / num_classes * torch.arange(num_classes, dtype=torch.float64)
            centres = torch.stack([turns.cos(), turns.sin()], 1)
        else:
            centres = torch.cat([torch.eye(size), -torch.eye(size)]).double()
        between = torch.acos(torch.cosine_similarity(centres[:1], centres[1:])).min().item()
        margin = al.suggest_margin(num_classes, size, kind=kind)
        for radius, sign in ((between / 3 - 1e-6, 1), (between / 3 + 1e-6, -1)):
            if kind == "arc":
                left = between - radius - (radius + margin)
            else:
                left = math.cos(radius) - margin - math.cos(between - radius)
            assert sign * left > 0

    def test_usual_margins_are_those_of_many_dimensions(self):
        assert al.suggest_margin(10_000, 512) == pytest.approx(0.5, abs=0.02)
        assert al.suggest_margin(10_000, 512, kind="cos") == pytest.approx(0.35, abs=0.015)

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((1, 8), {}, "num_classes: expected at least 2"),
            ((10, 0), {}, "embedding_size: expected at least 1"),
            ((10, 8), {"kind": "sphere"}, "kind: expected one of 'arc', 'cos'"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            al.suggest_margin(*arguments, **options)


class TestParameterGroups:
    def test_every_parameter_is_in_one_group(self):
        network, loss = torch.nn.Linear(4, 8), al.SphereFace2Loss(5, 8)
        both = torch.nn.ModuleDict({"network": network, "loss": loss})
        for modules in ((network, loss), (both,), (loss, both, network)):
            first, second = al.parameter_groups(
                *modules, lr=0.1, weight_decay=0.5, lr_of_losses=1.0
            )
            assert {id(p) for p in first["params"]} == {id(p) for p in network.parameters()}
            assert {id(p) for p in second["params"]} == {id(p) for p in loss.parameters()}
            assert len(first["params"]) == len(second["params"]) == 2
            assert (first["lr"], first["weight_decay"]) == (0.1, 0.5)
            assert (second["lr"], second["weight_decay"]) == (1.0, 0.0)

    def test_the_network_decays_and_the_centres_do_not(self):
        network, loss = torch.nn.Linear(4, 8), al.ArcFaceLoss(5, 8)
        groups = al.parameter_groups(network, loss, lr=0.1, weight_decay=0.5)
        weights = [network.weight, loss.weight]
        before = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        torch.optim.SGD(groups).step()
        assert torch.allclose(network.weight, 0.95 * before[0])
        assert torch.equal(loss.weight, before[1])

    @pytest.mark.parametrize(
        ("modules", "options", "error", "message"),
        [
            (([],), {}, TypeError, "modules: expected torch.nn.Modules"),
            ((torch.nn.Linear(2, 2),), {}, ValueError, "modules: expected a loss"),
            ((al.ArcFaceLoss(3, 2),), {"lr": -1.0}, ValueError, "lr: "),
            ((al.ArcFaceLoss(3, 2),), {"weight_decay": -1.0}, ValueError, "weight_decay: "),
            ((al.ArcFaceLoss(3, 2),), {"lr_of_losses": "1"}, TypeError, "lr_of_losses: "),
        ],
    )
    def test_bad_arguments_are_named(self, modules, options, error, message):
        with pytest.raises(error, match=message):
            al.parameter_groups(*modules, **{"lr": 0.1, **options})


WITHOUT = "ignore:batches. no samples of 1 of 5 classes .3.:UserWarning"


class TestMeanDirections:
    @pytest.mark.filterwarnings(WITHOUT)
    @pytest.mark.parametrize("size", [7, 60])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_they_are_those_of_all_rows_in_any_batches(self, size, dtype):
        embeddings, labels = rows_of()
        embeddings = embeddings.to(dtype)
        labels[5] = -100
        batches = zip(embeddings.split(size), labels.split(size), strict=True)
        found = al.mean_directions(batches, 5)
        expected = np.zeros((5, 8))
        for row, label in zip(embeddings.double().numpy(), labels.tolist(), strict=True):
            if label >= 0:
                expected[label] += row / np.linalg.norm(row)
        expected[[0, 1, 2, 4]] /= np.linalg.norm(expected, axis=1, keepdims=True)[[0, 1, 2, 4]]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)

    def test_classes_without_samples_are_named_and_drawn(self):
        with pytest.warns(
            UserWarning, match=r"^batches: no samples of 1 of 5 classes \(3\)"
        ) as said:
            found = al.mean_directions([rows_of()], 5)
        assert said[0].filename == __file__
        assert not found[3].any()
        loss = al.ArcFaceLoss(5, 8)
        loss.reset_parameters(found)
        assert torch.allclose(loss.weight[[0, 1, 2, 4]], found[[0, 1, 2, 4]])
        assert loss.weight[3].norm().item() == pytest.approx(1)

    def test_no_gradient_is_kept_and_none_is_needed(self):
        network = torch.nn.Linear(8, 8)
        points, labels = batch()
        seen = []

        def batches():
            seen.append(network(points))
            yield seen[0], labels

        assert not al.mean_directions(batches(), 5).requires_grad
        assert not seen[0].requires_grad

    def test_sub_centers_are_clusters_of_a_class(self):
        """Two or three groups a class, of unequal sizes, well apart; one row alone is a cluster."""
        generator = torch.Generator().manual_seed(1)
        groups = torch.nn.functional.normalize(torch.eye(9) + 0.01)
        group = torch.tensor([0] * 20 + [1] * 5 + [2] + [3] * 9 + [4] * 9 + [5] * 4)
        rows = groups[group] + 0.05 * torch.randn(len(group), 9, generator=generator)
        order = torch.randperm(len(group), generator=generator)
        rows, group = rows[order], group[order]
        found = al.mean_directions(
            zip(rows.split(10), (group // 3).split(10), strict=True), 2, sub_centers=3
        )
        for one in (0, 1):
            expected = al.mean_directions([(rows, group)], 6)[3 * one : 3 * one + 3]
            cosine = expected @ found.view(2, 3, 9)[one].T
            assert torch.allclose(cosine.amax(1), torch.ones(3), atol=1e-6)
            assert sorted(cosine.argmax(1).tolist()) == [0, 1, 2]

    def test_sub_centers_without_rows_are_zero(self):
        embeddings = torch.eye(4)[:3]
        with pytest.warns(UserWarning, match="classes .2.; "):
            found = al.mean_directions(
                [(embeddings, torch.tensor([0, 1, 1]))], 3, sub_centers=2
            ).view(3, 2, 4)
        assert found.any(2).sum(1).tolist() == [1, 2, 0]
        assert found.sum((0, 1)).tolist() == [1, 1, 1, 0]

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], ValueError, "batches: expected at least one, got none"),
            ([(torch.ones(2, 4), torch.tensor([0, 3]))], ValueError, r"labels: .*\[0, 3\).*got 3"),
            ([(torch.ones(2, 4), torch.ones(2))], TypeError, "labels: expected an integer"),
            ([(torch.ones(2), torch.tensor([0, 1]))], ValueError, "embeddings: expected shape"),
            (
                [(torch.ones(1, size), torch.tensor([0])) for size in (4, 6)],
                ValueError,
                r"embeddings: expected shape \(N, 4\)",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, batches, error, message):
        with pytest.raises(error, match=message):
            al.mean_directions(batches, 3)


def test_clusters_under_autocast():
    torch.manual_seed(0)
    angle = math.radians(4)
    rows = torch.zeros(40, 16)
    rows[:20, 0] = 1
    rows[20:, :2] = torch.tensor([math.cos(angle), math.sin(angle)])
    rows += 0.002 * torch.randn_like(rows)
    batches = [(rows, torch.zeros(40, dtype=torch.int64))]
    with torch.autocast("cpu", torch.bfloat16):
        first, second = al.mean_directions(batches, 1, sub_centers=2)
    found = al.angle_between(first, second).item()
    assert found == pytest.approx(angle, rel=0.02)


def test_clusters_of_no_rows():
    with pytest.warns(UserWarning, match="no samples of 3"):
        found = al.mean_directions(
            [(torch.zeros(2, 4), torch.tensor([-100, -100]))], 3, sub_centers=2
        )
    assert found.shape == (6, 4)
    assert not found.any()
