"""What people trip over: forgotten parameters, small scales, weight decay, export, new classes."""

import collections
import functools
import math
import warnings

import numpy as np
import pytest
import torch

import angular_losses as al
from angular_losses.losses.usage_warnings import FORGOTTEN_AFTER
from tests.family import FAMILY, NAMES


def batch(seed=0, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(12, 8, generator=generator)
    return embeddings.requires_grad_(), torch.randint(num_classes, (12,), generator=generator)


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


class TestOptions:
    """What comes from configuration files, from NumPy, and from other libraries."""

    @pytest.mark.parametrize("of", [list, tuple, collections.deque, np.array, np.float32])
    def test_what_is_kept_for_each_class_comes_in_any_sequence(self, of):
        numbers = [0.25, 0.5, 0.75, 0.125, 1.0]
        kept = torch.tensor(numbers)
        assert torch.equal(al.ArcFaceLoss(5, 8, of(numbers)).margin, kept)
        assert torch.equal(al.CosFaceLoss(5, 8, of(numbers)).margin, kept)
        assert torch.equal(al.ArcFaceLoss(5, 8, class_weight=of(numbers)).class_weight, kept)
        counts = of([1, 2, 3, 4, 5])
        loss = al.KappaFaceLoss(5, 8, counts)
        assert torch.equal(loss.class_counts, torch.arange(1.0, 6))
        assert torch.equal(al.ldam_margins(counts), al.ldam_margins(torch.arange(1, 6)))

    @pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
    def test_sizes_may_be_numpys(self, integer):
        with_numpy = al.SubCenterArcFaceLoss(integer(200), integer(8), sub_centers=integer(3))
        assert with_numpy.weight.shape == (600, 8)
        assert type(with_numpy.num_classes) is type(with_numpy.sub_centers) is int
        assert al.UniFaceLoss(integer(200), 8).bias.item() == pytest.approx(math.log(2000))
        assert al.plan(integer(200), integer(200), 8) == al.plan(200, 200, 8)

    @pytest.mark.parametrize("real", [np.float32, np.float64, np.int64])
    def test_numbers_may_be_numpys(self, real):
        torch.manual_seed(0)
        embeddings, labels = batch()
        losses = [al.SphereFaceLoss(5, 8, kind(2), kind(32)) for kind in (float, real)]
        losses[1].weight.data = losses[0].weight.data
        assert torch.equal(losses[0](embeddings, labels), losses[1](embeddings, labels))
        assert type(losses[1].margin) is type(losses[1].scale) is float

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"marign": 0.5}, "marign: ArcFaceLoss has no such option, expected margin"),
            ({"class_weights": [1.0]}, "class_weights: .*, expected class_weight"),
            ({"s": 64}, "s: .*, expected scale"),
            ({"m": 0.5}, "m: .*, expected margin"),
            ({"easy_margin": True}, "easy_margin: .*, expected beyond"),
            ({"weight": torch.ones(5)}, "weight: .*, expected class_weight"),
            ({"in_features": 8}, "in_features: .*, expected embedding_size"),
            ({"out_features": 8}, "out_features: .*, expected num_classes"),
            ({"xyzzy": 8}, "xyzzy: .*, expected beyond or class_weight or "),
            ({"margin": [0.1, 0.2]}, r"margin: expected shape \(5,\)"),
            ({"margin": [0.1, "a", 0.1, 0.1, 0.1]}, "margin: expected a number, got 'a'"),
            ({"class_weight": "heavy"}, r"class_weight: expected a number for each class \(C,\)"),
            ({"class_weight": 2.0}, r"class_weight: expected a number for each class \(C,\)"),
            ({"scale": np.array([64.0])}, "scale: expected a number, got"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            al.ArcFaceLoss(5, 8, **options)

    def test_the_option_meant_is_one_that_there_is(self):
        with pytest.raises(TypeError, match=r"^easy_margin: CosFaceLoss has .*, expected margin"):
            al.CosFaceLoss(5, 8, easy_margin=True)


class TestWidth:
    @pytest.mark.parametrize(
        ("sizes", "width", "guess"),
        [
            ((7, 5), 7, "logits, or are num_classes 7 and embedding_size 5 exchanged"),
            ((7, 5), 6, ""),
        ],
    )
    @pytest.mark.parametrize("call", ["forward", "get_logits"])
    def test_embeddings_of_another_width_are_named(self, sizes, width, guess, call):
        loss, embeddings = al.ArcFaceLoss(*sizes), torch.randn(4, width)
        arguments = (embeddings, torch.arange(4))[: 1 if call == "get_logits" else 2]
        with pytest.raises(
            ValueError, match=r"^embeddings: expected shape \(N, 5\), .*" + guess
        ) as e:
            getattr(loss, call)(*arguments)
        assert ("exchanged" in str(e.value)) == bool(guess)


every_loss = pytest.mark.parametrize("row", FAMILY, ids=NAMES)


class TestExtend:
    @every_loss
    def test_old_classes_keep_their_numbers_and_new_ones_train(self, row):
        loss = row.build(7, 8)
        embeddings, labels = batch(num_classes=7)
        before, old = loss.get_logits(embeddings), loss.weight.detach().clone()
        loss.extend(2)
        assert loss.num_classes == 9
        assert torch.equal(loss.weight[: len(old)], old)
        assert loss.weight.requires_grad
        after = loss.get_logits(embeddings)
        assert after.shape == (12, 9)
        assert torch.allclose(after[:, :7], before, atol=1e-5)
        value = loss(embeddings, torch.cat([labels[:-2], torch.tensor([7, 8])]))
        value.backward()
        assert value.isfinite()
        assert loss.weight.grad[len(old) :].abs().max() > 0
        assert loss.state_dict().keys() == row.build(7, 8).state_dict().keys()

    @pytest.mark.parametrize("sub_centers", [1, 3])
    def test_new_classes_start_where_they_are_told(self, sub_centers):
        loss = al.ArcFaceLoss(7, 64, sub_centers=sub_centers, class_weight=torch.rand(7))
        with torch.no_grad():
            loss.weight *= 3
        means = torch.randn(2, 64)
        loss.extend(2, init=means)
        assert torch.equal(loss.class_weight[7:], torch.ones(2))
        new = loss.weight.view(9, sub_centers, 64)[7:]
        cosine = torch.cosine_similarity(new, means[:, None], dim=-1)
        assert cosine.min() > (0.98 if sub_centers > 1 else 0.99999)
        assert new.norm(dim=-1).mean().item() == pytest.approx(3.0, rel=0.05)
        if sub_centers > 1:
            assert not torch.equal(new[:, 0], new[:, 1])

    def test_adacos_fixed_scale_is_that_of_all_classes(self):
        loss = al.AdaCosLoss(50, 4, dynamic=False)
        loss.extend(50)
        assert loss.scale.item() == pytest.approx(al.suggest_scale(100))

    def test_margins_of_classes_grow_too(self):
        loss = al.CosFaceLoss(3, 4, margin=al.ldam_margins(torch.tensor([9, 90, 900])))
        loss.extend(1)
        assert loss.margin.shape == (4,)
        assert loss.margin[3] == loss.margin[:3].max()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((0,), ValueError, "num_new: expected at least 1"),
            ((1.5,), TypeError, "num_new: expected an int"),
            ((2, torch.ones(1, 8)), ValueError, r"init: expected shape \(2, 8\), got \(1, 8\)"),
            ((2, "mean"), TypeError, "init: expected a floating-point tensor"),
        ],
    )
    def test_bad_arguments_change_nothing(self, arguments, error, message):
        loss = al.ArcFaceLoss(3, 8)
        weight = loss.weight
        with pytest.raises(error, match=message):
            loss.extend(*arguments)
        assert loss.weight is weight
        assert loss.num_classes == 3


