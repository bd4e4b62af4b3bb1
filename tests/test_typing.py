import pytest

mypy = pytest.importorskip("mypy.api")

# An ignored error that does not occur is one too.
USE = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import angular_losses as al

loss = al.ArcFaceLoss(3, 8, margin=0.4, label_smoothing=0.1)
x, y, wants_correct = torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), bool(input())
assert_type(loss(x, y), Tensor)
assert_type(loss(x, y, other_labels=y, lam=0.3), Tensor)
assert_type(loss(x, y, return_correct=True), tuple[Tensor, Tensor])
assert_type(loss(x, y, return_correct=wants_correct), Tensor | tuple[Tensor, Tensor])
loss(x)  # type: ignore[call-overload]
loss(x, y, weight=y)  # type: ignore[call-overload]
al.ArcFaceLoss(3, 8, margins=0.4)  # type: ignore[call-arg]
al.ArcFaceLoss(3, 8, reduction=1)  # type: ignore[arg-type]
"""


def test_losses_and_their_calls_are_typed():
    output, errors, _ = mypy.run(["--strict", "--config-file=", "-c", USE])
    assert "Success" in output, output + errors
