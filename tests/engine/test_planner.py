import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import angular_losses as al
from tests.profiling import peak_bytes

MEBIBYTE = 2**20


def test_auto_is_stash_where_it_fits():
    kept = 512 * 100_000 * 4
    assert al.plan(512, 100_000, 512).mode == "stash"
    assert al.plan(512, 100_000, 512, memory_budget=kept + 64 * MEBIBYTE).mode == "stash"
    assert al.plan(512, 100_000, 512, memory_budget=kept).mode == "recompute"
    assert al.plan(4096, 1_000_000, 64).mode == "recompute"
    half = al.plan(512, 100_000, 512, product_dtype=torch.bfloat16, memory_budget=kept)
    assert half.mode == "stash"
    assert half.product_dtype == torch.bfloat16


def test_a_small_budget_makes_small_chunks():
    roomy = al.plan(512, 100_000, 512, mode="recompute")
    tight = al.plan(512, 100_000, 512, memory_budget=16 * MEBIBYTE)
    assert tight.chunk < roomy.chunk
    assert tight.extra_bytes <= 16 * MEBIBYTE < roomy.extra_bytes


def test_chunk_of_a_given_mode():
    assert al.plan(4096, 1_000_000, 512, mode="stash").chunk == 1024
    assert al.plan(4096, 1_000_000, 512, mode="recompute").chunk == 1024
    assert al.plan(128, 1_000_000, 512, mode="recompute").chunk == 2048


def test_auto_prefers_smaller_chunks_to_recompute():
    on_gpu = al.plan(256, 100_000, 512, device="cuda", product_dtype=torch.bfloat16)
    assert on_gpu.mode == "stash"
    assert on_gpu.chunk >= 1024


def test_memory_of_recompute():
    few, many = (al.plan(128, classes, 256, mode="recompute") for classes in (10_000, 2_000_000))
    assert many.extra_bytes - few.extra_bytes <= 4 * 2_000_000  # the centres' inverse lengths


@given(
    st.integers(0, 5000),
    st.integers(1, 3_000_000),
    st.integers(1, 2048),
    st.sampled_from(["auto", "stash", "recompute", "dense"]),
    st.integers(1, 2**36),
)
def test_plans_keep_to_the_budget(rows, classes, size, mode, budget):
    try:
        chosen = al.plan(rows, classes, size, mode=mode, memory_budget=budget)
    except ValueError as error:
        needed = int(str(error).split("at least ")[1].split()[0])
        assert needed > budget
        again = al.plan(rows, classes, size, mode=mode, memory_budget=needed)
        assert again.extra_bytes <= needed
    else:
        assert chosen.extra_bytes <= budget
        assert 1 <= chosen.chunk <= classes


@pytest.mark.parametrize("sizes", [(128, 20_000, 64), (256, 5000, 256), (512, 3000, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_predicted_memory_is_what_is_allocated(mode, dtype, sizes):
    num_rows, num_classes, size = sizes
    embeddings = torch.randn(num_rows, size, dtype=dtype, requires_grad=True)
    loss = al.ArcFaceLoss(num_classes, size, mode=mode, dtype=dtype)
    labels = torch.randint(num_classes, (num_rows,))
    chosen = al.plan(num_rows, num_classes, size, dtype=dtype, mode=mode)
    measured = peak_bytes(lambda: loss(embeddings, labels).backward())
    assert measured == pytest.approx(chosen.extra_bytes + chosen.gradient_bytes, rel=0.15)


@pytest.mark.parametrize(
    "sizes",
    [
        *((64, 3, 256), (2, 64, 256), (1, 2, 4096), (300, 300, 11)),
        *((2, 64, 16384), (8, 64, 4096), (64, 64, 2048)),  # whose products are many
    ],
)
@pytest.mark.parametrize("build", [al.ArcFaceLoss, al.LiArcFaceLoss])
def test_few_classes_take_no_more_memory_than_predicted(sizes, build):
    num_rows, num_classes, size = sizes
    embeddings, loss = torch.randn(num_rows, size, requires_grad=True), build(num_classes, size)
    labels = torch.randint(num_classes, (num_rows,))
    chosen = al.plan(*sizes, reweighted=build is al.LiArcFaceLoss)
    measured = peak_bytes(lambda: loss(embeddings, labels).backward())
    assert 0 < measured <= 1.05 * (chosen.extra_bytes + chosen.gradient_bytes)


def test_a_loss_follows_its_budget():
    embeddings, labels = torch.randn(256, 32), torch.randint(20_000, (256,))
    embeddings.requires_grad_()
    peaks = {}
    for budget in (None, 8 * MEBIBYTE):
        loss = al.ArcFaceLoss(20_000, 32, memory_budget=budget)
        peaks[budget] = peak_bytes(lambda loss=loss: loss(embeddings, labels).backward())
    gradients = (20_000 + 256) * 32 * 4
    assert peaks[None] > gradients + 256 * 20_000 * 4
    assert peaks[8 * MEBIBYTE] < gradients + 8.5 * MEBIBYTE


def test_prints_as_a_sentence():
    text = str(al.plan(512, 100_000, 512))
    assert text.startswith("stash: chunks of 1024 classes, float32 products; ")
    assert "196 MiB of gradients" in text
    assert "dense" in str(al.plan(2, 3, 4, mode="dense"))


def test_a_plan_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        al.plan(2, 3, 4).chunk = 1


def test_chunks_on_other_devices():
    assert al.plan(256, 1_000_000, 512, device="cuda").chunk > 2048


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "fast"}, ValueError, "mode: expected one of 'auto', 'dense'"),
        ({"memory_budget": 1.5}, TypeError, "memory_budget: expected an int, got 1.5"),
        ({"memory_budget": 1}, ValueError, "memory_budget: expected at least .* bytes for mode"),
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"num_rows": -1}, ValueError, "num_rows: "),
        ({"embedding_size": 2.0}, TypeError, "embedding_size: expected an int"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    sizes = {"num_rows": 2, "num_classes": 3, "embedding_size": 4}
    with pytest.raises(error, match=message):
        al.plan(**(sizes | arguments))
