"""The class centres that a loss owns: the logits of them, where they start, and which are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import validation
from ..geometry import angle_between, cosines, directions, lengths, without_autocast
from ..margins import MarginFunction


class ClassCentres:
    """What a loss, a ``nn.Module``, says of its class centres; PML's interface does so too."""

    _centres_name = "weight"
    _centres_are_columns = False
    num_classes: int
    scale: float | Tensor
    sub_centers: int
    normalize_weight = True
    is_random = False
    training: bool
    ignore_index: int | None = None

    @property
    def _centres(self) -> nn.Parameter:
        """The parameter that the class centres are."""
        parameter: nn.Parameter = getattr(self, self._centres_name)
        return parameter

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> MarginFunction:
        """The margin now in force for a batch, as a function of its target angles (N,)."""
        raise NotImplementedError

    def row_scale(self, embeddings: Tensor) -> float | Tensor:
        """The scale of the logits, a number or (N,); by default ``scale``."""
        return self.scale

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scale times cosine for every class, without a margin: what to use for inference.

        Args:
            embeddings: (N, d), floating point.

        Returns:
            (N, C), float32 at least.

        Raises:
            TypeError: If the embeddings are not floating-point.
            ValueError: If their shape or device does not fit the class centres.
        """
        weight = self._by_centre(self._centres)
        validation.floating("embeddings", embeddings, "N", "d", device=weight.device)
        validation.width("embeddings", embeddings, weight.shape[1], self.num_classes)
        with without_autocast(embeddings.device):
            cosine = self._similarities(embeddings, weight)
            if not self.normalize_weight:
                cosine = cosine * lengths(weight).to(cosine.dtype)
            if self.sub_centers > 1:
                each = cosine.shape[1] // self.sub_centers
                cosine = cosine.view(cosine.shape[0], each, self.sub_centers).amax(2)
            scale = self.row_scale(embeddings)
            if isinstance(scale, Tensor):
                scale = scale.to(cosine.dtype).reshape(-1, 1)
            return scale * cosine

    def _similarities(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        """The cosines of embeddings (N, d) with all centres (K, d): (N, K), float32 at least."""
        return cosines(embeddings, weight)

    def _by_centre(self, values: Tensor) -> Tensor:
        """What is laid out as the parameter of the centres, with a row for each of them."""
        return values.t() if self._centres_are_columns else values


def first_directions(
    init: Tensor | None, num_classes: int, sub_centers: int, like: Tensor
) -> Tensor:
    """Where the centres of some classes start: the given directions, drawn ones for none.

    All are unit vectors, float32, on the device of ``like`` (K, d).
    """
    num_centres, size = num_classes * sub_centers, like.shape[1]
    drawn = directions(torch.randn(num_centres, size, dtype=torch.float32, device="cpu"))
    drawn = drawn.to(like.device)
    if init is None:
        return drawn
    has_all = isinstance(init, Tensor) and init.shape[:1] == (num_centres,)
    validation.floating("init", init, num_centres if has_all else num_classes, size)
    given = directions(init.detach().to(drawn))
    if not has_all:  # sub-centres at one place would stay together
        given = directions(given.repeat_interleave(sub_centers, 0) + 0.1 * drawn)
    return given.where(given.any(1, keepdim=True), drawn)


def dominant_centres(
    batches: Iterable[tuple[Tensor, Tensor]],
    weight: Tensor,
    sub_centers: int,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The centre of each class that is the nearest of most of its rows; the first without rows.

    Args:
        batches: Embeddings (N, d) and labels (N,), batch by batch.
        weight: (C * sub_centers, d) all centres.
        sub_centers: The number of centres of a class.
        ignore_index: The label of rows that do not count.

    Returns:
        Which rows of the weight they are (C,), and the angle of each embedding to that of its
        class, in the order of the batches; NaN for an ignored row.
    """
    angles, own = [], []
    for embeddings, labels in batches:
        kept = validation.batch(embeddings, weight, labels, ignore_index, sub_centers)
        own.append(labels.long() if kept is None else labels.long().where(kept, 0))
        first = own[-1] * sub_centers
        of_centres = [angle_between(embeddings, weight[first + k]) for k in range(sub_centers)]
        angle = torch.stack(of_centres, 1)
        angles.append(angle if kept is None else angle.where(kept[:, None], math.nan))
    if not angles:
        raise ValueError("batches: expected at least one, got none")
    angle, labels = torch.cat(angles), torch.cat(own)
    nearest = (labels * sub_centers + angle.argmin(1))[~angle[:, 0].isnan()]
    dominant = nearest.bincount(minlength=len(weight)).view(-1, sub_centers).argmax(1)
    rows = torch.arange(0, len(weight), sub_centers).to(dominant) + dominant
    return rows, angle.gather(1, dominant[labels, None])[:, 0]
