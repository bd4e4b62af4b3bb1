"""The class centres that a loss owns: the logits of them, where they start, and which are kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import validation
from ..geometry import cosines, directions, lengths, without_autocast
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


def dominant_centres(nearest: Tensor, num_centres: int, sub_centers: int) -> Tensor:
    """The row of each class's dominant centre (C,): the nearest one of most rows, whose are (N,).

    For a class without rows it is the first.
    """
    votes = nearest.bincount(minlength=num_centres).view(-1, sub_centers)
    first = torch.arange(0, num_centres, sub_centers, device=nearest.device)
    return first + votes.argmax(1)
