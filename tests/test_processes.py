"""The processes that tests share outlive a test that leaves one of them waiting."""

from tests.processes import Processes


def rank_of(mesh):
    return mesh.get_rank()


def test_a_process_that_does_not_answer_is_replaced():
    members = Processes(2)
    try:
        (first, second), line = members.members, members._lines[1]
        assert members._answer(1, 0.0) == (True, "rank 1: no answer in 0 s")  # it has no work
        assert not second.is_alive()
        assert line.closed
        assert members.run(rank_of, 2) == [0, 1]
        assert members.members[0] is first
    finally:
        members.close()
