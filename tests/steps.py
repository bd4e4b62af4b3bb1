"""Training steps of the losses of the family, small ones in float64, to be compared."""

import math

import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from tests.cases import in_chunks_of
from tests.family import CLASSES, FAMILY, NAMES

SIZE = 6
SCHEDULES = {
    "none": lambda: None,
    "warm-up": lambda: al.MarginWarmup(3),
    "annealing": lambda: al.LambdaAnnealing(base=3.0, gamma=1.0, minimum=0.5),
}
ADAPTIVE = ("AdaCos", "AdaFace", "CurricularFace", "KappaFace")
REFUSES_SCHEDULES = ("Circle", "SphereFace-R-v2", "SphereFace-R-v2-soft", "SphereFace-R-detached")


def build(name, schedule="warm-up", **options):
    if name not in REFUSES_SCHEDULES:
        options["schedule"] = SCHEDULES[schedule]()
    torch.manual_seed(0)
    loss = FAMILY[NAMES.index(name)].build(CLASSES, SIZE, dtype=torch.float64, **options).train()
    if hasattr(loss, "momentum"):
        loss.momentum = 0.3  # so that what moves is seen to move
    return loss


def batch(seed, num_rows=8):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(CLASSES, (num_rows,), generator=generator)


def state(loss):
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def step(loss, seed, call=None):
    """The loss of a batch and its gradients; the same random draws for the same seed."""
    embeddings, labels = batch(seed)
    return gradients(loss, embeddings, (embeddings, labels), call, seed)


def gradients(loss, variable, given, call=None, seed=0):
    """The loss of what is given, and its gradients by the variable and by each parameter."""
    torch.manual_seed(seed)
    value = (loss if call is None else call)(*given)
    value.backward()
    variables = [variable, *loss.parameters()]
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in variables]
    for each in variables:
        each.grad = None
    return [value.detach(), *found]


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_same_state(loss, other, **tolerance):
    torch.testing.assert_close(state(loss), state(other), **tolerance)


IGNORED = 259  # 3 in 8 bits
MODES = ("dense", "stash", "recompute")


def plain(embeddings, labels):
    return (embeddings, labels), (embeddings, labels)


def empty(embeddings, labels):
    return (embeddings[:0], labels[:0]), None


def one_row(embeddings, labels):
    return (embeddings[:1], labels[:1]), (embeddings[:1].repeat(2, 1), labels[:1].repeat(2))


def ignored(embeddings, labels):
    """A last row that is NaN and whose gradient, were there one, would be the first row's too."""
    others = embeddings[:-1]
    given = torch.cat([others, embeddings[:1] + math.nan])
    return (given, torch.cat([labels[:-1], labels.new_tensor([IGNORED])])), (others, labels[:-1])


def uint8(embeddings, labels):
    return (embeddings, labels.to(torch.uint8)), (embeddings, labels)


KINDS = (plain, ignored, uint8, one_row, empty)
UNCOMPILED = {
    "eager": lambda loss, mode: loss,
    "checkpointed": lambda loss, mode: lambda *given: checkpoint(loss, *given, use_reentrant=False),
    "reentrant": lambda loss, mode: lambda *given: checkpoint(loss, *given, use_reentrant=True),
}


def compiled_graphs():
    """How many graphs have been compiled so far."""
    return counters["stats"]["unique_graphs"]


def assert_steps_are_eager(name, schedule, execution, mode, kinds):
    graphs = []
    loss, reference = (build(name, schedule, ignore_index=IGNORED) for _ in range(2))
    loss.mode = mode
    call = EXECUTIONS[execution](loss, mode)
    # An operator that is compiled rounds otherwise.
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    for seed, kind in enumerate(kinds):
        embeddings, labels = batch(seed, 8 + 2 * seed if "dynamic" in execution else 8)
        given, equivalent = kind(embeddings, labels)
        if kind is one_row and (loss.is_random or name == "AdaFace"):
            equivalent = given  # rows differ by chance, or one has no deviation
        with in_chunks_of(3):
            found = gradients(loss, embeddings, given, call, seed)
        if equivalent is None:
            expected = [torch.zeros_like(each) for each in found]
            reference.advance()
        else:
            expected = gradients(reference, embeddings, equivalent, seed=seed)
        # Reentrant checkpointing returns what its first pass found, under no_grad: the statistics
        # had not moved by then.
        first = 1 if execution == "reentrant" and loss.statistics else 0
        assert_same(found[first:], expected[first:], **tolerance)
        assert_same_state(loss, reference, **tolerance)
        graphs.append(compiled_graphs())
    if "dynamic" in execution:
        assert graphs[1] == graphs[0], "a batch of another size is compiled anew"


def compiled(backend, dynamic):
    # With random numbers as in eager mode.
    options = {"fallback_random": True} if backend == "inductor" else None
    return lambda loss, mode: torch.compile(
        loss, backend=backend, dynamic=dynamic, fullgraph=mode == "dense", options=options
    )


COMPILED = {
    "aot_eager": compiled("aot_eager", False),
    "aot_eager, dynamic": compiled("aot_eager", True),
    "inductor": compiled("inductor", False),
    "inductor, dynamic": compiled("inductor", True),
}
EXECUTIONS = UNCOMPILED | COMPILED


def schedules_of(name):
    return ["none"] if name in REFUSES_SCHEDULES else SCHEDULES


LOSSES_WITH_SCHEDULES = [(name, schedule) for name in NAMES for schedule in schedules_of(name)]
