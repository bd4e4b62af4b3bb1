"""Processes that wait for work; torch is imported once for all of them, where they can fork."""

import datetime
import itertools
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path


class Processes:
    """Some processes; :meth:`run` makes a gloo world of the first of them, for some work."""

    def __init__(self, most: int) -> None:
        # They are forked from a process that has imported torch and computed nothing yet.
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(["torch.distributed.device_mesh", "angular_losses"])
        self._folder = tempfile.TemporaryDirectory()
        self._numbers = itertools.count()
        self._lines, self.members = [], []
        for rank in range(most):
            here, there = context.Pipe()
            process = context.Process(target=_wait, args=(there, rank), daemon=True)
            process.start()
            there.close()
            self._lines.append(here)
            self.members.append(process)

    def run(self, work, world, *arguments, timeout=60.0, **options):
        """What ``work(mesh, *arguments, **options)`` returns on each rank; None where one died."""
        store = str(Path(self._folder.name) / str(next(self._numbers)))
        for line in self._lines[:world]:
            line.send((work, world, store, timeout, arguments, options))
        answers = [_answer(line) for line in self._lines[:world]]
        failed = [answer for is_error, answer in answers if is_error]
        if failed:
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self):
        for line in self._lines:
            line.close()
        for process in self.members:
            process.kill()
            process.join()
        self._folder.cleanup()


def _answer(line):
    try:
        return line.recv()
    except EOFError:
        return False, None


def _wait(line, rank):
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

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
