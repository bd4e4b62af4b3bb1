"""
Your first margin loss
======================

In ten minutes from ``pip install angular-losses scikit-learn matplotlib`` to an embedding trained
with a margin, on the handwritten digits that scikit-learn ships. Nothing is downloaded.
"""

# %%
# The data
# --------
# 1797 images of 8 x 8 pixels. Every fourth is held out.

import math

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import angular_losses as al

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 4 == 0
train_images, train_labels = images[~held_out], labels[~held_out]
test_images, test_labels = images[held_out], labels[held_out]
print(len(train_labels), "to train on,", len(test_labels), "held out")

# %%
# A network and a loss
# --------------------
# The network maps an image to an *embedding*. Two numbers are enough here, so that it can be drawn;
# real ones have 128 to 512. The loss holds one *centre* for each class. What counts is the angle
# between an embedding and the centre of its class: the margin asks for more of it than a softmax
# would. Angles are in radians.


def train(loss, steps=600):
    """Train a fresh network with a loss; the loss's centres are parameters too."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimiser = torch.optim.Adam(al.parameter_groups(network, loss, lr=3e-3))
    for _ in range(steps):
        rows = torch.randint(len(train_labels), (128,))
        optimiser.zero_grad()
        loss(network(train_images[rows]), train_labels[rows]).backward()
        optimiser.step()
    with torch.no_grad():
        return network(train_images), network(test_images)


# %%
# ``parameter_groups`` gives the optimiser the centres beside the network. That is the line people
# forget: without it the centres never move.
#
# First without a margin, then with ArcFace's:

torch.manual_seed(1)
plain = al.NormalizedSoftmaxLoss(num_classes=10, embedding_size=2, scale=16.0)
plain_train, plain_test = train(plain)
torch.manual_seed(1)
arcface = al.ArcFaceLoss(
    num_classes=10, embedding_size=2, margin=0.2, scale=16.0, schedule=al.MarginWarmup(300)
)
arcface_train, arcface_test = train(arcface)

# %%
# A margin of 0.2 rad is small; on a circle ten classes have only 0.63 rad each. ``MarginWarmup``
# brings it in over the first 300 steps, because a fresh network cannot meet it yet.
#
# What the margin does
# --------------------
# Each point is a held-out image, by the direction of its embedding; the lines are the centres.

figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), subplot_kw={"projection": "polar"})
for ax, loss, embeddings, title in (
    (axes[0], plain, plain_test, "no margin"),
    (axes[1], arcface, arcface_test, "ArcFace, m = 0.2"),
):
    angle = torch.atan2(embeddings[:, 1], embeddings[:, 0])
    torch.manual_seed(2)
    radius = 0.9 + 0.1 * torch.rand(len(angle))
    ax.scatter(angle, radius, c=test_labels, cmap="tab10", s=6)
    for centre in loss.weight.detach():
        direction = torch.atan2(centre[1], centre[0])
        ax.plot([direction, direction], [0, 0.85], color="0.6", linewidth=1)
    ax.set(title=title, yticks=[], xticklabels=[])
    ax.set_ylim(0, 1.05)
figure.tight_layout()

# %%
# With the margin the classes are tighter and the gaps between them are wider. In numbers: the angle
# between each held-out embedding and the centre of its class.


def summary(loss, train_embeddings, test_embeddings):
    """Angles to the right centre, and how many neighbours in the training set are of the class."""
    theta = al.target_angle(test_embeddings, loss.weight.detach(), test_labels)
    similarity = F.normalize(test_embeddings) @ F.normalize(train_embeddings).T
    right = train_labels[similarity.argmax(1)] == test_labels
    n, p, z = len(right), right.double().mean().item(), 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (
        f"median angle {theta.median():.3f} rad; nearest neighbour right for {p:.1%} "
        f"(Wilson 95 % interval {centre - half:.1%} to {centre + half:.1%})"
    )


print("no margin:", summary(plain, plain_train, plain_test))
print("ArcFace:  ", summary(arcface, arcface_train, arcface_test))

# %%
# The angles shrink by much; how many neighbours are right is one seed on 450 images, and the
# intervals say how little that proves. Margins pay where classes are many and new ones come.
#
# Using it
# --------
# The margin is for training alone. To classify, ask for logits without it; to search or to verify,
# compare embeddings by their cosine and forget the loss.

print(arcface.get_logits(arcface_test[:4]).argmax(1), test_labels[:4])

# %%
# Next
# ----
# * :doc:`plot_2_backbone`: your own network, a scale and a margin chosen by looking, and retrieval
#   of classes that were never trained on.
# * The `margin explorer <../explorer.html>`_ draws every margin of this library.
# * :doc:`/training`: what to check before a long run.
