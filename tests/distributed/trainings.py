"""What users do around a sharded loss; each process compares with the whole loss by itself."""

import copy
import functools
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint as checkpointed

import angular_losses as al
from angular_losses.distributed import (
    checkpoint,
    clip_grad_norm_,
    load,
    save,
    shard,
    shard_optimizer,
    unshard,
)
from tests.batches import drawn_in
from tests.distributed.scenarios import (
    SIZE,
    batch_of,
    network,
    parts_of,
    relative_error,
    steps_of,
)

CLASSES = 13


class Both(torch.nn.Module):
    """A network and its loss, as Lightning and accelerate wrap them."""

    def __init__(self, mesh, classes=CLASSES, **options):
        super().__init__()
        self.network, self.loss = network(), built_loss(classes)
        if mesh is not None:
            shard(self.loss, mesh, backbone="ddp", **options)

    def forward(self, inputs, labels):
        return self.loss(self.network(inputs), labels)


def built_loss(classes=CLASSES):
    torch.manual_seed(5)
    schedule = al.MarginWarmup(4)
    return al.ArcFaceLoss(classes, SIZE, scale=16.0, schedule=schedule, dtype=torch.float64)


def told(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def wrapped(mesh, how, **options):
    """Network and loss, wrapped in one of the ways of the documentation."""
    both = Both(mesh, **options)
    if how == "ddp, network":
        both.network = DistributedDataParallel(both.network)
    elif how == "ddp, both":
        return DistributedDataParallel(both)
    elif how == "ddp, both but the centres":
        both._ddp_params_and_buffers_to_ignore = ["loss.weight"]
        return DistributedDataParallel(both)
    elif how == "fully_shard, network":
        fully_shard(both.network, mesh=mesh)
    elif how == "fully_shard, both":
        fully_shard(both, mesh=mesh)
    elif how == "fully_shard, both but the centres":
        fully_shard(both, mesh=mesh, ignored_params={both.loss.weight})
    return both


def training(mesh, how, folder, max_norm=None, **options):
    """The largest differences of losses, norms and centres from those of one process.

    Scheduled, saved, and loaded again.
    """
    run, alone = wrapped(mesh, how, **options), Both(None)
    loss = run.module.loss if isinstance(run, DistributedDataParallel) else run.loss
    optimizers = [
        torch.optim.SGD(al.parameter_groups(model, lr=0.1), momentum=0.9) for model in (run, alone)
    ]
    shard_optimizer(optimizers[0], loss)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in optimizers]
    errors = []
    for inputs, labels in steps_of(5, 12, CLASSES):
        sizes = (5, 7) if mesh.size() == 2 else (12,)
        mine = parts_of(12, sizes)[mesh.get_local_rank()]
        values = run(inputs[mine], labels[mine]), alone(inputs, labels)
        for value in values:
            value.backward()
        if max_norm is not None:
            norm = clip_grad_norm_(run, max_norm)
            expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm)
            assert expected > max_norm
            errors.append(relative_error(norm, expected))
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        errors.append(relative_error(*(value.detach() for value in values)))
    save(folder, run, optimizers[0])
    with torch.no_grad():
        for parameter in run.parameters():
            parameter.zero_()
    load(folder, run, optimizers[0])
    errors.append(relative_error(unshard(loss).weight.detach(), alone.loss.weight.detach()))
    with torch.no_grad():
        errors.append(relative_error(run(inputs, labels), alone(inputs, labels)))
    return max(errors)


