"""Every loss under autocast, and with a gradient scaler."""

import pytest
import torch

from tests.batches import batch
from tests.family import FAMILY, NAMES

every_loss = pytest.mark.parametrize("row", FAMILY, ids=NAMES)


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
