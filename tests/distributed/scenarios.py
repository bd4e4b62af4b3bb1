"""What the processes of test_sharding.py do; each compares with the whole loss by itself."""

import copy
import functools
import os
import time
from contextlib import ExitStack
from datetime import timedelta
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from angular_losses import ArcFaceLoss, collectives
from angular_losses.diagnostics import AngularMonitor
from angular_losses.distributed import ShardedLoss, load, save, shard, shard_optimizer, unshard
from angular_losses.engine import passes
from angular_losses.engine import shard as shards
from tests.batches import drawn_in
from tests.cases import in_chunks_of
from tests.family import CLASSES, FAMILY
from tests.profiling import peak_bytes

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
    """The largest relative errors of loss and gradients, for each name and mode.

    Against the whole loss, in float64 and without chunks.
    """
    found = {}
    for name in names:
        torch.manual_seed(1)
        whole = ROWS[name].build(classes, SIZE, dtype=dtype, **options).train(train)
        part = shard(copy.deepcopy(whole), mesh)
        whole.double().mode = "dense"
        embeddings, labels = batch_of(sum(sizes), dtype, classes)
        expected_rows = embeddings.double().clone().requires_grad_()
        with collectives.over(None):
            expected = whole(expected_rows, labels)
        weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype)
        (expected * weights).sum().backward()
        for part.mode in modes:
            part.zero_grad()
            mine = parts_of(len(labels), sizes)[mesh.get_rank()]
            own = embeddings[mine].clone().requires_grad_()
            loss = part(own, labels[mine])
            of_rows = mine if loss.dim() else slice(None)
            (loss * weights[of_rows]).sum().backward()
            wanted = expected.reshape(-1)[of_rows]
            differences = {
                "loss": relative_error(loss.detach().reshape(-1), wanted.detach()),
                "embeddings": relative_error(own.grad, expected_rows.grad[mine]),
            }
            found[name, part.mode] = differences | state_errors(part, whole)
    return found


def errors_of_weights(mesh, world_rows=(3, 4)):
    """The relative errors of the gradients of weights of rows and labels, and of lam."""
    rows, rank = sum(world_rows), mesh.get_rank()
    mine = parts_of(rows, world_rows)[rank]
    embeddings, labels = batch_of(rows, torch.float64)
    others = labels.flip(0)
    found = []
    for reduction in ("mean", "none"):
        whole = ArcFaceLoss(CLASSES, SIZE, dtype=torch.float64, reduction=reduction)
        part = shard(copy.deepcopy(whole), mesh)
        for name, shape in (("sample_weight", ()), ("label_weight", (2,)), ("lam", ())):
            torch.manual_seed(2)
            expected = torch.rand(rows, *shape, dtype=torch.float64).requires_grad_()
            own = expected.detach()[mine].requires_grad_()
            for loss, weight, here in ((whole, expected, slice(None)), (part, own, mine)):
                given = torch.stack([labels, others], 1) if name == "label_weight" else labels
                more = {"other_labels": others[here]} if name == "lam" else {}
                loss(embeddings[here], given[here], **more, **{name: weight}).sum().backward()
            found.append(relative_error(own.grad, expected.grad[mine]))
    return found


def odd_rows(mesh, dtype, rows=5, size=3):
    """Whether rows whose bytes are no multiple of eight give the loss of one process."""
    whole = ArcFaceLoss(CLASSES, size)
    part = shard(copy.deepcopy(whole), mesh)
    embeddings, labels = torch.randn(rows, size).to(dtype), torch.arange(rows) % CLASSES
    found = part(embeddings, labels), whole(embeddings, labels)  # on each rank the same rows
    return torch.allclose(*found, rtol=1e-5)


def errors_in_chunks(mesh, *arguments):
    """The same, with several chunks of classes on the ranks that have more than one class."""
    with in_chunks_of(2 if mesh.size() < 3 else 1):
        return errors_of_family(mesh, *arguments)


