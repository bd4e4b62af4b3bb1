"""
Using a pretrained backbone
===========================

A network that is trained already, a scale and a margin chosen by looking at angles, and an honest
test: retrieval among classes that the training never saw.
"""

# %%
# A backbone
# ----------
# In earnest this is a ResNet with ImageNet weights, or a speaker encoder. So that nothing has to be
# downloaded, this page trains a small one first, on another task with images of the same kind: by
# how many quarter turns a digit was rotated. It sees no class label, and only the digits 0 to 6.

import io
import math

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_curve
from torch import nn
from torch.nn import functional as F

import angular_losses as al
from angular_losses.diagnostics import AngularMonitor, batch_angles

torch.set_num_threads(1)  # work as small as this is faster on one core
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
known = labels < 7


def make_backbone():
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
pretrained, head = make_backbone(), nn.Linear(128, 4)
optimiser = torch.optim.Adam([*pretrained.parameters(), *head.parameters()], lr=1e-3)
turned = torch.stack([images[known].rot90(quarters, (2, 3)) for quarters in range(4)])
for _ in range(150):
    quarters, rows = torch.randint(4, (128,)), torch.randint(int(known.sum()), (128,))
    optimiser.zero_grad()
    value = F.cross_entropy(head(pretrained(turned[quarters, rows])), quarters)
    value.backward()
    optimiser.step()
print(f"quarter turns: cross-entropy {value.item():.2f}, by chance {math.log(4):.2f}")

# %%
# Three sets of images
# --------------------
# The digits 0 to 6 are for training, apart from every fourth image, which is kept aside to choose
# a margin by. The digits 7, 8 and 9 are for the test: their classes are *new* to the model, as
# people at a door are to a face recogniser.

aside = known & (torch.arange(len(labels)) % 4 == 0)
train_images, train_labels = images[known & ~aside], labels[known & ~aside]
new_images, new_labels = images[~known], labels[~known]
print(f"{len(train_labels)} to train on, {aside.sum()} aside, {len(new_labels)} new")

# %%
# A scale
# -------
# ``suggest_scale`` gives the scale at which an embedding half-way to its centre, at 45 degrees,
# reaches a probability. A margin takes some of that away:

for probability in (0.5, 0.9, 0.999):
    scale = al.suggest_scale(7, probability)
    with_margin = 1 / (1 + 6 * math.exp(-scale * math.cos(math.pi / 4 + 0.5)))
    print(f"s = {scale:4.1f}: p = {probability}; with m = 0.5 p = {with_margin:.2f}")

# %%
# So we take the last, which leaves room for a margin. With thousands of classes 30 to 64 is usual.
#
# A margin
# --------
# Begin without one, and look at the angles. ``AngularMonitor`` collects them while the loss trains;
# ``log`` closes a window and starts the next. ``MarginWarmup`` is for later: it brings a margin in
# over the first half of the steps.


