"""Processes that wait for work; torch is imported once for all of them, where they can fork."""

import datetime
import itertools
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path


class Processes:
    """Some processes; :meth:`run` makes a gloo world of the first of them, for some work."""

    def __init__(self, most: int) -> None:
        # They are forked from a process that has imported torch and computed nothing yet.
        is_linux = sys.platform == "linux"
        self._context = multiprocessing.get_context("forkserver" if is_linux else "spawn")
        if is_linux:
            preloaded = ["torch.distributed.device_mesh", "angular_losses"]
            self._context.set_forkserver_preload(preloaded)
        self._folder = tempfile.TemporaryDirectory()
        self._numbers = itertools.count()
        self._lines, self.members = map(list, zip(*map(self._start, range(most)), strict=True))

    def _start(self, rank):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_wait, args=(there, rank), daemon=True)
        process.start()
        there.close()
        return here, process

    def run(self, work, world, *arguments, timeout=60.0, **options):
        """What ``work(mesh, *arguments, **options)`` returns on each rank; None where one died.

        A rank that does not answer, though every wait of its group has ended, is replaced.
        """
        store = str(Path(self._folder.name) / str(next(self._numbers)))
        for line in self._lines[:world]:
            line.send((work, world, store, timeout, arguments, options))
        answers = [self._answer(rank, timeout + 30) for rank in range(world)]
        failed = [answer for is_error, answer in answers if is_error]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def _answer(self, rank, seconds):
        line = self._lines[rank]
        if not line.poll(seconds):
            self._stop(rank)
            self._lines[rank], self.members[rank] = self._start(rank)
            return True, f"rank {rank}: no answer in {seconds:.0f} s"
        try:
            return line.recv()
        except EOFError:
            return False, None

    def _stop(self, rank):
        self._lines[rank].close()
        self.members[rank].kill()
        self.members[rank].join()

    def close(self):
        for rank in range(len(self.members)):
            self._stop(rank)
        self._folder.cleanup()


def _wait(line, rank):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    # A rank whose work is short would otherwise leave while others still connect to it.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    torch.set_num_threads(1)
    groups = []
    while True:
        try:
            work, world, store, timeout, arguments, options = line.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )
            torch.manual_seed(0)
            answer = work(init_device_mesh("cpu", (world,)), *arguments, **options)
            line.send((False, answer))
        except BaseException:
            line.send((True, f"rank {rank} of {world}:\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                if torch.__version__.startswith("2.6"):  # whose end can wait for itself
                    groups += dist.distributed_c10d._world.pg_map
                dist.destroy_process_group()
