"""One rank of a training with shared classes, beside the same on one process.

python -m tests.device.sharded WORLD DEVICE STORE RANK
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import angular_losses as al
from angular_losses.distributed import shard
from tests.device.hidden import no_synchronisation

CLASSES, SIZE, ROWS = 11, 6, 5


def gradients(loss, embeddings, labels):
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    return value.detach(), leaf.grad


def main():
    world, device, store, rank = sys.argv[1:]
    world, device, rank = int(world), torch.device(device), int(rank)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
    )
    mesh = init_device_mesh(device.type, (world,))
    for mode in ("dense", "stash", "recompute"):
        torch.manual_seed(0)
        whole = al.ArcFaceLoss(CLASSES, SIZE, mode=mode).to(device)
        loss = al.ArcFaceLoss(CLASSES, SIZE, mode=mode).to(device)
        loss.load_state_dict(whole.state_dict())
        embeddings = torch.randn(world * ROWS, SIZE).to(device)
        labels = (torch.arange(world * ROWS) % CLASSES).to(device)
        shard(loss, mesh, batch_size=ROWS)
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        value, gradient = gradients(loss, embeddings[own], labels[own])  # what is made once
        loss.weight.grad = None
        if device.type == "cuda":
            with no_synchronisation(device):
                value, gradient = gradients(loss, embeddings[own], labels[own])
        else:
            value, gradient = gradients(loss, embeddings[own], labels[own])
        expected, of_all = gradients(whole, embeddings, labels)
        first, count = loss.shard.first, loss.shard.count
        of_own = whole.weight.grad[first : first + count]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, of_all[own], rtol=1e-4, atol=1e-5)
        found = loss.weight.grad
        found = found.to_local() if hasattr(found, "to_local") else found
        torch.testing.assert_close(found, of_own, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
