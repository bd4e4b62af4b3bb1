"""
Bring a backbone
================

A network that is trained already, a scale and a margin chosen by looking at angles, and an honest
test: retrieval among classes that the training never saw.
"""

# %%
# A backbone
# ----------
# In earnest this is a ResNet with ImageNet weights, or a speaker encoder. So that nothing has to be
# downloaded, this page trains a small one first, on another task with the same kind of images:
# by how many quarter turns a digit is rotated. It has seen no class label.

import math

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve
from torch import nn
from torch.nn import functional as F

import angular_losses as al
from angular_losses.diagnostics import AngularMonitor, plot_history

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)


def backbone():
    """A small convolutional network: images (N, 1, 8, 8) to features (N, 128)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
    )


torch.manual_seed(0)
pretrained = backbone()
head = nn.Linear(128, 4)
known = labels < 7
optimiser = torch.optim.Adam([*pretrained.parameters(), *head.parameters()], lr=1e-3)
for _ in range(150):
    rows = torch.randint(int(known.sum()), (128,))
    turns = torch.randint(4, (128,))
    turned = images[known][rows]
    for quarter in range(1, 4):
        turned[turns == quarter] = turned[turns == quarter].rot90(quarter, (2, 3))
    optimiser.zero_grad()
    loss = F.cross_entropy(head(pretrained(turned)), turns)
    loss.backward()
    optimiser.step()
print(f"told quarter turns apart: cross-entropy {loss.item():.2f} (by chance {math.log(4):.2f})")

# %%
# Seven classes to learn, three to meet later
# -------------------------------------------
# The digits 0 to 6 are for training. 7, 8 and 9 are kept for the test: a model is asked which
# of their images belong together, as a face recogniser is asked about people it was not trained on.

train_images, train_labels = images[known], labels[known]
new_images, new_labels = images[~known], labels[~known]
print(len(train_labels), "images to train on,", len(new_labels), "of new classes")

# %%
# A scale and a margin
# --------------------
# The scale decides how sure the softmax can be. ``suggest_scale`` gives the least that lets an
# embedding half-way to its centre reach a probability:

for probability in (0.5, 0.9):
    print(f"p = {probability}: s = {al.suggest_scale(7, probability):.1f}")

# %%
# We take 16: a margin pushes the target back, so it needs more. The margin is found by looking.
# Train for a while with each and see whether the angles of the targets still come down well below
# those of the nearest other centre.


def train(margin, steps=250):
    """Fine-tune a copy of the backbone with ArcFace, and watch the angles."""
    torch.manual_seed(1)
    network = nn.Sequential(backbone(), nn.Linear(128, 32))
    network[0].load_state_dict(pretrained.state_dict())
    loss = al.ArcFaceLoss(7, 32, margin=margin, scale=16.0, schedule=al.MarginWarmup(steps // 2))
    optimiser = torch.optim.AdamW(al.parameter_groups(network, loss, lr=1e-3, weight_decay=1e-4))
    monitor = AngularMonitor(loss)
    for step in range(steps):
        rows = torch.randint(len(train_labels), (64,))
        optimiser.zero_grad()
        embeddings = network(train_images[rows])
        value = loss(embeddings, train_labels[rows])
        value.backward()
        optimiser.step()
        monitor.update(embeddings, train_labels[rows])
        if step % 25 == 24:
            monitor.log(step + 1)
    return network, loss, monitor


runs = {margin: train(margin) for margin in (0.0, 0.3, 0.6, 1.2)}
for margin, (_, _, monitor) in runs.items():
    last = monitor.history[-1]
    print(
        f"m = {margin}: target {last['target_median']:.2f} rad, nearest other "
        f"{last['nearest_median']:.2f} rad, margin violated by {last['violation_rate']:.0%}"
    )

# %%
# How one of them went, window by window:

figure = plot_history(runs[0.3][2].history)

# %%
# Retrieval of classes never seen
# -------------------------------
# Each image of a new class asks for its nearest neighbour among the others. And of all pairs of
# images, how many of one class are accepted at a cosine that accepts one pair in a hundred of
# different classes?


@torch.no_grad()
def open_set(network):
    """Recall at 1, and the rate of true accepts at 1 % false accepts, on the new classes."""
    unit = F.normalize(network(new_images))
    cosine = unit @ unit.T
    same = new_labels[:, None] == new_labels
    recall = (new_labels[cosine.fill_diagonal_(-1).argmax(1)] == new_labels).float().mean().item()
    first, second = torch.triu_indices(len(unit), len(unit), 1)
    false_accepts, true_accepts, _ = roc_curve(same[first, second], cosine[first, second])
    return recall, true_accepts[false_accepts <= 0.01][-1], false_accepts, true_accepts


figure, ax = plt.subplots(figsize=(5, 4))
for name, network in {
    "the backbone alone": pretrained,
    **{f"ArcFace, m = {margin}": network for margin, (network, _, _) in runs.items()},
}.items():
    recall, accepted, false_accepts, true_accepts = open_set(network)
    print(f"{name:20} recall at 1 {recall:.1%}, true accepts at 1 % false {accepted:.1%}")
    ax.plot(false_accepts, true_accepts, label=name)
ax.set(xscale="log", xlim=(1e-3, 1), xlabel="false accept rate", ylabel="true accept rate")
ax.legend(fontsize=8)
figure.tight_layout()

# %%
# Which margin is best here is one seed on three new classes: read the order of the curves with
# care, and choose on classes that are in neither the training nor the final test.
#
# Keep it
# -------
# The centres are part of the training alone. What is deployed is the network; what is resumed is
# both.

network, loss, _ = runs[0.3]
state = {"network": network.state_dict(), "loss": loss.state_dict()}
print(sorted(state["loss"]))

# %%
# When not to use a margin
# ------------------------
# If the classes of the test are those of the training, and few, a softmax is as good and has one
# knob less. A margin pays where embeddings are compared: many classes, new classes, or both.
#
# Next: the :doc:`how-to guides </how_to/index>`, and :doc:`/diagnostics` for the numbers printed
# above.