def overflow_on_one_rank(mesh):
    """A gradient of one rank's centres is infinite: no rank steps, and all have a smaller scale."""
    loss = shard(al.ArcFaceLoss(CLASSES, SIZE), mesh)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    scaler = ShardedGradScaler("cpu", init_scale=2.0, process_group=mesh.get_group())
    before = loss.weight.detach().clone()
    scaler.scale(loss(*batch_of(4, torch.float32, CLASSES))).backward()
    if mesh.get_rank() == 1:
        loss.weight.grad[0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(loss.weight, before), scaler.get_scale()


def refused_wrapper(mesh, how):
    run = wrapped(mesh, how, classes=4)
    inputs, labels = next(steps_of(1, 4, 4))
    found = told(lambda: run(inputs, labels))
    dist.barrier()  # the other rank may still gather parameters
    return found


def norm_of_sampled(mesh):
    """The norm and the gradients with few classes, against those gathered from all ranks."""
    loss = shard(built_loss(), mesh, sample_rate=0.3)
    embeddings, labels = batch_of(4, torch.float64, CLASSES)
    loss(embeddings, labels).backward()
    dense = loss.weight.grad.to_dense()
    expected = loss.shard.total(dense.square().sum()).sqrt()
    norm = clip_grad_norm_(loss.parameters(), 1e-3)
    clipped = loss.weight.grad.to_dense()
    return max(
        relative_error(norm, expected), relative_error(clipped, dense * 1e-3 / (expected + 1e-6))
    )


def statistics_of_some_ranks(mesh):
    """A mesh of two ranks of four, whose losses exchange statistics with nobody else."""
    some = DeviceMesh("cpu", [0, 1], mesh_dim_names=("classes",))
    if dist.get_rank() > 1:
        return 0.0
    errors = []
    for cls in (al.AdaFaceLoss, al.CurricularFaceLoss, al.AdaCosLoss):
        torch.manual_seed(1)
        whole = cls(CLASSES, SIZE, dtype=torch.float64)
        part = shard(copy.deepcopy(whole), some)
        for number in range(2):
            embeddings, labels = batch_of(6 + number, torch.float64, CLASSES)
            mine = parts_of(6 + number, (4, 2 + number))[some.get_local_rank()]
            found = part(embeddings[mine], labels[mine])
            with al.collectives.over(None):
                expected = whole(embeddings, labels)
            errors.append(relative_error(found.detach(), expected.detach()))
    return max(errors)


def gathered_directions(mesh, classes, sub_centers, before, folder, sizes):
    """KappaFace's margins after four steps, of which another world has done and saved two.

    What it gathers are the rows of its classes; unsharded, extended and loaded whole it is all.
    """
    rows, options = sum(sizes), {"sub_centers": sub_centers, "dtype": torch.float64}
    torch.manual_seed(1)
    whole = al.KappaFaceLoss(classes, SIZE, torch.arange(classes) + 2, **options)
    part = shard(copy.deepcopy(whole), mesh)
    restored = copy.deepcopy(whole)

    def step(number):
        generator = torch.Generator().manual_seed(number)
        embeddings = torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (rows,), generator=generator)
        mine = parts_of(rows, sizes)[mesh.get_rank()]
        part(embeddings[mine], labels[mine])
        whole(embeddings, labels)

    def differences():
        own = part.shard
        yield part.direction_sums, whole.direction_sums[own.first : own.first + own.count]
        again = unshard(part)
        yield again.direction_sums, whole.direction_sums
        yield from ((loss.seen, whole.seen) for loss in (part, again))

    for number in range(2):
        step(number)
    if before is not None:
        with torch.no_grad():
            for kept in (part.direction_sums, part.seen):
                kept.fill_(torch.nan)
        for loss in (part, restored):
            load(before, torch.nn.ModuleList([loss]))
        assert torch.equal(restored.direction_sums, whole.direction_sums)
    save(folder, torch.nn.ModuleList([part]))
    for number in range(2, 4):
        step(number)
    assert all(torch.equal(*pair) for pair in differences())
    for loss in (part, whole):
        loss.extend(3)
    assert all(torch.equal(*pair) for pair in differences())
    part.update_margins()
    with al.collectives.over(None):
        whole.update_margins()
    assert part.seen.sum() == part.direction_sums.count_nonzero() == 0
    return torch.equal(part.margin, whole.margin)