def state_errors(part, whole):
    """Of the gradients of the parameters, and of the buffers."""
    place = part.shard
    each = whole.sub_centers
    here = slice(place.first * each, (place.first + place.count) * each)
    differences = {"weight": relative_error(part.weight.grad, whole.weight.grad[here])}
    for name, parameter in whole.named_parameters():
        if name != "weight":
            differences[name] = relative_error(getattr(part, name).grad, parameter.grad)
    buffers = dict(part.named_buffers())
    for name, buffer in whole.named_buffers():
        differences[name] = relative_error(buffers[name].double(), buffer.double())
    return differences


def recorded(module, names, calls):
    """Replace functions of a module by such that note their name and the shape of their input.

    And, of a collective that was only begun, when it is waited for.
    """
    for name in names:
        original = getattr(module, name)

        def noting(*arguments, _name=name, _original=original, **options):
            tensor = arguments[1] if _name in ("_all_gather", "_reduce_scatter") else arguments[0]
            calls.append((_name, tuple(tensor.shape)))
            found = _original(*arguments, **options)
            return Begun(_name, found, calls) if options.get("async_op") else found

        yield patch.object(module, name, noting)


class Begun:
    """A collective that was begun."""

    def __init__(self, name, work, calls):
        self.name, self.work, self.calls = name, work, calls

    def wait(self):
        self.calls.append((f"{self.name} ends", ()))
        self.work.wait()


def calls_of_a_step(mesh, build, rows, **options):
    """The collectives of a second step, and the products of which each begins a gradient."""
    loss = shard(build(50, SIZE, **options), mesh)
    embeddings, labels = batch_of(rows, torch.float32, 50)
    embeddings.requires_grad_()
    loss(embeddings, labels).backward()  # the first agrees on sizes
    calls = []
    with ExitStack() as stack:
        for patched in recorded(shards, ["_all_gather", "_reduce_scatter"], calls):
            stack.enter_context(patched)
        for patched in recorded(dist, ["all_reduce", "broadcast", "barrier"], calls):
            stack.enter_context(patched)
        for patched in recorded(passes, ["multiply"], calls):
            stack.enter_context(patched)
        loss(embeddings, labels).backward()
    return calls


def peak_of_a_step(mesh, classes, rows, **options):
    """The most bytes that a step holds beyond the weight, its gradient apart."""
    loss = shard(ArcFaceLoss(classes, SIZE, **options), mesh)
    embeddings, labels = batch_of(rows, torch.float32, classes)
    embeddings.requires_grad_()
    loss(embeddings, labels).backward()
    return peak_bytes(lambda: loss(embeddings, labels).backward())


def network(seed=5, dtype=torch.float64):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, SIZE)
    ).to(dtype)


def steps_of(count, rows, classes):
    generator = torch.Generator().manual_seed(9)
    centres = torch.randn(classes, 10, generator=generator, dtype=torch.float64)
    for _ in range(count):
        labels = torch.randint(classes, (rows,), generator=generator)
        noise = torch.randn(rows, 10, generator=generator, dtype=torch.float64)
        yield centres[labels] + 0.3 * noise, labels


def training(mesh, backbone, build, steps=20, accumulate=1):
    """The losses of a training with sharded classes, of one without, and their last weights."""
    classes, rows = 13, 12
    whole, alone = build(classes, SIZE, dtype=torch.float64), network()
    part = shard(copy.deepcopy(whole), mesh, backbone="exact" if backbone == "alone" else "ddp")
    spread = wrapped(network(), mesh, backbone)
    found, expected = [], []
    optimizers = [
        torch.optim.AdamW([*net.parameters(), *loss.parameters()], lr=1e-2, weight_decay=0.01)
        for net, loss in ((spread, part), (alone, whole))
    ]
    for number, (inputs, labels) in enumerate(steps_of(steps * accumulate, rows, classes)):
        cut = 3 + number % 5  # batches of different sizes
        sizes = (cut, rows - cut) if mesh.size() == 2 else (rows,)
        mine = parts_of(rows, sizes)[mesh.get_rank()]
        for net, loss, at, losses in (
            (spread, part, mine, found),
            (alone, whole, slice(None), expected),
        ):
            value = loss(net(inputs[at]), labels[at])
            (value / accumulate).backward()
            losses.append(value.item())
        if number % accumulate == accumulate - 1:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    centres = unshard(part).weight
    return max(
        relative_error(torch.tensor(found), torch.tensor(expected)),
        relative_error(centres.detach(), whole.weight.detach()),
    ), (expected[0], expected[-1])


