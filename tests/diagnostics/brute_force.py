"""Drawn batches with class centres, and their angles by acos in float64 over all centres."""

import numpy as np
import torch


def brute_force(embeddings, weight, labels, sub_centers=1):
    """Target, nearest other and its class, row by row, by acos in float64 over all centres."""
    embeddings, weight = (
        each.double().numpy() / np.linalg.norm(each.double().numpy(), axis=1, keepdims=True)
        for each in (embeddings, weight)
    )
    angles = np.arccos(np.clip(embeddings @ weight.T, -1, 1))
    angles = angles.reshape(len(embeddings), len(weight) // sub_centers, sub_centers).min(2)
    rows = np.arange(len(labels))
    target = angles[rows, labels]
    angles[rows, labels] = np.inf
    return target, angles.min(1), angles.argmin(1)


def batch(rows, classes, size, seed=0, sub_centers=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(classes * sub_centers, size, generator=generator).to(dtype)
    return embeddings, weight, torch.randint(classes, (rows,), generator=generator)