def ignored_rows(mesh, kind):
    """The gradients where one rank's ignored row is not finite."""
    part = shard(kind(CLASSES, SIZE, dtype=torch.float64), mesh)
    embeddings, labels = batch_of(4, torch.float64, CLASSES)
    if mesh.get_rank() == 1:
        embeddings[2], labels[2] = torch.nan, -100
    embeddings.requires_grad_()
    loss = part(embeddings, labels)
    loss.backward()
    values = loss.detach(), embeddings.grad, part.weight.grad
    return all(bool(value.isfinite().all()) for value in values)


def one_budget(mesh):
    """What each rank is told of a budget that would suffice for the last rank alone."""
    classes = 4 * mesh.size() - 1

    def loss(budget):
        part = shard(al.ArcFaceLoss(classes, SIZE, mode="stash", memory_budget=budget), mesh)
        return part(*batch_of(4, torch.float32, classes))

    needed = told(lambda: loss(1)).partition("at least ")[2].partition(" ")[0]
    return told(lambda: loss(int(needed) - 1)), loss(int(needed)).item()


def labels_elsewhere(mesh):
    part = shard(al.ArcFaceLoss(CLASSES, SIZE), mesh)
    embeddings, labels = batch_of(4, torch.float32, CLASSES)
    elsewhere = labels.to("meta") if mesh.get_rank() == 1 else labels
    return told(lambda: part(embeddings, elsewhere)), part(embeddings, labels).item()


class Batches(Joinable):
    """Brings a batch of 0 rows wherever this rank has none and another has one."""

    def __init__(self, mesh, step, empty):
        super().__init__()
        self._group, self._step, self._empty = mesh.get_group(), step, empty

    def join_hook(self, **options):
        hook = JoinHook()
        hook.main_hook = lambda: self._step(*self._empty)
        return hook

    join_device = torch.device("cpu")

    @property
    def join_process_group(self):
        return self._group


def uneven_numbers(mesh):
    """Rank 1 has 3 batches and rank 0 has 5; against one process that has them all."""
    net, loss = DistributedDataParallel(network()), shard(built_loss(), mesh, backbone="ddp")
    alone, whole = network(), built_loss()
    optimizers = [
        torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
        for one, other in ((net, loss), (alone, whole))
    ]

    def step(inputs, labels, models=(net, loss), optimizer=optimizers[0]):
        optimizer.zero_grad()
        models[1](models[0](inputs), labels).backward()
        optimizer.step()

    everything = list(steps_of(5, 8, CLASSES))
    own = [
        (inputs[mine], labels[mine])
        for inputs, labels in everything[: 5 if mesh.get_rank() == 0 else 3]
        for mine in [parts_of(8, (3, 5))[mesh.get_rank()]]
    ]
    batches = Batches(mesh, step, (torch.zeros(0, 10, dtype=torch.float64), own[0][1][:0]))
    with Join([batches]):
        for batch in own:
            Join.notify_join_context(batches)
            step(*batch)
    for number, (inputs, labels) in enumerate(everything):
        rows = slice(8 if number < 3 else 3)
        step(inputs[rows], labels[rows], (alone, whole), optimizers[1])
    return max(
        relative_error(unshard(loss).weight.detach(), whole.weight.detach()),
        *(
            relative_error(one.detach(), other.detach())
            for one, other in zip(net.parameters(), alone.parameters(), strict=True)
        ),
    )


def sampled_classes(mesh, rate, labels, **options):
    """The classes of a rank in a step, and whether it has a gradient of these alone."""
    torch.manual_seed(2)
    loss = shard(al.ArcFaceLoss(40, SIZE, **options), mesh, sample_rate=rate)
    embeddings = torch.randn(len(labels), SIZE)
    value, sampled = drawn_in(lambda: loss(embeddings, torch.tensor(labels)))
    value.backward()
    rows = loss.weight.grad.coalesce().indices()[0].tolist()
    each = loss.sub_centers
    expected = [row * each + number for row in sampled for number in range(each)]
    return sampled, bool(value.isfinite()) and rows == expected


