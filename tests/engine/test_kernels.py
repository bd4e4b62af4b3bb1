"""The Triton kernel: its results in Triton's interpreter, and what is compiled for a GPU."""

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.nn.functional import normalize

from angular_losses import margin_softmax_loss
from angular_losses.engine import kernels
from tests.cases import in_chunks_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def in_fresh_python(function, **environment):
    """What a function of this module returns in a Python that has not imported Triton yet."""
    module = "tests.engine.test_kernels"
    code = f"import json, {module}; print(json.dumps({module}.{function.__name__}()))"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# K, N, d, and whatever else matters.
CASES = {
    "one class, row and dimension": (1, 1, 1, {}),
    "less than a tile": (5, 3, 4, {}),
    "one tile": (128, 128, 64, {}),
    "one more than a tile": (129, 129, 65, {}),
    "ragged": (300, 200, 70, {}),
    "shifted": (300, 200, 70, {"shifted": True}),
    "a later chunk": (300, 200, 70, {"start": 77}),
    "classes beyond 32 bits": (130, 40, 8, {"start": 2**33}),
    "one row": (300, 1, 16, {}),
    "one row, shifted": (300, 1, 16, {"shifted": True}),
    "one class": (1, 200, 16, {"start": 5}),
    "several groups of tiles": (1100, 300, 8, {"shifted": True, "start": 1}),
    "strided": (130, 40, 70, {"strided": True}),
    "no rows": (5, 0, 4, {}),
}


def interpret():
    """The kernel beside float64 in each of the cases, as numbers."""
    torch.manual_seed(0)
    return {name: compare(*sizes, **options) for name, (*sizes, options) in CASES.items()}


def compare(num_classes, num_rows, size, *, start=0, shifted=False, strided=False):
    centres = normalize(torch.randn(num_classes, size))
    scaled = 16 * normalize(torch.randn(num_rows, size))
    shift = torch.randn(num_rows) if shifted else None
    # The edges of tiles and of the chunk, and what is beside it, or would be in 32 bits.
    places = [
        0,
        num_classes - 1,
        num_classes,
        -1,
        127,
        128,
        255,
        256,
        -100 - start,
        2**32,
        -(2**32),
    ]
    labels = start + torch.tensor(places).repeat(num_rows)[:num_rows]
    expected = centres.double() @ scaled.double().T
    expected = (expected if shift is None else expected - shift).exp()
    expected[torch.arange(num_classes)[:, None] == labels - start] = 0
    if strided:
        centres, scaled = (tensor.T.contiguous().T for tensor in (centres, scaled))
        labels = labels.repeat_interleave(2)[::2]

    def run():
        memory = torch.full((num_classes + 1, num_rows), -1.0)
        return kernels.exponentials(centres, scaled, labels, start, shift, memory[:-1]), memory

    (sums, memory), again = run(), run()
    return {
        "available": kernels.is_available(CPU, torch.float32),
        "deviation": deviation(memory[:-1], expected),
        "deviation of sums": deviation(sums, expected.sum(0)),
        "kept beyond": bool((memory[-1] == -1).all()),
        "repeated": torch.equal(sums, again[0]) and torch.equal(memory, again[1]),
    }


def deviation(found, expected):
    """The largest relative one; an expected 0 must be met exactly."""
    relative = (found - expected).abs() / expected.clamp(min=1e-300)
    return max(relative.flatten().nan_to_num(torch.inf).tolist(), default=0.0)


def interpret_overflow():
    out = torch.empty(4, 4)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's of the overflow
    sums = kernels.exponentials(torch.eye(4), 100 * torch.eye(4), torch.arange(4), 0, None, out)
    return out.tolist(), sums.tolist()


def all_interpreted():
    return {"each": interpret(), "engine": through_the_engine(), "overflow": interpret_overflow()}


@pytest.fixture(scope="module")
def found():
    return in_fresh_python(all_interpreted, TRITON_INTERPRET="1")


@pytest.fixture
def interpreted(found):
    return found["each"]


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_exponentials_and_sums(interpreted, case):
    assert interpreted[case]["available"]
    assert interpreted[case]["deviation"] < 1e-5
    assert interpreted[case]["deviation of sums"] < 1e-5


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_written_beyond_the_chunk(interpreted, case):
    assert interpreted[case]["kept beyond"]


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_every_run_is_bitwise_the_same(interpreted, case):
    assert interpreted[case]["repeated"]


@needs_triton
def test_target_that_overflows_is_0(found):
    out, sums = found["overflow"]
    assert out == (1 - torch.eye(4)).tolist()
    assert sums == [3.0] * 4


