"""What the processes of tests/test_sharded.py do; each compares with the whole loss by itself."""

import torch
import torch.distributed as dist

from angular_losses import ranks
from angular_losses.sharded import shard
from tests.family import CLASSES, FAMILY

ROWS = {row.name: row for row in FAMILY}
SIZE = 6


def parts_of(rows, sizes):
    return list(torch.arange(rows).split(sizes))


def relative_error(found, expected):
    if found.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=1e-3)
    return ((found - expected).abs().max() / scale).item()


def batch_of(rows, dtype, classes=CLASSES):
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(rows, SIZE, generator=generator, dtype=dtype) * 2
    return embeddings, torch.randint(classes, (rows,), generator=generator)


def errors_of_family(mesh, names, dtype, modes, sizes, classes=CLASSES, train=False, **options):
    """The largest relative errors of loss and gradients against the whole loss, for each name."""
    found = {}
    for name in names:
        for mode in modes:
            found[name, mode] = errors(
                mesh, ROWS[name].build, dtype, sizes, classes, train=train, mode=mode, **options
            )
    return found


def errors(mesh, build, dtype, sizes, classes=CLASSES, *, train=False, rows=12, **options):
    embeddings, labels = batch_of(rows, dtype, classes)
    embeddings = embeddings[: sum(sizes)]
    labels = labels[: sum(sizes)]
    torch.manual_seed(1)
    whole = build(classes, SIZE, dtype=dtype, **options).train(train)
    torch.manual_seed(1)
    part = shard(build(classes, SIZE, dtype=dtype, **options).train(train), mesh)
    expected_rows = embeddings.clone().requires_grad_()
    with ranks.rows_of_several(dist.get_world_size()):
        expected = whole(expected_rows, labels)
    mine = parts_of(len(labels), sizes)[mesh.get_rank()]
    own = embeddings[mine].clone().requires_grad_()
    loss = part(own, labels[mine])
    if expected.dim():
        weights = torch.linspace(0.5, 1.5, len(labels), dtype=expected.dtype)
        (expected * weights).sum().backward()
        (loss * weights[mine]).sum().backward()
        expected = expected[mine]
    else:
        expected.backward()
        loss.backward()
    place = part.shard
    each = whole.sub_centers
    here = slice(place.first * each, (place.first + place.count) * each)
    differences = {
        "loss": relative_error(loss.detach(), expected.detach()),
        "embeddings": relative_error(own.grad, expected_rows.grad[mine]),
        "weight": relative_error(part.weight.grad, whole.weight.grad[here]),
    }
    for name, parameter in whole.named_parameters():
        if name != "weight":
            differences[name] = relative_error(getattr(part, name).grad, parameter.grad)
    buffers = dict(part.named_buffers())
    for name, buffer in whole.named_buffers():
        differences[name] = relative_error(buffers[name].double(), buffer.double())
    return differences