def replicas(mesh, build, rate, sizes, row_weight=None, *, reentrant=None, **options):
    """Classes over two ranks, and two replicas of them, under DistributedDataParallel."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "classes"))
    torch.manual_seed(1)
    whole = build(CLASSES, SIZE, scale=16.0, dtype=torch.float64, **options)
    alone = network()
    part = shard(copy.deepcopy(whole), grid["classes"], backbone="ddp", sample_rate=rate)
    if reentrant is not None:
        forward = part.forward
        part.forward = lambda *given: checkpointed(forward, *given, use_reentrant=reentrant)
    net = DistributedDataParallel(network())
    run = DistributedDataParallel(part, process_group=grid["replicas"].get_group())
    optimizers = [
        torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
        for one, other in ((net, part), (alone, whole))
    ]
    for inputs, labels in steps_of(3, 12, CLASSES):
        mine = parts_of(12, sizes)[dist.get_rank()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        of_own = None if row_weight is None else row_weight[mine]
        value = run(net(inputs[mine]), labels[mine], of_own)
        with torch.no_grad():  # for a log
            part(net(inputs[mine]), labels[mine], of_own)
        value.backward()
        with al.collectives.over(None):
            whole(alone(inputs), labels, row_weight).backward()
        for optimizer in optimizers:
            optimizer.step()
    buffers = dict(whole.named_buffers())
    return max(
        relative_error(found.double(), expected.double())
        for found, expected in [
            (unshard(part).weight.detach(), whole.weight.detach()),
            *((found, buffers[name]) for name, found in part.named_buffers()),
        ]
    )


def refused_replicas(mesh, *arguments):
    return told(lambda: replicas(mesh, *arguments))


def loaded_momentum(mesh, folder, sample_rate):
    """The error of the step after loading into an optimiser made without the saved momentum."""
    (embeddings, labels), made = batch_of(6, torch.float64), []
    for options in ({"momentum": 0.9}, {}):
        loss = shard(built_loss(), mesh, sample_rate=sample_rate)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1, **options)
        shard_optimizer(optimizer, loss)
        made.append((loss, optimizer))
    for number in range(2):
        if number == 1:
            save(folder, *made[0])
            load(folder, *made[1])
        for loss, optimizer in made if number == 1 else made[:1]:
            optimizer.zero_grad()
            loss(embeddings, labels).backward()
            optimizer.step()
    (loss, _), (other, _) = made
    return relative_error(other.weight.detach(), loss.weight.detach())


def pending_steps(mesh, build, rate):
    """The largest error of the gradients of two checkpointed steps before one backward pass."""
    given = [batch_of(6, torch.float64), batch_of(6, torch.float64)]
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        loss = shard(build(CLASSES, SIZE, dtype=torch.float64), mesh, sample_rate=rate)
        rows = [embeddings.clone().requires_grad_() for embeddings, _ in given]
        values = [
            checkpointed(loss, x, labels, use_reentrant=False)
            if is_checkpointed
            else loss(x, labels)
            for x, (_, labels) in zip(rows, given, strict=True)
        ]
        sum(values).backward()
        weight = loss.weight.grad
        found.append([*(x.grad for x in rows), weight.to_dense() if weight.is_sparse else weight])
    return max(map(relative_error, *found))


def weights_of_one_rank(mesh):
    """Whether weights that need a gradient on one rank alone get it."""
    loss, (embeddings, labels) = shard(built_loss(), mesh), batch_of(4, torch.float64)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=mesh.get_rank() == 0)
    loss(embeddings.requires_grad_(), labels, weight).backward()
    return weight.grad is not None and bool(weight.grad.any())


def other_calls(mesh):
    """What each rank is told where the first calls the loss in another way."""
    weight = torch.ones(4, requires_grad=mesh.get_rank() > 0)
    loss, batch, is_first = (
        shard(built_loss(), mesh),
        batch_of(4, torch.float32),
        not mesh.get_rank(),
    )
    return [
        told(lambda: loss(*batch, return_correct=is_first)),
        told(lambda: loss.topk(batch[0]) if is_first else loss.get_logits(batch[0])),
        told(lambda: loss.topk(batch[0], 2) if is_first else loss.topk(batch[0], 3)),
        told(lambda: loss.topk(batch[0]) if is_first else loss(*batch)),
        told(lambda: loss.train(is_first)(*batch)),
        told(lambda: loss.train()(batch[0].clone().requires_grad_(is_first), batch[1], weight)),
    ]


def refused_sampling(mesh):
    """A loss with sampled classes of one process in DistributedDataParallel."""
    run = DistributedDataParallel(al.sample_classes(built_loss(), 0.5))
    return told(lambda: run(*batch_of(4, torch.float32)))


def messages_after_an_evaluation(mesh):
    """The sizes of the messages of a step, of a large evaluation, and of a step again."""
    loss, sizes = shard(built_loss(), mesh), []
    for is_training, rows in ((True, 8), (False, 200), (True, 8)):
        batch = batch_of(rows, torch.float32)
        loss.train(is_training)(*batch)
        with patch.object(loss.shard, "gathered", side_effect=loss.shard.gathered) as gathered:
            loss(*batch)
        sizes.append([each.args[0].shape for each in gathered.call_args_list])
        if not is_training:
            loss.topk(batch[0])
    return sizes


def copies(mesh):
    """A copy of a sharded loss computes the same and is trained by itself; so an average."""
    part = shard(built_loss(), mesh).eval()
    embeddings, labels = batch_of(4, torch.float64, CLASSES)
    before = part(embeddings, labels)
    average = AveragedModel(part)
    other = copy.deepcopy(part)
    with torch.no_grad():
        part.weight.neg_()
    average.update_parameters(part)
    return (
        torch.equal(other(embeddings, labels), before),
        torch.equal(average(embeddings, labels), part(embeddings, labels)),
        other.shard is not part.shard
        and all(each.shard is other.shard for each in other.gatherings),
        other.own_weight() is other.weight,
    )


def refused_optimizers(mesh):
    """What is told of optimisers that would step sampled rows wrongly."""
    loss = shard(built_loss(), mesh, sample_rate=0.5)
    unprepared = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
    copied = copy.deepcopy(loss)
    unprepared_too = torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.9)
    for each in (loss, copied):
        each(*batch_of(4, torch.float64, CLASSES)).backward()
    rprop = torch.optim.Rprop(loss.parameters())
    whole = shard(built_loss(), mesh)
    shard_optimizer(torch.optim.Rprop(whole.parameters()), whole)
    adafactor = torch.optim.Adafactor(whole.parameters())
    return (
        told(unprepared.step),
        told(unprepared_too.step),
        told(lambda: shard_optimizer(rprop, loss)),
        told(lambda: shard_optimizer(adafactor, whole)),
    )


def refused_saves(mesh, folder):
    """What is told where an optimiser has a state and was not prepared, and where it was."""
    loss, found = shard(built_loss(12), mesh), []
    for _ in range(2):
        optimizer = torch.optim.AdamW(loss.parameters())
        loss(*batch_of(4, torch.float64, 12)).backward()
        optimizer.step()
        for _ in range(2):
            found.append(told(functools.partial(save, folder, loss, optimizer)))
            shard_optimizer(optimizer, loss)
        loss.extend(2)
    return found


def prepared_twice(mesh, folder, sub_centers):
    """Moments saved and loaded after the same optimiser was prepared for new classes too."""
    loss = shard(al.SubCenterArcFaceLoss(4, SIZE, sub_centers=sub_centers), mesh)
    optimizer = torch.optim.AdamW(loss.parameters())
    shard_optimizer(optimizer, loss)
    loss.extend(2)
    optimizer.param_groups[0]["params"] = [loss.weight]
    shard_optimizer(optimizer, loss)
    loss(*batch_of(4, torch.float32, 6)).backward()
    optimizer.step()
    moments = optimizer.state[loss.weight]["exp_avg"].clone()
    save(folder, loss, optimizer)
    optimizer.state[loss.weight]["exp_avg"].zero_()
    load(folder, loss, optimizer)
    return torch.equal(optimizer.state[loss.weight]["exp_avg"], moments)


def full_states(mesh, sub_centers):
    """Whether torch's full states of a sampled loss are loaded into a sharded and a whole one."""
    full = states.StateDictOptions(full_state_dict=True)
    options = {"sub_centers": sub_centers}
    loss = shard(al.SubCenterArcFaceLoss(5, SIZE, **options), mesh, sample_rate=0.9)
    optimizer = torch.optim.AdamW(loss.parameters())
    shard_optimizer(optimizer, loss)
    loss(*batch_of(4, torch.float32, 5)).backward()
    optimizer.step()
    optimizer.zero_grad()
    of_loss, of_optimizer = states.get_state_dict(loss, optimizer, options=full)
    whole, part = (al.SubCenterArcFaceLoss(5, SIZE, **options) for _ in range(2))
    whole.load_state_dict(of_loss)
    shard(part, mesh, sample_rate=0.9)
    other = torch.optim.AdamW(part.parameters())
    shard_optimizer(other, part)
    states.set_state_dict(
        part,
        other,
        model_state_dict=of_loss,
        optim_state_dict=of_optimizer,
        options=full,
    )
    return (
        torch.equal(unshard(loss).weight, whole.weight),
        torch.equal(loss.weight, part.weight),
        part.batches == loss.batches == 1,
        torch.equal(optimizer.state[loss.weight]["exp_avg"], other.state[part.weight]["exp_avg"]),
    )


