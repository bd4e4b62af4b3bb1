"""Five training steps of every loss, however they are executed, against plain eager ones.

Each batch that is awkward (empty, of one row, with an ignored row, with labels in 8 bits) has an
equivalent that is not: a step with the one, executed in whatever way, has the loss, the gradients
and the state of an eager step with the other.

By default every loss meets every schedule, in eager mode and checkpointed, with each kind of batch;
compiled it takes turns with schedules, backends, modes and kinds. ``make test-grid`` compiles all.
"""

import itertools
import math
import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cases import in_chunks_of, needs_compiler
from tests.family import NAMES
from tests.steps import (
    REFUSES_SCHEDULES,
    SCHEDULES,
    assert_same,
    assert_same_state,
    batch,
    build,
    gradients,
)

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


def assert_steps_are_eager(name, schedule, execution, mode, kinds):
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


def schedules_of(name):
    return ["none"] if name in REFUSES_SCHEDULES else SCHEDULES


LOSSES_WITH_SCHEDULES = [(name, schedule) for name in NAMES for schedule in schedules_of(name)]


@pytest.mark.parametrize(("name", "schedule"), LOSSES_WITH_SCHEDULES)
def test_steps_are_those_of_plain_batches_in_eager_mode(name, schedule):
    turn = NAMES.index(name) + list(SCHEDULES).index(schedule)
    for k, execution in enumerate(UNCOMPILED):
        assert_steps_are_eager(name, schedule, execution, MODES[(turn + k) % 3], KINDS)


def cells():
    """Which losses are compiled with which schedule, execution, mode and kinds of batches."""
    if os.environ.get("WHOLE_GRID"):
        grid = [(*one, how) for how in COMPILED for one in LOSSES_WITH_SCHEDULES]
    else:  # inductor is slow
        aot = ["aot_eager", "aot_eager, dynamic"]
        hows = [*(aot * 3)[:5], "inductor", *(aot * 3)[1:], "inductor, dynamic"]
        grid = [
            (name, [*schedules_of(name)][k % len(schedules_of(name))], hows[k // 3 % len(hows)])
            for k, name in enumerate(NAMES)
        ]
    # Kinds that are compiled anew are slow too: a cell has one of those.
    return [
        (
            *cell,
            MODES[(k + k // 3) % 3],
            (plain, ignored, plain, (uint8, one_row, empty)[(k - k // 3) % 3], plain),
        )
        for k, cell in enumerate(grid)
    ]


# The compiler looks at .grad of what crosses a gap in the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("name", "schedule", "execution", "mode", "kinds"),
    [
        pytest.param(*cell, id="-".join(cell[:4]), marks=needs_compiler if "ind" in cell[2] else ())
        for cell in cells()
    ],
)
def test_compiled_steps_are_those_of_eager_mode(name, schedule, execution, mode, kinds):
    torch.compiler.reset()
    assert_steps_are_eager(name, schedule, execution, mode, kinds)


def test_what_is_compiled_by_default_covers_every_pair():
    found = [(schedule, how, mode, kinds[3]) for _, schedule, how, mode, kinds in cells()]
    for one, other in itertools.combinations(range(4), 2):
        pairs = {(cell[one], cell[other]) for cell in found}
        firsts, seconds = ({pair[k] for pair in pairs} for k in (0, 1))
        assert pairs == set(itertools.product(firsts, seconds)), (one, other)
