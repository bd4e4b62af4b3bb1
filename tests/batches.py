"""Embeddings with labels: drawn, or near the directions of their classes."""

from unittest.mock import patch

import torch

from angular_losses.engine.placement import Sampled


def batch(seed=0, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(12, 8, generator=generator)
    return embeddings.requires_grad_(), torch.randint(num_classes, (12,), generator=generator)


def rows_of(num_classes=5, size=8, num_rows=60, seed=0):
    """Embeddings about directions of their classes, of any length; none of class 3."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    labels[labels == 3] = 2
    means = torch.randn(num_classes, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, size, generator=generator, dtype=torch.float64)
    lengths = 10 * torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    return lengths * (means[labels] + 0.3 * noise), labels


def drawn_in(call):
    """What a call returns, and the sampled classes that this process draws in it."""
    found, draw = [[]], Sampled.draw

    def noting(shard, *arguments, **options):
        drawn = draw(shard, *arguments, **options)
        found.append(drawn.tolist())
        return drawn

    with patch.object(Sampled, "draw", noting):
        return call(), found[-1]