def uneven_sub_centres(mesh, folder):
    """A loss under fully_shard whose classes do not divide by the ranks, and its moments."""

    def built():
        loss = al.SubCenterArcFaceLoss(5, SIZE)
        fully_shard(loss, mesh=mesh)
        optimizer = torch.optim.AdamW(loss.parameters())
        return loss, optimizer

    (loss, optimizer), (other, fresh) = built(), built()
    loss(*batch_of(4, torch.float32, 5)).backward()
    optimizer.step()
    optimizer.zero_grad()
    save(folder, loss, optimizer)
    load(folder, other, fresh)
    whole = al.SubCenterArcFaceLoss(5, SIZE)
    load(folder, whole)
    moments = (
        each.state[parameter]["exp_avg"].full_tensor()
        for each, parameter in ((optimizer, loss.weight), (fresh, other.weight))
    )
    weights = loss.weight.full_tensor(), other.weight.full_tensor()
    return torch.equal(*moments), torch.equal(*weights), torch.equal(whole.weight, weights[0])


def assigned(mesh):
    """The bytes kept after a rank's centres were assigned from those of a whole loss."""
    whole = al.ArcFaceLoss(CLASSES, SIZE)
    part = shard(copy.deepcopy(whole), mesh)
    part.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(unshard(part).weight, whole.weight)
    return part.weight.untyped_storage().nbytes() - part.weight.nbytes