def wrapped(net, mesh, backbone):
    if backbone == "ddp":
        return torch.nn.parallel.DistributedDataParallel(net, process_group=mesh.get_group())
    if backbone == "fsdp":
        return fully_shard(net, mesh=mesh)
    return net


def mixed_training(mesh, compiled=False):
    """Losses under autocast, with a GradScaler, DDP and activation checkpointing: on every rank."""
    net = wrapped(network(dtype=torch.float32), mesh, "ddp")
    loss = shard(ArcFaceLoss(13, SIZE, scale=16.0), mesh, backbone="ddp")
    run = torch.compile(loss, backend="eager") if compiled else loss
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    losses = []
    for inputs, labels in steps_of(30, 16, 13):
        mine = parts_of(16, (9, 7))[mesh.get_rank()]
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = checkpoint(net, inputs[mine].float(), use_reentrant=False)
            value = run(embeddings, labels[mine])
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, scaler.get_scale(), [p.detach().clone() for p in net.parameters()]


def refusals(mesh, batches, good):
    """The error that a bad batch raises on this rank, and whether a good one works after it."""
    loss = shard(ArcFaceLoss(10, SIZE), mesh, batch_size=4)
    rank = mesh.get_rank()
    try:
        loss(*batches[rank])
    except (ValueError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = "none"
    return found, loss(*good).item()


def alone_after_a_death(mesh):
    """What a rank is told when the other dies between two steps, and how long it waited."""
    loss = shard(ArcFaceLoss(10, SIZE), mesh)
    embeddings, labels = batch_of(4, torch.float32, 10)
    loss(embeddings, labels)
    if mesh.get_rank() == 1:
        os._exit(1)
    try:
        loss(embeddings, labels)
    except RuntimeError as error:
        return str(error)


def alone_while_another_waits(mesh, told):
    """What a rank is told that the other leaves alone until then, which the file `told` says."""
    loss = shard(ArcFaceLoss(10, SIZE), mesh)
    embeddings, labels = batch_of(4, torch.float32, 10)
    loss(embeddings, labels)
    if mesh.get_rank() == 1:
        while not told.exists():
            time.sleep(0.05)
        return None
    # Only now, for what comes before may take any time.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), mesh.get_group())
    try:
        loss(embeddings, labels)
    except RuntimeError as error:
        return str(error)
    finally:
        told.touch()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.05),
}


def sampled_loss(mesh, rate, classes=40, seed=7, optimizer="sgd", **options):
    torch.manual_seed(2)
    loss = shard(
        ArcFaceLoss(classes, SIZE, dtype=torch.float64, **options),
        mesh,
        sample_rate=rate,
        seed=seed,
    )
    made = OPTIMIZERS[optimizer](loss.parameters())
    shard_optimizer(made, loss)
    return loss, made


def sampled_step(loss, optimizer, number, rows=3, classes=40):
    generator = torch.Generator().manual_seed(number)
    embeddings = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    optimizer.zero_grad()
    value = loss(embeddings, labels)
    value.backward()
    optimizer.step()
    return value.item(), labels


