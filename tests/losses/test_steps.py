"""Five training steps of every loss, however they are executed, against plain eager ones.

Each batch that is awkward (empty, of one row, with an ignored row, with labels in 8 bits) has an
equivalent that is not: a step with the one, executed in whatever way, has the loss, the gradients
and the state of an eager step with the other.

Every loss meets every schedule, in eager mode and checkpointed, with each kind of batch.
"""

import pytest

from tests.family import NAMES
from tests.steps import (
    KINDS,
    LOSSES_WITH_SCHEDULES,
    MODES,
    SCHEDULES,
    UNCOMPILED,
    assert_steps_are_eager,
)


@pytest.mark.parametrize(("name", "schedule"), LOSSES_WITH_SCHEDULES)
def test_steps_equal_plain_eager_ones(name, schedule):
    turn = NAMES.index(name) + list(SCHEDULES).index(schedule)
    for k, execution in enumerate(UNCOMPILED):
        assert_steps_are_eager(name, schedule, execution, MODES[(turn + k) % 3], KINDS)