def sub_centres_saved_in_a_wrapper(mesh, folder):
    """A whole loss in a wrapper, loaded into a sharded one without it."""
    whole, part = (
        torch.nn.ModuleList([network(), al.SubCenterArcFaceLoss(CLASSES, SIZE)]) for _ in range(2)
    )
    wrapped = DistributedDataParallel(whole)
    save(folder, wrapped, torch.optim.SGD(wrapped.parameters()))
    shard(part[1], mesh)
    load(folder, part, torch.optim.SGD(part.parameters()))
    return torch.equal(unshard(part[1]).weight, whole[1].weight)


def steps_around_sampled_rows(mesh, folder):
    """A closure, a scheduler on either side, and an interrupt inside of a step."""
    loss = shard(built_loss(), mesh, sample_rate=0.3)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    shard_optimizer(optimizer, loss)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    embeddings, labels = batch_of(4, torch.float64, CLASSES)

    def closure():
        optimizer.zero_grad()
        value = loss(embeddings, labels)
        value.backward()
        return value

    values = [optimizer.step(closure).item()]
    closure()
    optimizer.step()
    scheduler.step()
    modules = torch.nn.ModuleList([loss])
    save(folder, modules, optimizer)
    state = {name: value.clone() for name, value in optimizer.state[loss.weight].items()}
    weight = loss.weight.detach().clone()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    try:
        optimizer.step(closure)
    except KeyboardInterrupt:
        values.append("interrupted")
    hook.remove()
    same = all(
        torch.equal(value, state[name]) for name, value in optimizer.state[loss.weight].items()
    )
    same = same and torch.equal(loss.weight, weight)
    save(folder, modules, optimizer)
    load(folder, modules, optimizer)
    loss.weight.data = weight[:1]
    return values[1:], same, told(lambda: save(folder, modules, optimizer))


