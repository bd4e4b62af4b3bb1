"""
From a folder of images to an embedding
=======================================

One script trains an embedding on a folder of class folders, on a GPU or a CPU, and measures it on
classes that it was not trained on: ``examples/image_folder.py``. Run it as it is, on the digits
that scikit-learn ships, or on your own images::

    python examples/image_folder.py
    python examples/image_folder.py --data FOLDER --backbone torchvision.models.resnet18 --size 224

This page runs it part by part.
"""

# %%
# Images
# ------
# A folder of images for each class; Pillow reads every format. Pixels are scaled to [-1, 1].
#
# .. literalinclude:: ../../examples/image_folder.py
#    :pyobject: ImageFolder
#
# The script trains on seven of ten classes and keeps the others for the test, for an embedding is
# made to compare images of classes that it has never seen. Here these are the digits 7, 8 and 9.

import tempfile
from pathlib import Path

import image_folder  # examples/image_folder.py
import torch
from matplotlib import pyplot as plt

torch.set_num_threads(1)  # faster for images as small as these
torch.manual_seed(0)
temporary = tempfile.TemporaryDirectory()
classes = sorted(image_folder.write_digits(Path(temporary.name)).iterdir())
images, new = (image_folder.ImageFolder(part, size=16) for part in (classes[:7], classes[7:]))
print(f"{len(images)} images to train on, {len(new)} of new classes")

# %%
# Training
# --------
# The network is any backbone and a linear layer to the size of the embedding: no activation after
# it, and no normalisation, which the loss does.
#
# .. literalinclude:: ../../examples/image_folder.py
#    :pyobject: train
#
# What to notice:
#
# * ``parameter_groups`` gives the class centres to the optimiser too, without weight decay.
# * Margin and scale are those suggested for so many classes; ``MarginWarmup`` raises the margin
#   over the first half of the steps, and is saved with the loss.
# * The loss is called outside of ``autocast`` or inside, which makes no difference to its precision
#   with up to 4096 classes.
# * ``return_correct`` says which images are nearest to their own class, in the same pass, without
#   the margin. The largest of logits *with* a margin would not be the prediction.

network = image_folder.train(images, 7, image_folder.small_backbone())

# %%
# Recall@1 on new classes
# -----------------------
# The centres are not needed any more: images are compared with each other.
#
# .. literalinclude:: ../../examples/image_folder.py
#    :pyobject: recall_at_1

embeddings = image_folder.embed(network, new)
print(f"recall@1 {image_folder.recall_at_1(embeddings, new.labels):.1%}")

# %%
# A threshold at a false accept rate
# ----------------------------------
# Are two images of one class? They are accepted as such above a cosine, chosen so that one in a
# hundred pairs of different classes is accepted. It is chosen on every other image and tried on the
# rest: measured where it was chosen, a rate flatters.

same, different = image_folder.pairs(embeddings[::2], new.labels[::2])
threshold = different.quantile(0.99).item()
tried_same, tried_different = image_folder.pairs(embeddings[1::2], new.labels[1::2])
print(f"above {threshold:.2f}: {(tried_same > threshold).float().mean():.1%} of one class")
print(
    f"above {threshold:.2f}: {(tried_different > threshold).float().mean():.1%} of different ones"
)

figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
options = {"bins": 60, "range": (-1, 1), "density": True, "alpha": 0.6}
ax.hist(tried_different.numpy(), label="different classes", **options)
ax.hist(tried_same.numpy(), label="one class", **options)
ax.axvline(threshold, color="black", linestyle="--", label="threshold")
ax.set(title="Pairs of images of new classes", xlabel="cosine", ylabel="density")
ax.legend(loc="upper left")
plt.show()
temporary.cleanup()
# sphinx_gallery_start_ignore
accepted_same, accepted_different = (  # what the text says
    (tried > threshold).float().mean() for tried in (tried_same, tried_different)
)
assert image_folder.recall_at_1(embeddings, new.labels) > 0.9
assert 0 < accepted_different < 0.03
assert accepted_same > 5 * accepted_different
# sphinx_gallery_end_ignore

# %%
# Nearest neighbours are easier than pairs: a class of new images need not be in one place for each
# image to be near another of its own. A backbone that was pretrained, and more classes to train on,
# bring the pairs together; seven digits do not.
#
# Next
# ----
# * :doc:`plot_3_backbone`: choosing scale and margin by measured angles, and comparing them over
#   several seeds.
# * :doc:`/how_to/evaluate`: retrieval, verification and thresholds with torchmetrics, scikit-learn
#   and faiss.
