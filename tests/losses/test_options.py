"""Options as users pass them: from configuration files, from NumPy, by the names of others."""

import collections
import math

import numpy as np
import pytest
import torch

import angular_losses as al
from tests.batches import batch


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
