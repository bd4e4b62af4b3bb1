"""What all losses of the family share: class centres, options, and the order of a forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import NoReturn, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from . import checks, margins
from .centres import ClassCentres, watch
from .geometry import angle_between, cosines, directions, lengths, nearest_sub_centers
from .planner import MODES
from .reductions import REDUCTIONS
from .schedules import Schedule
from .shards import WHOLE, Shard, Whole
from .softmax import NegativeFunction, margin_softmax_loss

Target: TypeAlias = Callable[[Tensor, "float | Tensor"], Tensor]


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every loss takes; :class:`MarginLoss` describes them."""

    schedule: Schedule | None
    gradient: str
    sub_centers: int
    reduction: str
    class_weight: Tensor | Sequence[float] | None
    label_smoothing: float
    ignore_index: int
    mode: str
    memory_budget: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class BatchOptions(TypedDict):
    """What every loss function takes beside the batch and the loss itself."""

    sub_centers: int
    penalty: Tensor | None
    reduction: str
    class_weight: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    mode: str
    memory_budget: int | None
    shard: Shard | Whole


class MarginLoss(ClassCentres, nn.Module):
    """What all margin losses share: class centres, a scale, and the margin softmax.

    A new loss derives from this class, keeps its margin in ``__init__`` and defines ``target``::

        class QuadraticMargin(MarginLoss):
            def target(self, theta, share):
                return torch.cos(theta) - 0.1 * share * theta**2

    A margin that differs between rows is a function that :meth:`row_target` returns; a scale that
    does, what :meth:`row_scale` returns. :meth:`negatives_function` reweights the other classes,
    :meth:`penalty` adds to the loss of a row, and :meth:`observe` updates running statistics.

    Remember to give the loss's parameters to the optimiser, beside those of the network
    (:func:`angular_losses.parameter_groups`).

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        scale: The scale s > 0 of the cosines.
        schedule: A :class:`LambdaAnnealing` or :class:`MarginWarmup`, advanced by each forward
            pass in training mode; by default the whole margin is in force from the start.
        gradient: "exact", or "detached": the margin moves the logit but is not differentiated
            (:func:`angular_losses.detached`), as insightface and OpenSphere train.
        sub_centers: The number of centres of a class; its angle is that of the nearest. For noisy
            labels: the wrong images of a class gather at a centre of their own.
        reduction: "mean", "sum" or "none".
        class_weight: (C,) weight of each class, as in ``nn.CrossEntropyLoss``, a tensor or any
            other sequence of numbers; kept as a buffer.
        label_smoothing: In [0, 1), as in ``nn.CrossEntropyLoss``.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        mode: "auto", "dense", "stash" or "recompute": how the softmax is computed
            (:func:`angular_losses.margin_softmax_loss`).
        memory_budget: Bytes that may be used beyond embeddings, weight and their gradients; by
            default as :func:`angular_losses.plan` says.
        device: Where to make ``weight``.
        dtype: The dtype of ``weight``.

    Attributes:
        weight: (C * sub_centers, d) parameter, the class centres, sub-centre k of class c in row
            c * sub_centers + k; only their directions enter the loss. Drawn from a normal
            distribution with standard deviation d ** -0.5, so of length about 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range; the message starts with its name.
    """

    ignore_index: int
    # Whether only the directions of the centres count, and not their lengths.
    normalize_weight = True
    # Whether the scale is all that makes logits of cosines, with a softmax after it.
    scale_decides = True
    # Whether a forward pass in training mode draws random numbers.
    is_random = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float,
        *,
        schedule: Schedule | None = None,
        gradient: str = "exact",
        sub_centers: int = 1,
        reduction: str = "mean",
        class_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        mode: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        cls = type(self)
        if unknown:
            raise checks.unknown_options(cls, unknown)
        if cls.target is MarginLoss.target and cls.row_target is MarginLoss.row_target:
            raise TypeError(f"{cls.__name__}: expected a loss that defines target or row_target")
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        self.embedding_size = checks.positive_integer("embedding_size", embedding_size)
        self.scale: float | Tensor = checks.positive("scale", scale)
        checks.choice("gradient", gradient, ("exact", "detached"))
        checks.choice("reduction", reduction, REDUCTIONS)
        checks.choice("mode", mode, MODES)
        if memory_budget is not None:
            memory_budget = checks.positive_integer("memory_budget", memory_budget)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {schedule!r}")
        if class_weight is not None:
            class_weight = checks.of_classes("class_weight", class_weight)
            checks.floating("class_weight", class_weight, self.num_classes)
            class_weight = class_weight.detach().to(device=device)
        self.schedule = schedule
        self.gradient = gradient
        self.sub_centers = checks.positive_integer("sub_centers", sub_centers)
        self.reduction = reduction
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.ignore_index = ignore_index
        self.mode = mode
        self.memory_budget = memory_budget
        self.shard: Shard | Whole = WHOLE
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        self.weight = nn.Parameter(
            torch.empty(
                self.num_classes * self.sub_centers,
                self.embedding_size,
                device=device,
                dtype=dtype,
            )
        )
        if self.scale_decides:
            self._warn_of_small_scale(self.scale)
        self.reset_parameters()
        watch(self)

    def reset_parameters(self) -> None:
        """Draw the class centres anew."""
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """The target logits before scaling.

        Args:
            theta: Target angles (N,) in radians, float64.
            share: How much of the margin is in force, in [0, 1]; 1 without a warm-up.

        Returns:
            (N,).
        """
        raise NotImplementedError(f"{type(self).__name__} defines row_target instead")

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The function that :meth:`target` is by default, for margins that differ between rows.

        Args:
            embeddings: (N, d).
            labels: (N,) int64 in [0, C).

        Returns:
            A function of theta (N,) and share, without side effects.
        """
        return self.target

    def row_scale(self, embeddings: Tensor) -> float | Tensor:
        """The scale of the logits, a number or (N,); by default ``scale``."""
        return self.scale

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction | None:
        """What reweights the other classes of this batch; None, as by default, leaves them."""
        return None

    def penalty(self, embeddings: Tensor) -> Tensor | None:
        """What is added to the loss of each row, (N,), or None, as by default."""
        return None

    def observe(self, embeddings: Tensor, labels: Tensor, kept: Tensor | None) -> None:
        """Update running statistics, before the loss, in training mode, without a graph.

        Args:
            embeddings: (N, d).
            labels: (N,) int64 in [0, C).
            kept: (N,) which rows are not ignored; None where all are kept.
        """

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        other_labels: Tensor | None = None,
        lam: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; see :func:`angular_losses.margin_softmax_loss`.

        Args:
            embeddings: (N, d), floating point.
            labels: (N,) integers in [0, C), or ``ignore_index``.
            sample_weight: (N,) weight of each row, on top of that of its class.
            other_labels: (N,) second labels of mixed rows (mixup, CutMix): the loss of a row is
                lam times that with its label plus 1 - lam times that with the other. It takes
                the time of two batches.
            lam: The share of ``labels`` in [0, 1], a number or (N,); needed with ``other_labels``.

        Returns:
            A scalar, or (N,) for reduction "none"; float32 at least.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape, a device or a label is out of place.
        """
        kept = self._check(embeddings, labels)  # before anything is looked up or updated
        if self.training and type(self).observe is not MarginLoss.observe:
            with torch.no_grad(), torch.autocast(embeddings.device.type, enabled=False):
                self.observe(embeddings.detach(), self.known(labels), kept)
        if other_labels is None and lam is None:
            loss = self.batch_loss(embeddings, labels, sample_weight)
        else:
            loss = self._mixed(embeddings, labels, sample_weight, other_labels, lam)
        if self.training and self.schedule is not None:
            self.schedule.advance()
        return loss

    def batch_loss(
        self, embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None
    ) -> Tensor:
        """The loss with one label a row, state left as it is: the margin softmax."""
        own = self.known(labels)
        return margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            margin=self.margin_function(embeddings, own),
            scale=self.row_scale(embeddings),
            negatives=self.negatives_function(embeddings, own),
            normalize_weight=self.normalize_weight,
            label_smoothing=self.label_smoothing,
            **self.batch_options(embeddings, sample_weight),
        )

    def batch_options(self, embeddings: Tensor, sample_weight: Tensor | None) -> BatchOptions:
        """The options that do not depend on which loss it is."""
        return {
            "sub_centers": self.sub_centers,
            "penalty": self.penalty(embeddings),
            "reduction": self.reduction,
            "class_weight": self.class_weight,
            "sample_weight": sample_weight,
            "ignore_index": self.ignore_index,
            "mode": self.mode,
            "memory_budget": self.memory_budget,
            "shard": self.shard,
        }

    def centres_here(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The centres that this process holds, all as a rule, and the labels as they count them."""
        return self.shard.centres(self.weight, self.sub_centers), self.shard.local(labels)

    def target_angles(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The angles to the targets' nearest centres (N,); the gradient reaches the centres."""
        weight, here = self.centres_here(labels)
        own = nearest_sub_centers(embeddings, weight, here, self.sub_centers)
        return self.shard.of_targets(
            lambda centres: angle_between(embeddings, centres), weight, own
        )

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> margins.MarginFunction:
        """The margin now in force for a batch, as a function of its target angles.

        Schedule and gradient mode are included.

        Args:
            embeddings: (N, d).
            labels: (N,) int64 in [0, C).

        Returns:
            A function of theta (N,), in radians, that returns the target logits before scaling.
        """
        target, schedule = self.row_target(embeddings, labels), self.schedule

        def margin(theta: Tensor) -> Tensor:
            if schedule is None:
                return target(theta, 1.0)
            scheduled: Tensor = schedule(target, theta)
            return scheduled

        return margins.detached(margin) if self.gradient == "detached" else margin

    def known(self, labels: Tensor) -> Tensor:
        """Labels to look things up with: those to be ignored are 0."""
        labels = labels.long()
        if 0 <= self.ignore_index < self.num_classes:
            return labels
        return labels.where(labels != self.ignore_index, 0)

    def of_classes(
        self,
        name: str,
        value: float | Tensor | Sequence[float],
        check: Callable[[str, object], float],
        device: torch.device | str | None,
    ) -> float | Tensor:
        """A number, checked, or one for each class (C,), kept as a buffer of that name."""
        if isinstance(value, (Real, str)):
            return check(name, value)
        value = checks.of_classes(name, value)
        checks.floating(name, value, self.num_classes)
        for extreme in value.aminmax():
            check(name, extreme.item())
        kept = value.detach().clone().to(device=device)
        self.register_buffer(name, kept)
        return kept

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scale times cosine for every class, without a margin: what to use for inference.

        Args:
            embeddings: (N, d), floating point.

        Returns:
            (N, C), float32 at least.

        Raises:
            TypeError: If the embeddings are not floating-point.
            ValueError: If their shape or device does not fit ``weight``.
        """
        checks.floating("embeddings", embeddings, "N", "d", device=self.weight.device)
        checks.width("embeddings", embeddings, self.embedding_size, self.num_classes)
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = cosines(embeddings, self.weight)
            if not self.normalize_weight:
                cosine = cosine * lengths(self.weight).to(cosine.dtype)
            if self.sub_centers > 1:
                cosine = cosine.view(-1, self.num_classes, self.sub_centers).amax(2)
            scale = self.row_scale(embeddings)
            if isinstance(scale, Tensor):
                scale = scale.to(cosine.dtype).reshape(-1, 1)
            return scale * cosine

    @torch.no_grad()
    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Add classes to a trained loss; those it has keep their centres and their numbers.

        ``weight`` becomes a new parameter, so make a new optimiser, or give it this one. Of what is
        kept for each class, new classes have weight 1 and the largest of the margins.

        Args:
            num_new: How many classes are added.
            init: (num_new, d) the directions of their centres, such as the mean embedding of each
                class (its sub-centres all start near it), floating point; drawn at random by
                default. They are given the mean length of the centres there are.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range or has the wrong shape. Nothing is changed then.

        Example:
            >>> from angular_losses import ArcFaceLoss
            >>> loss = ArcFaceLoss(10, 64)
            >>> loss.extend(2)
            >>> loss.get_logits(torch.randn(1, 64)).shape
            torch.Size([1, 12])
        """
        num_new = checks.positive_integer("num_new", num_new)
        old, each = self.weight, self.sub_centers
        drawn = torch.randn(num_new * each, self.embedding_size, dtype=torch.float32)
        new = directions(drawn.to(old.device))
        if init is not None:
            checks.floating("init", init, num_new, self.embedding_size)
            given = directions(init.detach().to(old.device, torch.float32))
            # Sub-centres at one place would stay together.
            apart = 0.0 if each == 1 else 0.1
            new = directions(given.repeat_interleave(each, 0) + apart * new)
        new = new * lengths(old).mean().to(new.dtype)
        self.extend_buffers(num_new)
        self.weight = nn.Parameter(
            torch.cat([old, new.to(old.dtype)]), requires_grad=old.requires_grad
        )
        self.num_classes += num_new
        watch(self)

    def extend_buffers(self, num_new: int) -> None:
        """Make room for new classes in what is kept for each class."""
        for name, fill in (("class_weight", 1.0), ("margin", None)):
            buffer = self._buffers.get(name)
            if buffer is not None:
                last = buffer.max() if fill is None else buffer.new_tensor(fill)
                setattr(self, name, torch.cat([buffer, last.expand(num_new)]))

    def extra_repr(self) -> str:
        """The settings, with options left at their defaults left out."""
        settings = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
            and name not in _SHOWN_FIRST
            and value != _DEFAULTS.get(name)
        )
        return ", ".join([str(self.num_classes), str(self.embedding_size), *settings])

    def _warn_of_small_scale(self, scale: float) -> None:
        """Warn if even embeddings on their centres would be far from sure of their class."""
        if self.num_classes < 2:
            return
        # CosFace's bound: the smallest scale for probability 0.9 with the best of all centres.
        share = (self.num_classes - 1) / self.num_classes
        least = share * math.log(9 * (self.num_classes - 1))
        if scale < least:
            warnings.warn(
                f"scale: {scale:g} is small for {self.num_classes} classes: with less than "
                f"{least:.1f} the loss stays large for perfect embeddings; see suggest_scale",
                stacklevel=4,
            )

    def _check(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        num_classes = self.shard.num_classes_of(self.weight, self.sub_centers)
        return checks.batch(
            embeddings, self.weight, labels, self.ignore_index, self.sub_centers, num_classes
        )

    def _mixed(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None,
        other_labels: Tensor | None,
        lam: float | Tensor | None,
    ) -> Tensor:
        """Both labels in one batch of twice the size, each row weighted by its share.

        The two of a row are neighbours, so that the rows of a process stay together.
        """
        if other_labels is None or lam is None:
            missing = "other_labels" if other_labels is None else "lam"
            raise ValueError(f"{missing}: expected it beside the other of other_labels and lam")
        self._check(embeddings, other_labels)
        if isinstance(lam, Tensor) and lam.dim():
            checks.floating("lam", lam, len(labels), device=embeddings.device)
        elif not isinstance(lam, Tensor):
            checks.share("lam", lam)
        share = torch.as_tensor(lam, device=embeddings.device).to(self.weight.dtype)
        share = share.expand(len(labels))
        weights = torch.stack([share, 1 - share], 1)
        if sample_weight is not None:
            checks.floating("sample_weight", sample_weight, len(labels), device=embeddings.device)
            weights = weights * sample_weight[:, None]
        loss = self.batch_loss(
            embeddings.repeat_interleave(2, 0),
            torch.stack([labels, other_labels], 1).flatten(),
            weights.flatten(),
        )
        return loss.view(-1, 2).sum(1) if self.reduction == "none" else loss


_SHOWN_FIRST = ("training", "num_classes", "embedding_size")
_DEFAULTS = {
    "gradient": "exact",
    "sub_centers": 1,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "mode": "auto",
    "beyond": "decreasing",
    "scale_decides": True,
    "shard": WHOLE,
}
