"""Class centres to and from other libraries: the same loss before and after."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from angular_losses import CosFaceLoss, P2SGradLoss, SubCenterArcFaceLoss
from angular_losses.integrations.checkpoints import (
    from_insightface,
    from_pml,
    to_insightface,
    to_pml,
)


def batch():
    torch.manual_seed(0)
    return torch.randn(8, 4), torch.randint(7, (8,))


@pytest.mark.parametrize("prefix", ["", "module.", "loss.", "module.losses.arcface."])
def test_there_and_back(prefix):
    weight = torch.randn(7, 4)
    state = to_pml({f"{prefix}weight": weight, "class_weight": torch.ones(7)})
    assert list(state) == ["W"]
    assert torch.equal(state["W"], weight.T)
    assert state["W"].is_contiguous()
    back = from_pml({f"{prefix}W": state["W"], "trunk.bias": torch.ones(3)})
    assert list(back) == ["weight"]
    assert torch.equal(back["weight"], weight)
    assert back["weight"].is_contiguous()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("CosFaceLoss", CosFaceLoss(7, 4)),
        ("SubCenterArcFaceLoss", SubCenterArcFaceLoss(7, 4, margin=0.3, beyond="linear")),
    ],
)
def test_a_loss_of_pml_and_ours_agree_on_one_state(name, ours):
    reason = "pytorch-metric-learning is missing"
    pytest.importorskip("pytorch_metric_learning", reason=reason)
    losses = importlib.import_module("pytorch_metric_learning.losses")
    degrees = {"margin": torch.rad2deg(torch.tensor(0.3)).item()} if "Sub" in name else {}
    theirs = getattr(losses, name)(num_classes=7, embedding_size=4, **degrees)
    embeddings, labels = batch()
    ours.load_state_dict(from_pml(theirs.state_dict()))
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(to_pml(ours.state_dict()))
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))


def test_p2s_grad_of_pml_has_another_name_for_its_centres():
    reason = "pytorch-metric-learning is missing"
    pytest.importorskip("pytorch_metric_learning", reason=reason)
    losses = importlib.import_module("pytorch_metric_learning.losses")
    theirs, ours, (embeddings, labels) = losses.P2SGradLoss(4, 7), P2SGradLoss(7, 4), batch()
    theirs.load_state_dict({"weight": to_pml(ours.state_dict())["W"]})
    torch.testing.assert_close(ours(embeddings, labels) / 7, theirs(embeddings, labels))
    with pytest.raises(ValueError, match="'weight' in PML's P2SGradLoss, got"):
        from_pml(theirs.state_dict())
    ours.load_state_dict(from_pml({"W": theirs.state_dict()["weight"]}))
    torch.testing.assert_close(ours(embeddings, labels) / 7, theirs(embeddings, labels))


@pytest.mark.parametrize("num_classes", [5, 7, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_ranks_are_those_of_partial_fc(num_classes, num_ranks):
    weight = torch.randn(num_classes, 4)
    ranks = to_insightface({"weight": weight}, num_ranks)
    assert len(ranks) == num_ranks
    for rank, state in enumerate(ranks):  # as PartialFC_V2 has it
        num_local = num_classes // num_ranks + int(rank < num_classes % num_ranks)
        start = num_classes // num_ranks * rank + min(rank, num_classes % num_ranks)
        assert torch.equal(state["weight"], weight[start : start + num_local])
    back = from_insightface([{"module.weight": state["weight"]} for state in ranks])
    assert list(back) == ["weight"]
    assert torch.equal(back["weight"], weight)


def test_the_loss_is_insightfaces():
    embeddings, labels = batch()
    loss = CosFaceLoss(7, 4, margin=0.4)
    ranks = to_insightface(loss.state_dict(), 3)
    weight = torch.cat([rank["weight"] for rank in ranks])
    logits = F.linear(F.normalize(embeddings), F.normalize(weight))
    logits[torch.arange(8), labels] -= 0.4
    torch.testing.assert_close(loss(embeddings, labels), F.cross_entropy(64 * logits, labels))


@pytest.mark.parametrize("convert", [from_pml, to_pml, lambda state: to_insightface(state, 2)[0]])
def test_what_comes_out_is_a_copy(convert):
    state = {"W": torch.zeros(3, 3), "weight": torch.zeros(3, 3)}
    next(iter(convert(state).values())).fill_(1)
    assert not state["W"].any()
    assert not state["weight"].any()


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        (lambda: from_pml({"weight": torch.ones(2, 3)}), ValueError, r"'W', .*\['weight'\]"),
        (
            lambda: from_pml({"a.W": torch.ones(2, 3), "b.W": torch.ones(2, 3)}),
            ValueError,
            r"state_dict: expected exactly one key 'W', .*\['a.W', 'b.W'\]",
        ),
        (
            lambda: from_pml({"W": torch.ones(2)}),
            ValueError,
            r"state_dict\['W'\]: expected shape \(d, C\), got \(2,\)",
        ),
        (lambda: to_pml({"W": torch.ones(2, 3)}), ValueError, "state_dict: .*'weight'"),
        (lambda: to_pml({"weight": torch.ones(2, 3).int()}), TypeError, "state_dict"),
        (lambda: from_insightface([]), ValueError, "state_dicts: expected a list"),
        (
            lambda: from_insightface({"weight": torch.ones(2, 3)}),
            ValueError,
            "state_dicts: expected a list with one state dict per rank, got",
        ),
        (
            lambda: from_insightface([{"weight": torch.ones(2, 3)}, {"weight": torch.ones(2, 4)}]),
            ValueError,
            r"state_dicts\[1\]\['weight'\]: expected shape \(num_local, 3\), got \(2, 4\)",
        ),
        (
            lambda: from_insightface([{"weight": torch.ones(2, 3)}, {"weight": torch.ones(3, 3)}]),
            ValueError,
            r"state_dicts: expected the ranks in order, with \[3, 2\] classes each, got \[2, 3\]",
        ),
        (
            lambda: to_insightface({"weight": torch.ones(2, 3)}, 3),
            ValueError,
            "num_ranks: expected at most 2",
        ),
        (lambda: to_insightface({"weight": torch.ones(2, 3)}, 0), ValueError, "num_ranks: "),
        (lambda: to_insightface({"weight": torch.ones(2, 3)}, 2.0), TypeError, "num_ranks: "),
    ],
)
def test_bad_states_are_named(convert, error, message):
    with pytest.raises(error, match=message):
        convert()
