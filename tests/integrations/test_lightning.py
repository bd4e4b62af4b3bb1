"""Lightning: the loss is a submodule of the LightningModule."""

import functools
import os

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

import angular_losses as al
from angular_losses.distributed import (
    ShardedLoss,
    clip_grad_norm_,
    load,
    save,
    shard,
    shard_optimizer,
    unshard,
)
from tests.integrations import (
    examples,
    network_and_loss,
    of_tools,
    plain,
    same,
    sgd,
    state_of,
    tool,
)

lightning = tool("lightning")
pytestmark = of_tools


class Recogniser(lightning.LightningModule):
    def __init__(self, **options):
        super().__init__()
        self.network, self.loss = network_and_loss(**options)

    def training_step(self, batch, _):
        points, labels = batch
        return self.loss(self.network(points), labels)

    def validation_step(self, batch, _):
        points, labels = batch
        self.log("aside", self.loss(self.network(points), labels), sync_dist=True)

    def configure_optimizers(self):
        return sgd(self.network, self.loss)

    def state(self):
        return state_of(self.network, self.loss)


class ByHand(Recogniser):
    """Manual optimisation: an optimiser for the network, and one for the centres."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        value = super().training_step(batch, index)
        for optimiser in self.optimizers():
            optimiser.zero_grad()
        self.manual_backward(value)
        for optimiser in self.optimizers():
            optimiser.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.network, self.loss)]


class Sharded(Recogniser):
    """As docs/how_to/distributed_training.md has it."""

    def __init__(self, directory, **options):
        super().__init__(**options)
        self.directory = directory
        self._ddp_params_and_buffers_to_ignore = ["loss.weight"]

    def configure_model(self):
        if not isinstance(self.loss, ShardedLoss):
            mesh = init_device_mesh(self.device.type, (self.trainer.world_size,))
            shard(self.loss, mesh, backbone="ddp")

    def configure_optimizers(self):
        optimiser = sgd(self.network, self.loss)
        shard_optimizer(optimiser, self.loss)
        return optimiser

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **others):
        clip_grad_norm_(self, gradient_clip_val)

    def on_train_epoch_end(self):
        save(self.directory, self, self.optimizers().optimizer)

    def state(self):
        return state_of(self.network, unshard(self.loss))


def batches(size=8, rank=0, ranks=1):
    """In order; a rank has its part of each batch."""
    points, labels = (values[rank::ranks] for values in examples())
    return DataLoader(TensorDataset(points, labels), batch_size=size // ranks)


def trainer(folder, epochs=3, **options):
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def test_training_is_that_of_a_plain_loop(tmp_path):
    model = Recogniser()
    aside = DataLoader(TensorDataset(*examples(seed=1)), batch_size=8)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer(tmp_path, **options).fit(model, batches(), aside)
    expected = plain(*network_and_loss(), [*batches()] * 3, accumulate=2, clip=0.5)
    assert same(model.state(), expected, 1e-12)
    assert not same(model.state(), state_of(*network_and_loss()), 1e-2)


def test_validation_leaves_schedule_and_statistics_alone(tmp_path):
    model = Recogniser(cls=al.AdaFaceLoss)
    before = model.state()
    trainer(tmp_path).validate(model, batches(), verbose=False)
    assert same(model.state(), before)


def test_manual_optimisation_is_that_of_a_plain_loop(tmp_path):
    model, (network, loss) = ByHand(), network_and_loss()
    trainer(tmp_path).fit(model, batches())
    optimiser = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.05)
    assert same(model.state(), plain(network, loss, [*batches()] * 3, optimiser=optimiser), 1e-12)


def test_training_resumes_bit_for_bit(tmp_path):
    whole, first, second = (Recogniser(cls=al.AdaFaceLoss, seed=seed) for seed in (0, 0, 1))
    trainer(tmp_path, 4).fit(whole, batches())
    half = trainer(tmp_path, 2)
    half.fit(first, batches())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, 4).fit(second, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert same(second.state(), whole.state())
    assert not same(first.state(), whole.state())


def train_on_each(mesh, folder, build, **options):
    """With the process group that is there, as under torchrun."""
    size, rank = mesh.size(), mesh.get_rank()
    variables = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    try:
        model = build()
        options |= {"devices": size, "strategy": "ddp", "use_distributed_sampler": False}
        run = trainer(folder, **options)
        run.fit(model, batches(8, rank, size))
        state = model.state()
        if isinstance(model, Sharded):
            before = model.loss.weight.detach().clone()
            model.loss.weight.data.zero_()
            load(folder, model, model.optimizers().optimizer)
            assert torch.equal(model.loss.weight, before)
        return state
    finally:
        for name in (*variables, "TORCHELASTIC_RUN_ID"):
            del os.environ[name]


@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.AdaFaceLoss])
def test_two_processes_train_like_one(processes, tmp_path, cls):
    expected = plain(*network_and_loss(cls=cls), [*batches()] * 3)
    build = functools.partial(Recogniser, cls=cls)
    for state in processes.run(train_on_each, 2, tmp_path, build, timeout=300.0):
        assert same(state, expected, 1e-10)


def test_sharded_centres_train_like_one_process(processes, tmp_path):
    expected = plain(*network_and_loss(), [*batches()] * 3, clip=0.5)
    build = functools.partial(Sharded, tmp_path)
    arguments = train_on_each, 2, tmp_path, build
    for state in processes.run(*arguments, gradient_clip_val=0.5, timeout=300.0):
        assert same(state, expected, 1e-10)
