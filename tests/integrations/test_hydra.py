"""hydra and OmegaConf: a loss made from a configuration."""

import torch

import angular_losses as al
from tests.integrations import of_tools, tool

omegaconf = tool("omegaconf")
utils = tool("hydra.utils")
pytestmark = of_tools

SETTINGS = """
_target_: angular_losses.ArcFaceLoss
num_classes: 10
embedding_size: 8
margin: 0.4
scale: 32
sub_centers: 2
memory_budget: ${mebibytes:64}
schedule:
  _target_: angular_losses.MarginWarmup
  steps: 100
"""


def settings():
    omegaconf.OmegaConf.register_new_resolver("mebibytes", lambda n: n * 2**20, replace=True)
    return omegaconf.OmegaConf.create(SETTINGS)


def test_the_loss_is_the_one_made_by_hand():
    loss = utils.instantiate(settings())
    expected = al.ArcFaceLoss(
        10,
        8,
        margin=0.4,
        scale=32,
        sub_centers=2,
        memory_budget=64 * 2**20,
        schedule=al.MarginWarmup(100),
    )
    assert repr(loss) == repr(expected)
    expected.load_state_dict(loss.state_dict())
    embeddings, labels = torch.randn(12, 8), torch.randint(10, (12,))
    assert torch.equal(loss(embeddings, labels), expected(embeddings, labels))


def test_what_training_knows_is_given_when_the_loss_is_made():
    partial = utils.instantiate({**settings(), "_partial_": True})
    assert partial(num_classes=20, device="meta").weight.shape == (40, 8)


def test_each_loss_has_a_schedule_of_its_own():
    first, second = utils.instantiate(settings()), utils.instantiate(settings())
    first(torch.randn(4, 8), torch.arange(4))
    assert (first.schedule.step, second.schedule.step) == (1, 0)
