r"""Classes shared between processes, when their centres outgrow one device.

Rank r of R holds ceil(C / R) rows of the weight, their gradients and what the optimiser keeps of
them; nobody holds the rest. A step gathers embeddings and labels of all ranks once, adds up one
stack of two numbers a row, and sends each rank the gradient of its own rows, while the gradient of
the weight is computed::

    mesh = init_device_mesh("cuda", (world_size,))
    loss = shard(ArcFaceLoss(10_000_000, 512, device="meta"), mesh, backbone="ddp")
    optimiser = torch.optim.SGD(parameter_groups(backbone, loss, lr=0.1), momentum=0.9)
    shard_optimizer(optimiser, loss)
    ...
    loss(backbone(images), labels).backward()      # as ever
    save("checkpoints", nn.ModuleList([backbone, loss]), optimiser)

The loss that every rank returns is that of all rows, and so are the gradients.
"""

from .checkpoint import load as load
from .checkpoint import save as save
from .optimizer import shard_optimizer as shard_optimizer
from .sharded_loss import ShardedLoss as ShardedLoss
from .sharding import shard as shard
from .sharding import unshard as unshard

__all__ = ["ShardedLoss", "load", "save", "shard", "shard_optimizer", "unshard"]
