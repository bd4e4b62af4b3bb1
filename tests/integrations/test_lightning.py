"""Lightning: the loss is a submodule of the LightningModule."""

import os

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import angular_losses as al
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


def train_on_each(mesh, folder, cls):
    """With the process group that is there, as under torchrun."""
    size, rank = mesh.size(), mesh.get_rank()
    variables = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    try:
        model = Recogniser(cls=cls)
        options = {"devices": size, "strategy": "ddp", "use_distributed_sampler": False}
        trainer(folder, **options).fit(model, batches(8, rank, size))
        return model.state()
    finally:
        for name in (*variables, "TORCHELASTIC_RUN_ID"):
            del os.environ[name]


@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.AdaFaceLoss])
def test_two_processes_train_like_one(processes, tmp_path, cls):
    expected = plain(*network_and_loss(cls=cls), [*batches()] * 3)
    for state in processes.run(train_on_each, 2, tmp_path, cls, timeout=300.0):
        assert same(state, expected, 1e-10)
