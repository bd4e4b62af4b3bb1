"""
Your first margin loss
======================

Train an embedding with a margin loss in ten minutes, on the handwritten digits of scikit-learn.
It also needs scikit-learn and matplotlib; nothing is downloaded.
"""

# %%
# The data
# --------
# 1797 images of 8 x 8 pixels. Every fourth is held out.

import torch
from matplotlib import pyplot as plt
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import angular_losses as al

torch.set_num_threads(1)  # work as small as this is faster on one core
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
# The network maps an image to an *embedding*. Two dimensions are enough here and can be plotted;
# usual embeddings have 128 to 512.
#
# The loss has one *centre* per class. It depends only on the cosine of the angle between an
# embedding and each centre, not on lengths. The *margin* increases the angle to the own centre in
# the loss, so that training has to make it smaller. The *scale* multiplies the cosines, which are
# at most 1, so that softmax probabilities can approach 1. Angles are in radians.


def make(margin):
    """A fresh network and a fresh loss."""
    network = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    loss = al.ArcFaceLoss(
        num_classes=10,
        embedding_size=2,
        margin=margin,
        scale=16.0,
        schedule=al.MarginWarmup(300),
    )
    return network, loss


# %%
# Margins of 0.3 to 0.5 are usual. On a circle ten classes have only 0.63 rad each, so we use
# 0.2. ``MarginWarmup`` increases it linearly over the first 300 steps.
#
# Before training
# ---------------
# Each point is a held-out image, plotted in the direction of its embedding and coloured by class
# (the radius is arbitrary). The lines are the centres.


@torch.no_grad()
def circle(ax, network, loss, title):
    """Draw the directions of held-out embeddings, and of the centres."""
    embeddings = network(test_images)
    angle = torch.atan2(embeddings[:, 1], embeddings[:, 0])
    radius = torch.linspace(0.8, 1, len(angle))
    ax.scatter(angle, radius, c=test_labels, cmap="tab10", s=6)
    for digit, (x, y) in enumerate(loss.weight):
        direction = torch.atan2(y, x)
        ax.plot([direction, direction], [0, 0.6], color="0.6", linewidth=1)
        ax.text(direction, 0.68, str(digit), ha="center", va="center")
    ax.set(title=title, xticks=[], yticks=[], ylim=(0, 1.05))


torch.manual_seed(0)
polar = {"subplot_kw": {"projection": "polar"}, "layout": "constrained"}
figure, ax = plt.subplots(figsize=(4, 4.3), **polar)
circle(ax, *make(margin=0.2), "Held-out digits before training")
plt.show()

# %%
# Training
# --------
# An ordinary training loop. ``parameter_groups`` passes the centres to the optimiser along with the
# network; otherwise they would not be trained.


def train(margin, seed, steps=600):
    """Train a network with a margin."""
    torch.manual_seed(seed)
    network, loss = make(margin)
    optimiser = torch.optim.Adam(al.parameter_groups(network, loss, lr=3e-3))
    for _ in range(steps):
        rows = torch.randint(len(train_labels), (128,))
        optimiser.zero_grad()
        loss(network(train_images[rows]), train_labels[rows]).backward()
        optimiser.step()
    return network, loss


# %%
# With a margin of 0 this is a softmax over cosines, the baseline. With 0.2 it is ArcFace. All other
# settings are the same; three seeds show the random variation.

runs = {(margin, seed): train(margin, seed) for seed in range(3) for margin in (0.0, 0.2)}

# %%
# After training
# --------------
# The first seed. How far is a held-out embedding from the centre of its class?


@torch.no_grad()
def angle_to_centre(network, loss):
    """The median angle between held-out embeddings and their own centres, in radians."""
    return al.target_angle(network(test_images), loss.weight, test_labels).median().item()


figure, axes = plt.subplots(1, 2, figsize=(8, 4.5), **polar)
for ax, margin in zip(axes, (0.0, 0.2), strict=True):
    half = angle_to_centre(*runs[margin, 0])
    title = f"m = {margin}: half of the digits\nare within {half:.3f} rad"
    circle(ax, *runs[margin, 0], title)
plt.show()
# sphinx_gallery_start_ignore
# sphinx_gallery_thumbnail_number = 2
# sphinx_gallery_end_ignore

# %%
# With the margin each class is closer to its centre.
#
# Accuracy
# --------
# Classify each held-out image by its nearest neighbour among the training images, by cosine. The
# interval (Wilson, 95 %) covers the sampling of images, not the variation between seeds.


@torch.no_grad()
def neighbours(network):
    """How many held-out images have a nearest neighbour of their own class."""
    classifier = KNeighborsClassifier(1, metric="cosine")
    classifier.fit(network(train_images), train_labels)
    right = classifier.predict(network(test_images)) == test_labels.numpy()
    return binomtest(int(right.sum()), len(right))


print("seed    m  median angle  nearest neighbour right")
for (margin, seed), (network, loss) in runs.items():
    angle, right = angle_to_centre(network, loss), neighbours(network)
    low, high = right.proportion_ci(method="wilson")
    print(f"{seed:4}  {margin:.1f}  {angle:8.3f} rad  ", end="")
    print(f"{right.statistic:.1%} ({low:.1%} to {high:.1%})")
# sphinx_gallery_start_ignore
for seed in range(3):  # what the text says
    assert angle_to_centre(*runs[0.2, seed]) < angle_to_centre(*runs[0.0, seed]) < 0.2
assert all(neighbours(network).statistic > 0.85 for network, _ in runs.values())
# sphinx_gallery_end_ignore

# %%
# The angles are smaller with the margin for each seed. Compare the accuracies by their intervals:
# ten classes that were all trained on are an easy task. Margins are intended for many classes, and
# for comparing images of new ones.
#
# Inference
# ---------
# The margin applies to training only. To classify, compute logits without it. For retrieval or
# verification compare embeddings by their cosine, without the loss.

network, loss = runs[0.2, 0]
with torch.no_grad():
    print("predicted", loss.get_logits(network(test_images[:8])).argmax(1).tolist())
print("true     ", test_labels[:8].tolist())

# %%
# Next
# ----
# * :doc:`plot_2_image_folder`: a folder of images, any backbone, retrieval and a threshold.
# * :doc:`plot_3_backbone`: the choice of scale and margin.
# * The :doc:`margin explorer </explorer>` plots the margin functions of this library.
# * :doc:`/how_to/training`: a checklist for training.
# * :doc:`/explanation/geometry`: the geometry of angular margins.
