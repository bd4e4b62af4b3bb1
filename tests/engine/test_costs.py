"""What a training step of a small batch costs: calls of operators, each a launch on a GPU."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import angular_losses as al

MOST = 54
MOST_COMPILED = 75
LOSSES = {
    "NormalizedSoftmax": al.NormalizedSoftmaxLoss,
    "CosFace": al.CosFaceLoss,
    "ArcFace": al.ArcFaceLoss,
    "SphereFace": al.SphereFaceLoss,
    "Combined": al.CombinedMarginLoss,
}
# A parabola beside the cosine, and angles of all classes.
MOST_OF_OTHERS = {"X2Softmax": 60, "LiArcFace": 60, "SphereFaceR-v2": 61}
OTHERS = {
    "X2Softmax": al.X2SoftmaxLoss,
    "LiArcFace": al.LiArcFaceLoss,
    "SphereFaceR-v2": lambda *sizes: al.SphereFaceRLoss(*sizes, kind="v2"),
}


def is_view(operator):
    """Whether an operator only looks at memory that is there, and launches nothing."""
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for returned in operator._schema.returns
    )


class Calls(TorchDispatchMode):
    """Counts the operators that reach the device, below autograd."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not is_view(operator)
        return operator(*args, **kwargs or {})


def a_step(loss):
    torch.manual_seed(0)
    embeddings, labels = torch.randn(64, 256, requires_grad=True), torch.randint(3, (64,))

    def step(module=loss):
        loss.weight.grad = embeddings.grad = None
        module(embeddings, labels).backward()

    return step


@pytest.mark.parametrize("name", LOSSES | OTHERS)
def test_operators_of_a_step(name):
    step = a_step((LOSSES | OTHERS)[name](3, 256))
    step()
    with Calls() as calls:
        step()
    assert (
        40 < calls.count <= MOST_OF_OTHERS.get(name, MOST)
    )  # fewer than 40 would not be a whole step


@pytest.mark.parametrize("name", LOSSES)
def test_operators_of_a_compiled_step(name):
    loss, found = LOSSES[name](3, 256), []

    def counting(graph, example_inputs):
        nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        operators = [target for target in nodes if isinstance(target, torch._ops.OpOverload)]
        found.append(sum(not is_view(operator) for operator in operators))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=counting, bw_compiler=counting)
    a_step(loss)(torch.compile(loss, backend=backend, fullgraph=True))
    assert len(found) == 2
    assert 10 < sum(found) <= MOST_COMPILED