def failing_saves(mesh, folder):
    """What each rank is told if rank 0 cannot write, and what rank 1 takes for the current one."""
    modules = torch.nn.ModuleList([shard(built_loss(), mesh)])
    save(folder, modules)
    save(folder, modules)

    def full(*_):
        raise OSError(28, "No space left on device")

    rank = mesh.get_rank()
    with patch.object(checkpoint, "_write", full if rank == 0 else checkpoint._write):
        of_zero = told(lambda: save(folder, modules))
    with patch.object(checkpoint, "_state", full if rank == 1 else checkpoint._state):
        of_one = told(lambda: save(folder, modules))
    load(folder, modules)
    stale = folder if rank == 0 else f"{folder}/../elsewhere"
    with patch.object(checkpoint, "_current", lambda _: checkpoint.Path(stale) / "000002"):
        load(folder, modules)
    save(folder, modules)
    load(folder, modules)
    return of_zero, of_one


def logits(mesh, sub_centers, sizes):
    """Logits, the largest of them, and all with two classes more, against the whole loss."""
    torch.manual_seed(1)
    whole = al.SubCenterArcFaceLoss(CLASSES, SIZE, dtype=torch.float64, sub_centers=sub_centers)
    init = torch.randn(2, SIZE)
    part = shard(copy.deepcopy(whole), mesh)
    embeddings, labels = batch_of(sum(sizes), torch.float64, CLASSES)
    mine = parts_of(sum(sizes), sizes)[mesh.get_rank()]
    errors = []
    for number in range(3):
        if number == 1:
            part.extend(1)
            whole = unshard(part)
        if number == 2:
            part.extend(2, init)
            if sub_centers == 1:
                whole.extend(2, init)
            else:
                whole = unshard(part)
        expected = whole.get_logits(embeddings[mine])
        assert part.get_logits(embeddings[mine]).shape == expected.shape
        errors.append(relative_error(part.get_logits(embeddings[mine]), expected.detach()))
        for k in (1, 3, part.num_classes):
            values, classes = part.topk(embeddings[mine], k)
            wanted = expected.topk(k, 1)
            errors.append(relative_error(values, wanted.values.detach()))
            assert torch.equal(classes, wanted.indices)
        loss, correct = part(embeddings[mine], labels[mine], return_correct=True)
        errors.append(relative_error(loss, whole(embeddings, labels)))
        assert torch.equal(correct, expected.argmax(1) == labels[mine])
        errors.append(relative_error(unshard(part).weight, whole.weight))
    return max(errors), tuple(part.weight.shape)