class TestReset:
    @pytest.mark.parametrize("name", al.available())
    def test_all_that_the_constructor_sets_is_set_anew(self, name):
        counts = {"class_counts": [1, 2, 5, 9, 50, 500, 70]} if name == "KappaFaceLoss" else {}
        with torch.device("meta"):
            loss = getattr(al, name)(7, 64, **counts)
        loss.to_empty(device="cpu")
        for values in loss.state_dict().values():
            values.fill_(math.nan)
        loss.reset_parameters()
        found, expected = loss.state_dict(), getattr(al, name)(7, 64, **counts).state_dict()
        drawn = found.pop("weight")
        assert drawn.isfinite().all()
        assert 0.5 < drawn.norm(dim=1).mean() < 1.5
        for state in (found, expected):  # what was given stays, for it is kept nowhere else
            state.pop("class_counts", None)
            state.pop("weight", None)
        torch.testing.assert_close(found, expected)

    def test_the_schedule_begins_anew(self):
        loss = al.ArcFaceLoss(7, 8, schedule=al.MarginWarmup(4))
        loss(*batch(num_classes=7))
        going_on = al.ArcFaceLoss(7, 8, schedule=loss.schedule)
        loss.reset_parameters(torch.randn(7, 8))
        assert loss.schedule.step == going_on.schedule.step == 1
        loss.reset_parameters()
        assert loss.schedule.step == 0

    def test_adacos_has_the_scale_of_all_classes(self):
        loss = al.AdaCosLoss(50, 4)
        loss.extend(50)
        loss.reset_parameters()
        assert loss.scale.item() == pytest.approx(al.suggest_scale(100))