def train(margin, seed, steps=200):
    """Fine-tune a copy of the backbone with ArcFace, and watch the angles."""
    torch.manual_seed(seed)
    network = nn.Sequential(make_backbone(), nn.Linear(128, 32))
    network[0].load_state_dict(pretrained.state_dict())
    warmup = al.MarginWarmup(steps // 2)
    loss = al.ArcFaceLoss(7, 32, margin=margin, scale=scale, schedule=warmup)
    groups = al.parameter_groups(network, loss, lr=1e-3, weight_decay=1e-4)
    optimiser = torch.optim.AdamW(groups)
    monitor = AngularMonitor(loss)
    with monitor.attach():
        for step in range(1, steps + 1):
            rows = torch.randint(len(train_labels), (64,))
            optimiser.zero_grad()
            loss(network(train_images[rows]), train_labels[rows]).backward()
            optimiser.step()
            if step % 20 == 0:
                monitor.log(step)
    return network, loss, monitor


runs = {0.0: [train(0.0, seed) for seed in range(3)]}

# %%
# What matters is the *gap*: how much farther an embedding is from the nearest other centre than
# from its own. A margin asks every row for a gap. Ask the images kept aside what they have already:

network, loss, _ = runs[0.0][0]
with torch.no_grad():
    gap = batch_angles(network(images[aside]), loss.weight, labels[aside]).gap
print(f"half have more than {gap.median():.2f} rad,")
print(f"19 of 20 more than {gap.quantile(0.05):.2f} rad")

# %%
# A first guess is the gap that 19 of 20 have: the margin then presses those that are behind, and
# is in reach of nearly all. Beside it we train with 1.2 rad, to see what too much looks like.

chosen = round(gap.quantile(0.05).item(), 2)
for margin in (chosen, 1.2):
    runs[margin] = [train(margin, seed) for seed in range(3)]

# %%
# What the monitors of the first seed saw. Solid lines are the angle to the own class, dashed ones
# to the nearest other:

figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
for number, (margin, group) in enumerate(runs.items()):
    history = group[0][2].history
    steps = [window["step"] for window in history]
    for name, style in (("target_median", "-"), ("nearest_median", "--")):
        angles = [window[name] for window in history]
        label = f"m = {margin}" if style == "-" else None
        ax.plot(steps, angles, style, color=f"C{number}", label=label)
ax.set(title="Angles while training, median", xlabel="step", ylabel="angle (rad)")
ax.set_ylim(0)
figure.legend(loc="outside right center")
plt.show()

# %%
# The same angles on the images kept aside, one count a degree. A row *violates* the margin if its
# gap is smaller than the margin asks for.


@torch.no_grad()
def look(network, loss):
    """What a monitor sees of the images kept aside."""
    monitor = AngularMonitor(loss)
    monitor.update(network(images[aside]), labels[aside])
    return monitor.snapshot()


size = {"figsize": (6.4, 5.4), "layout": "constrained"}
figure, axes = plt.subplots(len(runs), sharex=True, **size)
for ax, (margin, group) in zip(axes, runs.items(), strict=True):
    network, loss, _ = group[0]
    seen = look(network, loss)
    ax.stairs(seen.target, fill=True, alpha=0.6, label="own class")
    ax.stairs(seen.nearest, fill=True, alpha=0.6, label="nearest other")
    violated = seen.numbers["violation_rate"]
    ax.set(title=f"m = {margin}: violated by {violated:.1%}", ylabel="images")
    ax.set_xlim(0, 130)
axes[0].legend()
axes[-1].set_xlabel("angle between an image and a class centre (degrees)")
figure.suptitle("Images kept aside, after training")
plt.show()

# %%
# A margin packs the classes that it trains on, and the more so the larger it is. Whether that is
# what you want, only a test on your own question can say.
#
# Classes never seen
# ------------------
# Two questions. Retrieval: is the image nearest to each new one, by cosine, of the same class?
# Verification: of all pairs of one class, how many are accepted at a threshold that accepts one
# pair in a hundred of different classes?


@torch.no_grad()
def cosines(network):
    """The cosines of all pairs of new images (N, N)."""
    unit = F.normalize(network(new_images))
    return unit @ unit.T


def retrieval(cosine):
    """How many new images have a nearest neighbour of their own class."""
    nearest = cosine.clone().fill_diagonal_(-1).argmax(1)
    return binomtest(int((new_labels[nearest] == new_labels).sum()), len(new_labels))


def verification(cosine):
    """False and true accept rates at all thresholds."""
    first, second = torch.triu_indices(*cosine.shape, 1)
    return roc_curve(new_labels[first] == new_labels[second], cosine[first, second])[:2]


# %%
# The backbone alone, and three seeds with each margin:

networks = {"backbone alone": [pretrained]}
networks |= {f"m = {margin}": [run[0] for run in group] for margin, group in runs.items()}
accepted = {}
figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
for number, (name, group) in enumerate(networks.items()):
    for seed, network in enumerate(group):
        cosine = cosines(network)
        false_accepts, true_accepts = verification(cosine)
        accepted[name, seed] = np.interp(0.01, false_accepts, true_accepts)
        recall = retrieval(cosine)
        low, high = recall.proportion_ci(method="wilson")
        print(
            f"{name:14}  recall at 1 {recall.statistic:.1%} ({low:.1%} to {high:.1%})  "
            f"accepted at 1 % false {accepted[name, seed]:.1%}"
        )
        label = None if seed else name
        ax.plot(false_accepts, true_accepts, color=f"C{number}", label=label)
ax.set(title="Verification of pairs of new classes", xscale="log", xlim=(1e-3, 1))
ax.set(xlabel="false accept rate", ylabel="true accept rate")
ax.legend()
plt.show()

# %%
# Compare lines of one kind before you compare kinds: what differs between seeds or lies within the
# intervals (Wilson, 95 %, which take images for independent) is chance. Three things stand:
#
# * The fine-tuning helps the verification: without a margin and with the chosen one, each seed is
#   above the backbone alone.
# * The chosen margin is not shown to be better than none: what it gains or loses is of the size of
#   the spread between seeds.
# * The large margin is worse than none for each seed, though its pictures above are the neatest:
#   neat angles on known classes are no evidence about new ones.
#
# So choose the margin by the question you will ask, on classes that are in neither the training
# nor the final test. The angles tell which margins are in reach and whether a training is healthy.
#
# Keep it
# -------
# Deploy the network alone: new classes need no centre. To resume the training, keep the loss too;
# its state holds the centres and where the schedule stands.

network, loss, _ = runs[chosen][0]
state = {"network": network.state_dict(), "loss": loss.state_dict()}
print({name: tuple(value.shape) for name, value in state["loss"].items()})

file = io.BytesIO()  # or a path
torch.save(state, file)
file.seek(0)
restored = torch.load(file, weights_only=True)
loss.load_state_dict(restored["loss"])
network.load_state_dict(restored["network"])

# %%
# All of it is tensors, so ``safetensors.torch.save_file(loss.state_dict(), path)`` keeps it too.
#
# When not to use a margin
# ------------------------
# * The classes are few, as here: a softmax has one knob less.
# * Labels are noisy: a margin insists on them. See :doc:`/how_to/noisy_labels`.
# * You need probabilities: with a margin the loss no longer measures how good they are.
#
# Margins were made for the other case: training on thousands of people to compare new ones.
#
# Next
# ----
# * :doc:`/diagnostics`: what the numbers of a monitor say, and figures ready made:
#   ``plot_history(monitor.history)`` and ``monitor.figures()`` draw one run.
# * :doc:`/how_to/index`: a task each.
# * :doc:`/metric_learning`: miners, testers and accuracy from pytorch-metric-learning.