def rows_that_move(mesh, optimizer, **options):
    """Of each step: the rows sampled, those whose weight moved, and whose state did."""
    loss, made = sampled_loss(mesh, 0.2, optimizer=optimizer, **options)
    found = []
    for number in range(6):
        before = loss.weight.detach().clone()
        states = {k: v.clone() for k, v in made.state.get(loss.weight, {}).items() if v.dim()}
        step = functools.partial(sampled_step, loss, made, number)
        (_, labels), sampled = drawn_in(step)
        moved = (loss.weight.detach() != before).any(1).nonzero().flatten()
        of_state = set()
        for name, value in made.state[loss.weight].items():
            if value.dim():
                old = states.get(name, torch.zeros_like(value))
                of_state |= set((value != old).any(1).nonzero().flatten().tolist())
        gradient = loss.weight.grad.coalesce()
        here = [label - loss.shard.first for label in labels.tolist()]
        found.append(
            {
                "sampled": sampled,
                "rows of gradient": gradient.indices()[0].tolist(),
                "moved": moved.tolist(),
                "state": sorted(of_state),
                "targets": [label for label in here if 0 <= label < loss.shard.count],
                "bytes": gradient.values().nbytes,
            }
        )
    return found


def sample_of_one_label(mesh):
    """The classes that a rank samples where all rows have class 0."""
    loss, _ = sampled_loss(mesh, 0.5)
    rows, labels = torch.randn(2, SIZE, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    return drawn_in(lambda: loss(rows, labels))[1]


def sampled_against_dense(mesh, optimizer):
    """Where all classes happen to be sampled, the bits of loss, weight and state are the same."""
    outcomes = []
    for rate in (1.0, 0.999):
        loss, made = sampled_loss(mesh, rate, optimizer=optimizer)
        losses = [sampled_step(loss, made, number)[0] for number in range(4)]
        state = [v for v in made.state[loss.weight].values() if v.dim()]
        outcomes.append((torch.tensor(losses), loss.weight.detach(), *state))
        is_sparse = loss.weight.grad.is_sparse
    return is_sparse, all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


def momentum_by_hand(mesh):
    """Momentum of the rows sampled, row by row, against SGD's formula in the order of sampling."""
    loss, made = sampled_loss(mesh, 0.3)
    weight, momentum = loss.weight.detach().clone(), torch.zeros_like(loss.weight)
    for number in range(8):
        sampled_step(loss, made, number)
        gradient = loss.weight.grad.coalesce()
        for row, values in zip(gradient.indices()[0].tolist(), gradient.values(), strict=True):
            momentum[row] = 0.9 * momentum[row] + (values + 0.05 * weight[row])
            weight[row] -= 0.1 * momentum[row]
    return relative_error(loss.weight.detach(), weight)


def accumulated_samples(mesh):
    """The gradient of two batches with different samples is the sum of theirs."""
    loss, _ = sampled_loss(mesh, 0.2)
    gradients = []
    for number in range(2):
        embeddings, labels = batch_of(3 + number, torch.float64, 40)
        loss(embeddings, labels).backward()
        gradients.append(loss.weight.grad.to_dense().clone())
    first, both = gradients
    loss.batches = 1
    loss.weight.grad = None
    embeddings, labels = batch_of(4, torch.float64, 40)
    loss(embeddings, labels).backward()
    return relative_error(both - first, loss.weight.grad.to_dense())


def built(mesh, is_sharded, optimizer, rate=1.0, **options):
    torch.manual_seed(4)
    loss = ArcFaceLoss(11, SIZE, dtype=torch.float64, **options)
    net = network()
    if is_sharded:
        # All ranks have the same rows, as if a backbone averaged over them.
        loss = shard(loss, mesh, sample_rate=rate, backbone="ddp")
    made = OPTIMIZERS[optimizer]([*net.parameters(), *loss.parameters()])
    if is_sharded:
        shard_optimizer(made, loss)
    return torch.nn.ModuleList([net, loss]), made


def steps_with(modules, optimizer, numbers):
    """The losses of some steps, with the same rows on every rank, so that their number is free."""
    net, loss = modules
    losses = []
    for number, (inputs, labels) in enumerate(steps_of(max(numbers) + 1, 6, 11)):
        if number in numbers:
            optimizer.zero_grad()
            value = loss(net(inputs), labels)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def train_and_save(mesh, folder, is_sharded, optimizer, **options):
    """Three steps, a checkpoint, and the losses of two steps after it."""
    modules, made = built(mesh, is_sharded, optimizer, **options)
    steps_with(modules, made, range(3))
    save(folder, modules, made)
    return steps_with(modules, made, range(3, 5))


def load_and_train(mesh, folder, is_sharded, optimizer, **options):
    """The losses of two steps after that checkpoint, which this world loads."""
    modules, made = built(mesh, is_sharded, optimizer, **options)
    with torch.no_grad():
        for parameter in modules.parameters():
            parameter.add_(1.0)
    load(folder, modules, made)
    return steps_with(modules, made, range(3, 5))


def load_each(mesh, folders, *arguments, **options):
    """The losses after each of some checkpoints."""
    return [load_and_train(mesh, folder, *arguments, **options) for folder in folders]


def die_while_saving(mesh, folder):
    """The second rank dies when its part of a second checkpoint is half written."""
    modules, made = built(mesh, True, "adamw")
    steps_with(modules, made, range(3))
    save(folder, modules, made)
    steps_with(modules, made, range(3, 5))
    if mesh.get_rank() == 1:
        from torch.distributed.checkpoint import filesystem

        def write_half(self, *arguments, **options):
            os._exit(1)

        filesystem.FileSystemWriter.write_data = write_half
    try:
        save(folder, modules, made)
    except Exception as error:
        return type(error).__name__
    return "saved"


def mixed_rows(mesh, batch_size, num_labels):
    """Several labels and weights of rows, in batches of unequal sizes, against the whole loss."""
    embeddings, labels = batch_of(12, torch.float64)
    given = {"other_labels": labels.roll(1), "lam": torch.linspace(0, 1, 12, dtype=torch.float64)}
    if num_labels > 2:
        labels = torch.stack([labels.roll(k) for k in range(num_labels)], 1)
        labels[::2, 1] = -100
        given = {
            "label_weight": torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
        }
    weights = torch.linspace(0.2, 2, 12, dtype=torch.float64)
    torch.manual_seed(1)
    whole = ArcFaceLoss(CLASSES, SIZE, dtype=torch.float64)
    part = shard(copy.deepcopy(whole), mesh, batch_size=batch_size)
    mine = parts_of(12, (5, 0, 7))[mesh.get_rank()]
    own, rows = embeddings[mine].clone().requires_grad_(), embeddings.clone().requires_grad_()
    expected = whole(rows, labels, weights, **given)
    mine_given = {name: value[mine] for name, value in given.items()}
    found = part(own, labels[mine], weights[mine], **mine_given)
    expected.backward()
    found.backward()
    here = slice(part.shard.first, part.shard.first + part.shard.count)
    return max(
        relative_error(found.detach(), expected.detach()),
        relative_error(own.grad, rows.grad[mine]),
        relative_error(part.weight.grad, whole.weight.grad[here]),
    )


def drawn_margins(mesh, build):
    """Losses of random margins: with one draw for all ranks, and another at each step."""
    torch.manual_seed(mesh.get_rank())  # as different as in a real training
    loss = shard(build(CLASSES, SIZE), mesh)
    embeddings, labels = batch_of(4, torch.float32)
    state = torch.get_rng_state()
    losses = [loss(embeddings, labels).item() for _ in range(2)]
    return losses, torch.equal(state, torch.get_rng_state())


def drawn_centres(mesh, classes, seed):
    loss = shard(ArcFaceLoss(classes, 64, device="meta"), mesh, seed=seed)
    assert loss(torch.randn(2, 64), torch.tensor([0, classes - 1])).isfinite()
    return loss.weight.detach().clone()


def two_dimensions(mesh, classes_over_all):
    """A hybrid: data in replicas, classes over all ranks or over those of a replica."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "classes"))
    torch.manual_seed(6)
    whole, alone, net = ArcFaceLoss(7, SIZE, dtype=torch.float64), network(), network()
    if classes_over_all:
        part = shard(copy.deepcopy(whole), mesh, backbone="ddp")
        fully_shard(net, mesh=grid)
        run = part
    else:
        part = shard(copy.deepcopy(whole), grid["classes"], backbone="ddp")
        net = wrapped(net, mesh, "ddp")
        replicas = grid["replicas"].get_group()
        run = torch.nn.parallel.DistributedDataParallel(part, process_group=replicas)
    inputs, labels = next(steps_of(1, 12, 7))
    mine = parts_of(12, 3)[mesh.get_rank()]
    run(net(inputs[mine]), labels[mine]).backward()
    whole(alone(inputs), labels).backward()
    here = slice(part.shard.first, part.shard.first + part.shard.count)
    errors = [relative_error(part.weight.grad, whole.weight.grad[here])]
    for found, expected in zip(net.parameters(), alone.parameters(), strict=True):
        gradient = found.grad.full_tensor() if classes_over_all else found.grad
        errors.append(relative_error(gradient, expected.grad))
    return max(errors)


def drawn_anew(mesh):
    """All centres after each rank, with the same seed as the others, has drawn its own."""
    part = shard(al.ArcFaceLoss(4 * mesh.size(), SIZE), mesh)
    torch.manual_seed(0)
    part.reset_parameters()
    first = unshard(part).weight.detach()
    part.reset_parameters()
    return first, unshard(part).weight.detach()


def whole_again(mesh):
    torch.manual_seed(3)
    loss = al.SubCenterArcFaceLoss(5, SIZE, schedule=al.MarginWarmup(10))
    centres = loss.weight.detach().clone()
    part = shard(loss, mesh, sample_rate=0.5)
    assert part is loss
    assert isinstance(part, ShardedLoss)
    assert isinstance(part, al.SubCenterArcFaceLoss)
    again = unshard(part)
    again.extend(1)
    again.register_forward_pre_hook(lambda *given: None)
    assert not part._forward_pre_hooks
    told = []
    for call in (
        lambda: part.reset_parameters(torch.ones(5, SIZE)),
        lambda: part.drop_sub_centers([]),
        lambda: shard(part, mesh),
        lambda: unshard(again),
        lambda: shard_optimizer(torch.optim.SGD(again.parameters()), again),
        lambda: shard_optimizer(torch.optim.SGD(again.parameters()), part),
        lambda: shard(torch.nn.Linear(2, 2), mesh),
        lambda: shard(al.ArcFaceLoss(5, SIZE), mesh, backbone="fsdp"),
        lambda: shard(al.ArcFaceLoss(5, SIZE), mesh, sample_rate=-0.1),
        lambda: shard(al.ArcFaceLoss(5, SIZE), mesh, batch_size=0),
        lambda: shard(al.P2SGradLoss(5, SIZE), mesh, sample_rate=0.5),
        lambda: shard(al.ArcFaceLoss(5, SIZE, label_smoothing=0.1), mesh, sample_rate=0.5),
        lambda: shard(al.CurricularFaceLoss(5, SIZE, device="meta"), mesh),
        lambda: shard(al.UniFaceLoss(5, SIZE, device="meta"), mesh),
        lambda: shard(al.ArcFaceLoss(5, SIZE), mesh, seed=1.5),
        lambda: shard(al.ArcFaceLoss(5, SIZE), init_device_mesh("cpu", (1, mesh.size()))),
        lambda: shard(al.ArcFaceLoss(5, SIZE), None),
        lambda: AngularMonitor(part),
    ):
        try:
            call()
        except (ValueError, TypeError, RuntimeError) as error:
            told.append(f"{type(error).__name__}: {error}")
        else:
            told.append("nothing")
    plain = type(again) is al.SubCenterArcFaceLoss and "shard" not in repr(again)
    return plain, torch.equal(again.weight.detach()[:15], centres), told
