"""What a call allocates and multiplies, counted by torch's profiler and not by a clock."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that a call holds at a time beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = highest = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def matrix_products(call: Callable[[], object]) -> int:
    """How many matrix products a call makes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return sum(event.name in ("aten::mm", "aten::addmm_") for event in profiler.events())