def rows_of(num_classes=5, size=8, num_rows=60, seed=0):
    """Embeddings about directions of their classes, of any length; none of class 3."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    labels[labels == 3] = 2
    means = torch.randn(num_classes, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, size, generator=generator, dtype=torch.float64)
    lengths = 10 * torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    return lengths * (means[labels] + 0.3 * noise), labels


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

    @pytest.mark.parametrize("rows", [1, 2])
    def test_sub_centers_start_where_they_are_told(self, rows):
        loss, init = al.ArcFaceLoss(3, 64, sub_centers=2), torch.randn(3 * rows, 64)
        for start in (loss.reset_parameters, lambda init: loss.extend(3, init)):
            start(init)
            centres = loss.weight[-6:].detach()
            cosine = torch.cosine_similarity(centres, init.repeat_interleave(2 // rows, 0))
            assert cosine.min() > (0.98 if rows == 1 else 0.999999)
            assert not torch.equal(centres[0], centres[1])

    @pytest.mark.parametrize(
        ("batches", "error", "message"),
        [
            ([], ValueError, "batches: expected at least one, got none"),
            ([(torch.ones(2, 4), torch.tensor([0, 3]))], ValueError, r"labels: .*\[0, 3\).*got 3"),
            ([(torch.ones(2, 4), torch.ones(2))], TypeError, "labels: expected an integer"),
            ([(torch.ones(2), torch.tensor([0, 1]))], ValueError, "embeddings: expected shape"),
        ],
    )
    def test_bad_arguments_are_named(self, batches, error, message):
        with pytest.raises(error, match=message):
            al.mean_directions(batches, 3)

    def test_a_bad_init_changes_nothing(self):
        loss = al.ArcFaceLoss(3, 8, sub_centers=2)
        before = loss.weight.detach().clone()
        with pytest.raises(ValueError, match=r"init: expected shape \(3, 8\), got \(5, 8\)"):
            loss.reset_parameters(torch.ones(5, 8))
        assert torch.equal(loss.weight, before)


class TestDropSubCenters:
    def test_the_centre_of_most_rows_is_kept_and_angles_are_those_to_it(self):
        embeddings, labels = rows_of(num_rows=200)
        labels[::9] = -100
        loss = al.ArcFaceLoss(5, 8, sub_centers=3, dtype=torch.float64)
        weight = loss.weight.detach().clone().view(5, 3, 8)
        batches = zip(embeddings.split(64), labels.split(64), strict=True)
        found = loss.drop_sub_centers((rows.requires_grad_(), of) for rows, of in batches)
        votes = collections.defaultdict(collections.Counter)
        angles = {}
        for i, (row, label) in enumerate(zip(embeddings, labels.tolist(), strict=True)):
            if label >= 0:
                cosine = torch.cosine_similarity(row[None], weight[label])
                votes[label][int(cosine.argmax())] += 1
                angles[i] = cosine.acos()
        dominant = {label: of.most_common(1)[0][0] for label, of in votes.items()}
        assert loss.sub_centers == 1
        assert 3 not in dominant
        for label in range(5):
            assert torch.equal(loss.weight[label], weight[label, dominant.get(label, 0)])
        for i, label in enumerate(labels.tolist()):
            if label < 0:
                assert found[i].isnan()
            else:
                assert found[i].item() == pytest.approx(angles[i][dominant[label]].item())
        assert not found.requires_grad
        assert loss.weight.requires_grad
        assert loss(embeddings, labels).isfinite()

    @pytest.mark.parametrize("row", FAMILY, ids=NAMES)
    def test_every_loss_goes_on_with_one_centre(self, row):
        if row.name.startswith("L-Softmax"):
            pytest.skip("has one centre a class")
        loss = row.build(7, 8, sub_centers=2)
        points, labels = batch(num_classes=7)
        loss.drop_sub_centers([(points, labels)])
        one = row.build(7, 8, sub_centers=1)
        one.load_state_dict(loss.state_dict())
        torch.manual_seed(0)
        value = loss(points, labels)
        torch.manual_seed(0)
        assert torch.equal(one(points, labels), value)

    def test_bad_batches_change_nothing(self):
        loss = al.ArcFaceLoss(3, 8, sub_centers=2)
        weight = loss.weight
        with pytest.raises(ValueError, match="batches: expected at least one"):
            loss.drop_sub_centers([])
        with pytest.raises(ValueError, match="labels: "):
            loss.drop_sub_centers([(torch.ones(1, 8), torch.tensor([3]))])
        assert loss.weight is weight


class Head(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.network, self.loss = torch.nn.Linear(4, 8), loss

    def forward(self, points):
        return self.loss.get_logits(self.network(points))


EXPORTED = [al.ArcFaceLoss(5, 8), al.SubCenterArcFaceLoss(5, 8), al.LSoftmaxLoss(5, 8)]


class TestExport:
    @pytest.mark.parametrize("loss", EXPORTED, ids=lambda loss: type(loss).__name__)
    def test_torch_export_for_any_batch(self, loss):
        head = Head(loss).eval()
        shapes = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(head, (torch.randn(3, 4),), dynamic_shapes=shapes).module()
        for num_rows in (2, 5):
            points = torch.randn(num_rows, 4)
            assert torch.allclose(program(points), head(points), atol=1e-5)

    # torch's exporter and its dependencies warn of one another
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("loss", EXPORTED, ids=lambda loss: type(loss).__name__)
    def test_onnx_for_any_batch(self, loss, tmp_path):
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        head = Head(loss).eval()
        shapes = ({0: torch.export.Dim("rows")},)
        program = torch.onnx.export(
            head, (torch.randn(3, 4),), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        path = tmp_path / "head.onnx"
        program.save(path)
        session = runtime.InferenceSession(path)
        for num_rows in (2, 5):
            points = torch.randn(num_rows, 4)
            (found,) = session.run(None, {session.get_inputs()[0].name: points.numpy()})
            assert torch.allclose(torch.from_numpy(found), head(points), atol=1e-5)


class TestMixedPrecision:
    @every_loss
    def test_autocast_changes_neither_loss_nor_dtypes(self, row):
        torch.manual_seed(0)
        loss = row.build(7, 8).eval()
        network = torch.nn.Linear(8, 8)
        points, labels = batch(num_classes=7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = network(points)
            value = loss(embeddings, labels)
        assert embeddings.dtype == torch.bfloat16
        assert value.dtype == torch.float32
        assert torch.allclose(value, loss(embeddings.float(), labels), rtol=1e-5)
        value.backward()
        assert loss.weight.dtype == loss.weight.grad.dtype == torch.float32

    @pytest.mark.parametrize("row", FAMILY, ids=NAMES)
    def test_a_gradient_scaler_scales_and_finds_nothing_infinite(self, row):
        torch.manual_seed(0)
        loss = row.build(7, 8)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        optimiser = torch.optim.SGD(loss.parameters(), lr=0.01)
        before = loss.weight.detach().clone()
        scaler.scale(loss(*batch(num_classes=7))).backward()
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == 2.0**16
        assert not torch.equal(loss.weight, before)


def test_available_lists_every_loss_with_a_line():
    listed = al.available()
    assert list(listed) == sorted(listed)
    public = {
        name
        for name, value in vars(al).items()
        if isinstance(value, type) and issubclass(value, al.MarginLoss)
    }
    assert set(listed) == public - {"MarginLoss"}
    assert all(line.endswith(".") and 20 < len(line) < 100 for line in listed.values())


def test_no_loss_warns_with_its_defaults():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in FAMILY:
            row.build(7, 8)
