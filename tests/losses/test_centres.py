"""The class centres of a loss: their size, where they start, new classes, sub-centres dropped."""

import collections
import math

import pytest
import torch

import angular_losses as al
from tests.batches import batch, rows_of
from tests.family import FAMILY, NAMES

every_loss = pytest.mark.parametrize("row", FAMILY, ids=NAMES)


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
        mean_length = loss.weight.norm(dim=1).mean().item()
        means = torch.randn(2, 64)
        loss.extend(2, init=means)
        assert torch.equal(loss.class_weight[7:], torch.ones(2))
        new = loss.weight.view(9, sub_centers, 64)[7:]
        cosine = torch.cosine_similarity(new, means[:, None], dim=-1)
        assert cosine.min() > (0.98 if sub_centers > 1 else 0.99999)
        assert torch.allclose(new.norm(dim=-1), torch.tensor(mean_length))
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

    @pytest.mark.parametrize("rows", [1, 2])
    def test_sub_centers_start_where_they_are_told(self, rows):
        loss, init = al.ArcFaceLoss(3, 64, sub_centers=2), torch.randn(3 * rows, 64)
        for start in (loss.reset_parameters, lambda init: loss.extend(3, init)):
            start(init)
            centres = loss.weight[-6:].detach()
            cosine = torch.cosine_similarity(centres, init.repeat_interleave(2 // rows, 0))
            assert cosine.min() > (0.98 if rows == 1 else 0.999999)
            assert not torch.equal(centres[0], centres[1])

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
