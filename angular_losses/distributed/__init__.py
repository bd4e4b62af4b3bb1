r"""Distributed training with class centres sharded across processes.

Rank r of R holds ceil(C / R) rows of the weight, with their gradients and optimiser state. A step
gathers the embeddings and labels of all ranks once, reduces two numbers per row, and scatters the
gradient of the rows while the gradient of the weight is computed::

    mesh = init_device_mesh("cuda", (world_size,))
    loss = shard(ArcFaceLoss(10_000_000, 512, device="meta"), mesh, backbone="ddp")
    optimiser = torch.optim.SGD(parameter_groups(backbone, loss, lr=0.1), momentum=0.9)
    shard_optimizer(optimiser, loss)
    ...
    loss(backbone(images), labels).backward()      # unchanged
    clip_grad_norm_([backbone, loss], 1.0)         # instead of torch.nn.utils.clip_grad_norm_
    save("checkpoints", nn.ModuleList([backbone, loss]), optimiser)

Every rank returns the loss of all rows, with the corresponding gradients.
"""

from .checkpoint import load, save
from .clipping import clip_grad_norm_
from .optimizer import shard_optimizer
from .sharded_loss import ShardedLoss
from .sharding import shard, unshard

__all__ = [
    "ShardedLoss",
    "clip_grad_norm_",
    "load",
    "save",
    "shard",
    "shard_optimizer",
    "unshard",
]
