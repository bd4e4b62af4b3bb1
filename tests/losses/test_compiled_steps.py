"""Five training steps of every loss, compiled, against plain eager ones; see test_steps.

By default the classes take turns with schedules, shapes, modes and kinds of batches; ``make
test-grid`` compiles all settings in all ways.
"""

import itertools
import os

import pytest
import torch

from tests.cases import needs_compiler
from tests.family import CLASSES, FAMILY, NAMES
from tests.steps import (
    COMPILED,
    LOSSES_WITH_SCHEDULES,
    MODES,
    SCHEDULES,
    SIZE,
    assert_steps_are_eager,
    empty,
    ignored,
    one_row,
    plain,
    schedules_of,
    uint8,
)

RECOMPILED = (uint8, one_row, empty)


def one_of_each_class():
    """The first row of each loss class; its other settings take a way that one of these takes."""
    found = {type(row.build(CLASSES, SIZE)): row.name for row in reversed(FAMILY)}
    return [name for name in NAMES if name in found.values()]


def cells():
    """Which losses are compiled with which schedule, execution, mode and kinds of batches."""
    if os.environ.get("WHOLE_GRID"):
        grid = [(*one, how) for how in COMPILED for one in LOSSES_WITH_SCHEDULES]
    else:
        grid = [
            ("SphereFace-R-v2-soft", "none", "aot_eager"),
            # Inductor is slow, and what it adds is the same for all.
            ("MagFace", "warm-up", "inductor"),
            ("AdaFace", "annealing", "inductor, dynamic"),
        ]
        grid += [
            (
                name,
                [*schedules_of(name)][k % len(schedules_of(name))],
                "aot_eager, dynamic" if k % 8 == 5 else "aot_eager",  # three times as slow
            )
            for k, name in enumerate(one_of_each_class())
        ]
    # Kinds that are compiled anew are slow too: every other cell has one of those.
    return [
        (
            *cell,
            MODES[(k + k // 3) % 3],
            (plain, ignored, plain, plain if k % 2 else RECOMPILED[(k - k // 3) % 3], plain),
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
def test_compiled_steps_equal_eager_ones(name, schedule, execution, mode, kinds):
    torch.compiler.reset()
    assert_steps_are_eager(name, schedule, execution, mode, kinds)


def test_default_grid_covers_every_pair():
    found = [
        (schedule, "dynamic" in how, mode, kinds[3]) for _, schedule, how, mode, kinds in cells()
    ]
    values = (SCHEDULES, (True, False), MODES, RECOMPILED)
    for one, other in itertools.combinations(range(4), 2):
        pairs = {(cell[one], cell[other]) for cell in found}
        assert pairs >= set(itertools.product(values[one], values[other])), (one, other)