def compile_for_h100():
    """The programs that launches there would run, with a driver that only names the device."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    kernel = kernels._compiler()
    launch, programs = kernel.run, {}

    def compile_only(*arguments, **options):
        program = launch(*arguments, **options | {"warmup": True})
        programs.setdefault(program.hash, program)

    kernel.run = compile_only
    for shift in (None, torch.zeros(256)):
        for start, num_classes in ((0, 2048), (2048, 2048), (4096, 999), (5095, 1)):
            factors = (
                torch.empty(count, 512, dtype=torch.bfloat16) for count in (num_classes, 256)
            )
            out = torch.empty(num_classes, 256, dtype=torch.bfloat16)
            kernels.exponentials(*factors, torch.zeros(256, dtype=torch.int64), start, shift, out)
    return [
        {
            "ptx": program.asm["ptx"],
            "ttir": program.asm["ttir"],
            "binary_bytes": len(program.asm["cubin"]),
            "shared_bytes": program.metadata.shared,
        }
        for program in programs.values()
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    return in_fresh_python(compile_for_h100, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache))


@needs_triton
def test_chunks_share_a_program(compiled):
    assert len(compiled) == 2  # with and without a shift


@needs_triton
def test_tensor_cores_and_shared_memory(compiled):
    for program in compiled:
        assert program["binary_bytes"]
        assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in program["ptx"]
        assert program["shared_bytes"] <= 99 * 1024  # the least of compute capability 8.0 to 12.0


@needs_triton
def test_programs_write_each_place_once(compiled):
    for program in compiled:
        assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", program["ptx"], re.MULTILINE)
        assert "st.global.v4" in program["ptx"]


@needs_triton
def test_offsets_have_64_bits(compiled):
    """All but those inside of one row of the factors."""
    for program in compiled:
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<(.*)x)?(i32|i64)>? loc", program["ttir"])
        assert ("128x128", "i64") in offsets
        assert {shape for shape, dtype in offsets if dtype == "i32"} == {"128x64", "64x128"}
        assert not re.search(r"arith\.muli .*x(i32)>", program["ttir"])


def import_and_ask():
    return [kernels.is_available(CPU, torch.float32), sys.modules.get("triton") is not None]


def test_plain_cpu_does_not_import_triton():
    assert in_fresh_python(import_and_ask, TRITON_INTERPRET="0") == [False, False]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "interpret", "installed", "expected"),
    [
        (CUDA, torch.bfloat16, (8, 0), "0", True, True),
        (CUDA, torch.bfloat16, (12, 0), "0", True, True),
        (CUDA, torch.bfloat16, (7, 5), "0", True, False),
        (CUDA, torch.bfloat16, (9, 0), "0", False, False),
        (CUDA, torch.bfloat16, (9, 0), "1", True, False),
        (CUDA, torch.float16, (9, 0), "0", True, False),
        (CUDA, torch.float32, (9, 0), "0", True, False),
        (CPU, torch.float32, (9, 0), "0", True, False),
        (CPU, torch.float32, (9, 0), "1", True, True),
        (CPU, torch.float32, (9, 0), "1", False, False),
        (CPU, torch.bfloat16, (9, 0), "1", True, False),
    ],
)
def test_is_available(monkeypatch, device, dtype, capability, interpret, installed, expected):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.is_available(device, dtype) is expected


def test_no_gpu_is_not_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not kernels.is_available(CUDA, torch.bfloat16)


def test_out_must_be_contiguous():
    with pytest.raises(ValueError, match="contiguous"):
        kernels.exponentials(
            *torch.ones(2, 3, 2), torch.zeros(3).long(), 0, None, torch.ones(3, 3).T
        )


def through_the_engine():
    """Calls of the kernel and deviation from the dense mode, by mode and scale."""
    torch.manual_seed(0)
    embeddings = torch.randn(9, 20, requires_grad=True)
    weight = torch.randn(300, 20, requires_grad=True)
    labels = torch.randint(300, (18,))[::2]  # strided
    found = {}
    for scale in (30.0, 100.0):
        losses = {}
        for mode in ("dense", "stash", "recompute"):
            counted = mock.Mock(wraps=kernels.exponentials)
            with mock.patch.object(kernels, "exponentials", counted), in_chunks_of(150):
                loss = margin_softmax_loss(
                    embeddings, weight, labels, margin=torch.cos, scale=scale, mode=mode
                )
                gradients = torch.autograd.grad(loss, (embeddings, weight))
            losses[mode] = (loss.detach(), *gradients)
            pairs = zip(losses[mode], losses["dense"], strict=True)
            errors = [
                ((one - other).abs().max() / other.abs().max()).item() for one, other in pairs
            ]
            found[f"{mode} {scale:g}"] = counted.call_count, max(errors)
    return found


@pytest.fixture
def engine(found):
    return found["engine"]


# Two chunks: in the forward where no maximum is sought, in the backward where E is not kept.
@needs_triton
@pytest.mark.parametrize(
    ("name", "calls"),
    [("dense 30", 0), ("stash 30", 2), ("recompute 30", 4), ("stash 100", 0), ("recompute 100", 2)],
)
def test_engine_with_the_kernel(engine, name, calls):
    assert engine[name][0] == calls
    assert engine[name][1] <= 1e-4
