"""A network with the logits of a loss, exported by torch and to ONNX."""

import pytest
import torch

import angular_losses as al


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
