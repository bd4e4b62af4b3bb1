"""From a folder of images to a trained embedding, on one GPU or on a CPU.

python examples/image_folder.py                  # digits of scikit-learn, about 20 s
python examples/image_folder.py --data FOLDER --backbone torchvision.models.resnet18 --size 224

FOLDER has a folder of images for each class. Seven of ten are trained on, and with the others
recall@1 is measured, and verification at a threshold with a false accept rate of 1 %.
"""

import argparse
import math
import pkgutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import angular_losses as al

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write_digits(folder):
    """Write the digits that scikit-learn ships as an image folder."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).save(path)
    return folder


class ImageFolder(Dataset):
    """The images of some class folders, (3, size, size) in [-1, 1], with their class numbers."""

    def __init__(self, folders, size):
        self.size = size
        self.paths = [path for folder in folders for path in sorted(folder.iterdir())]
        numbers = {folder: number for number, folder in enumerate(folders)}
        self.labels = torch.tensor([numbers[path.parent] for path in self.paths])

    def __len__(self):
        """The number of images."""
        return len(self.paths)

    def __getitem__(self, index):
        """An image and its label."""
        with Image.open(self.paths[index]) as image:
            resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        return pixels / 127.5 - 1, self.labels[index]


def small_backbone():
    """A small convolutional network, for want of a pretrained one."""
    layers = []
    for width, channels in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten())


def train(images, num_classes, backbone, size=64, epochs=5, batch_size=64):
    """A network that maps images to embeddings (N, size), trained with ArcFace."""
    network = nn.Sequential(backbone, nn.LazyLinear(size)).to(DEVICE)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True)
    network(next(iter(loader))[0].to(DEVICE))  # the lazy layer takes its size
    scale, margin = al.suggest_scale(num_classes, 0.999), al.suggest_margin(num_classes, size)
    warmup = al.MarginWarmup(epochs * len(loader) // 2)
    loss = al.ArcFaceLoss(num_classes, size, margin=margin, scale=scale, schedule=warmup).to(DEVICE)
    optimiser = torch.optim.AdamW(al.parameter_groups(network, loss, lr=1e-3, weight_decay=0.01))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    for epoch in range(1, epochs + 1):
        network.train()
        steps = []
        for batch, labels in loader:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                embeddings = network(batch.to(DEVICE))
            value, correct = loss(embeddings, labels.to(DEVICE), return_correct=True)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            decay.step()
            steps.append(torch.stack([value.detach(), correct.float().mean()]))
        mean, accuracy = torch.stack(steps).mean(0)
        print(f"epoch {epoch}: loss {mean:.3f}, accuracy {accuracy:.1%}")
    return network


@torch.no_grad()
def embed(network, images):
    """The embeddings (N, d) of images, of length 1."""
    network.eval()
    loader = DataLoader(images, 256)
    return torch.cat([F.normalize(network(batch.to(DEVICE)).float()).cpu() for batch, _ in loader])


def recall_at_1(embeddings, labels):
    """The share of images whose nearest other image has the same class."""
    cosines = (embeddings @ embeddings.T).fill_diagonal_(-math.inf)
    return (labels[cosines.argmax(1)] == labels).float().mean().item()


def pairs(embeddings, labels):
    """The cosines of all pairs of one class, and of all pairs of different classes."""
    first, second = torch.triu_indices(len(labels), len(labels), offset=1)
    cosines, is_same = (embeddings @ embeddings.T)[first, second], labels[first] == labels[second]
    return cosines[is_same], cosines[~is_same]


def main(arguments=None):
    """Train and measure; returns the recall."""
    parser = argparse.ArgumentParser(description="train an embedding on a folder of images")
    parser.add_argument("--data", type=Path, help="a folder of class folders")
    parser.add_argument("--backbone", help="what makes a network, such as package.module.function")
    parser.add_argument("--size", type=int, default=32, help="pixels of an image")
    parser.add_argument("--epochs", type=int, default=5, help="passes over the images")
    parser.add_argument("--out", type=Path, help="where the network's weights go")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.data or write_digits(Path(temporary))
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        count = math.ceil(0.7 * len(classes))
        images = ImageFolder(classes[:count], options.size)
        new = ImageFolder(classes[count:], options.size)
        print(f"{len(images)} images of {count} classes, {len(new)} of {len(classes) - count} new")
        backbone = pkgutil.resolve_name(options.backbone) if options.backbone else small_backbone
        network = train(images, count, backbone(), epochs=options.epochs)
        embeddings, labels = embed(network, new), new.labels
    recall = recall_at_1(embeddings, labels)
    threshold = pairs(embeddings[::2], labels[::2])[1].quantile(0.99)  # then tried on the rest
    tried = pairs(embeddings[1::2], labels[1::2])
    shares = [(cosines > threshold).float().mean() for cosines in tried]
    print(f"recall@1 {recall:.1%}; above cosine {threshold:.2f} are {shares[0]:.1%} of the pairs")
    print(f"of one class and {shares[1]:.1%} of the pairs of different classes")
    if options.out:
        torch.save(network.state_dict(), options.out)
    return recall


if __name__ == "__main__":
    main()
