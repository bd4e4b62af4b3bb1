"""Processes that wait for work, so that each test of several does not import torch again."""

import datetime
import multiprocessing
import tempfile
import traceback
from pathlib import Path

MOST = 4


class Processes:
    """Up to four processes of one gloo world; :meth:`run` has some of them do the same work."""

    def __init__(self, timeout: float = 60.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._lines, self.members = [], []
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_wait, args=(there, rank, store, timeout), daemon=True)
            process.start()
            there.close()
            self._lines.append(here)
            self.members.append(process)

    def run(self, work, world, *arguments, **options):
        """What ``work(mesh, *arguments, **options)`` returns on each of the first ranks."""
        for line in self._lines[:world]:
            line.send((work, world, arguments, options))
        answers = [line.recv() for line in self._lines[:world]]
        failed = [answer for is_error, answer in answers if is_error]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self):
        for line in self._lines:
            line.close()
        for process in self.members:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _wait(line, rank, store, timeout):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, MOST),
        rank=rank,
        world_size=MOST,
        timeout=datetime.timedelta(seconds=timeout),
    )
    groups = [dist.new_group(list(range(world))) for world in range(1, MOST + 1)]
    while True:
        try:
            work, world, arguments, options = line.recv()
        except EOFError:
            return
        try:
            mesh = DeviceMesh.from_group(groups[world - 1], "cpu", mesh=list(range(world)))
            torch.manual_seed(0)
            line.send((False, work(mesh, *arguments, **options)))
        except BaseException:
            line.send((True, f"rank {rank} of {world}:\n{traceback.format_exc()}"))
