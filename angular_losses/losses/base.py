"""What all losses of the family share: class centres, options, and the order of a forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
from torch import Tensor, nn

from .. import margins, validation
from ..engine.batch import Batch, checked
from ..engine.chunks import Ranking
from ..engine.placement import WHOLE, Placement
from ..engine.planner import MODES
from ..functional import REDUCTIONS, Options, Softmax, softmax_loss
from ..geometry import (
    angle_between,
    lengths,
    nearest_sub_centers,
    without_autocast,
    working_dtype,
)
from ..negatives import NegativeFunction
from ..schedules import Schedule
from . import labels as label_columns
from .centres import ClassCentres, dominant_centres, first_directions
from .margin_in_force import Target as Target
from .margin_in_force import in_force
from .options import LossOptions as LossOptions
from .options import settings, show_options
from .state import is_in_backward, is_in_reentrant_checkpoint, state_of_a_pass
from .usage_warnings import warn_of_small_scale, warn_of_unit_vectors, watch


class MarginLoss(ClassCentres, nn.Module):
    """What all margin losses share: class centres, a scale, and the margin softmax.

    A new loss derives from this class, keeps its margin in ``__init__`` and defines ``target``::

        class QuadraticMargin(MarginLoss):
            def target(self, theta, share):
                return torch.cos(theta) - 0.1 * share * theta**2

    A margin that differs between rows is a function that :meth:`row_target` returns; a scale that
    does, what :meth:`row_scale` returns. :meth:`negatives_function` reweights the other classes,
    :meth:`penalty` adds to the loss of a row, and :meth:`observe` updates running statistics, made
    by :meth:`register_statistic`. If ``**options`` of its ``__init__`` go to this class's, its
    signature shows each of them with its default; :class:`LossOptions` has their types.

    Each forward pass in training mode with gradients enabled is a training step: it moves the
    schedule and the statistics. A pass under ``torch.no_grad()`` moves nothing and uses them as
    they are. Where ``torch.utils.checkpoint`` runs a pass again it is still one step; for other
    repeated passes (SAM, accumulated gradients) there is :meth:`same_step`. Buffers stay
    float32 at least, whatever the loss is cast to. A loss with a schedule or statistics is for one
    thread at a time.

    Remember to give the loss's parameters to the optimiser, beside those of the network
    (:func:`angular_losses.parameter_groups`).

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        scale: The scale s > 0 of the cosines.
        schedule: A :class:`LambdaAnnealing` or :class:`MarginWarmup`, of which the loss takes a
            copy and advances it by each training step; by default the whole margin is in force
            from the start.
        gradient: "exact", or "detached": the margin moves the logit but is not differentiated
            (:func:`angular_losses.detached`), as insightface and OpenSphere train.
        sub_centers: The number of centres of a class; its angle is that of the nearest. For noisy
            labels: the wrong images of a class gather at a centre of their own.
        reduction: "mean", "sum" or "none".
        class_weight: (C,) weight of each class, as in ``nn.CrossEntropyLoss``, a tensor or any
            other sequence of numbers; kept as a buffer.
        label_smoothing: In [0, 1), as in ``nn.CrossEntropyLoss``.
        ignore_index: Rows with this label have loss 0 and gradient 0, whatever is in them.
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
        statistics: Names of the buffers that :meth:`observe` updates, of which each forward pass
            reads copies; :meth:`register_statistic` adds to them. Empty by default.
        normalize_weight: Whether only the directions of the centres enter the other classes'
            logits, as by default. If False their lengths are factors of the cosines, and the target
            has to have that of its own centre. An attribute of the class, as is the next.
        is_random: Whether a forward pass in training mode draws random numbers; then sharded
            losses draw the same ones in all processes. False by default.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least. :meth:`forward` says what else it takes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range; the message starts with its name.
    """

    ignore_index: int
    statistics: tuple[str, ...] = ()
    # Names of attributes (C, ...) of which a process that shares the classes keeps its own rows.
    _class_rows: tuple[str, ...] = ()
    # Whether the scale is all that makes logits of cosines, with a softmax after it.
    _scale_decides = True
    # Whether to look, at the first training step, if the embeddings have lengths, which matter.
    _looks_at_lengths = False
    # Whether passes belong to the training step before: see same_step.
    _is_same_step = False
    # Passes in training mode without gradients that may be steps, since the last step.
    _uncounted = 0

    def __init_subclass__(cls, **arguments: object) -> None:
        """Show all options in the signature of the class, which ``**options`` would hide."""
        super().__init_subclass__(**arguments)
        show_options(cls, LossOptions)

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
            raise validation.unknown_options(cls, unknown)
        if cls.target is MarginLoss.target and cls.row_target is MarginLoss.row_target:
            raise TypeError(f"{cls.__name__}: expected a loss that defines target or row_target")
        self.num_classes = validation.positive_integer("num_classes", num_classes)
        self.embedding_size = validation.positive_integer("embedding_size", embedding_size)
        self.scale: float | Tensor = validation.positive("scale", scale)
        validation.choice("gradient", gradient, ("exact", "detached"))
        validation.choice("reduction", reduction, REDUCTIONS)
        validation.choice("mode", mode, MODES)
        if memory_budget is not None:
            memory_budget = validation.positive_integer("memory_budget", memory_budget)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {schedule!r}")
        if class_weight is not None:
            class_weight = validation.of_classes("class_weight", class_weight)
            validation.floating("class_weight", class_weight, self.num_classes)
        if schedule is not None:  # a copy; of buffers as clones, which those without values have
            clones = {id(buffer): buffer.clone() for buffer in schedule.buffers()}
            schedule = copy.deepcopy(schedule, clones)
        self.schedule: Schedule | None = None
        self.gradient = gradient
        self.sub_centers = validation.positive_integer("sub_centers", sub_centers)
        self.reduction = reduction
        self.label_smoothing = validation.number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.ignore_index = validation.integer("ignore_index", ignore_index)
        self.mode = mode
        self.memory_budget = memory_budget
        self.shard: Placement = WHOLE
        shape = self.num_classes * self.sub_centers, self.embedding_size
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        validation.floating("dtype", self.weight, *shape)
        if class_weight is not None:
            class_weight = class_weight.detach().clone().to(self.weight.device)
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        if self._scale_decides:
            warn_of_small_scale(self.scale, self.num_classes)
        self._first_values: dict[str, float] = {}  # by the name of a tensor
        self.reset_parameters()
        if schedule is not None and not self.weight.is_meta:
            schedule.to(self.weight.device)
        self.schedule = schedule  # which goes on at its step
        watch(self)

    @torch.no_grad()
    def reset_parameters(self, init: Tensor | None = None) -> None:
        """Set anew what the constructor sets, or start the class centres from directions.

        The centres are drawn, biases and statistics have their first values, and the schedule is at
        step 0. What was given for each class, such as ``class_weight``, stays as it is.

        Args:
            init: The directions, as in :meth:`extend`, such as :func:`mean_directions` of the
                training data; (C, d), or (C * sub_centers, d). Nothing but the centres is set then.

        Raises:
            TypeError: If ``init`` is not a floating-point tensor.
            ValueError: If its shape does not fit. Nothing is changed then.
        """
        if init is not None:
            sizes = self.num_classes, self.sub_centers
            self.weight.copy_(first_directions(init, *sizes, self.weight))
            return
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)
        for name, value in self._first_values.items():
            getattr(self, name).fill_(value)
        if self.schedule is not None:
            self.schedule.reset_parameters()

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

    row_scale = ClassCentres.row_scale  # its place among the hooks, in the reference too

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction | None:
        """What reweights the other classes of this batch; None, as by default, leaves them."""
        return None

    def penalty(self, embeddings: Tensor) -> Tensor | None:
        """What is added to the loss of each row, (N,), or None, as by default."""
        return None

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Update running statistics, before the loss, at each training step, without a graph.

        Args:
            embeddings: (N, d); ones in ignored rows.
            labels: (N,) int64 in [0, C).
            weights: (N,), floating point, how much each row counts: not at all if it is ignored,
                by the share of its label if it has several, for each of which there is a row then;
                None where all count alike.
        """

    def register_statistic(self, name: str, value: float, *, per_class: bool = False) -> None:
        """Make a running statistic for :meth:`observe` to update in place, called ``name``.

        It is a buffer, float32 at least, on the device of ``weight``. ``statistics`` names it, and
        :meth:`reset_parameters` sets it to ``value`` again.

        Args:
            name: The name of the attribute.
            value: Its value at first, and that of new classes in :meth:`extend`.
            per_class: Whether it is a number for each class (C,), and not one number (). Sharded
                losses have all C of them in every process.

        Example:
            >>> class CountingLoss(MarginLoss):
            ...     def __init__(self, num_classes, embedding_size, scale=30.0, **options):
            ...         super().__init__(num_classes, embedding_size, scale, **options)
            ...         self.register_statistic("seen", 0.0, per_class=True)
            ...
            ...     def observe(self, embeddings, labels, weights):
            ...         each = torch.ones(len(labels)) if weights is None else weights
            ...         self.seen.index_add_(0, labels, each.to(self.seen))
            ...
            ...     def target(self, theta, share):
            ...         return torch.cos(theta)
            >>> loss = CountingLoss(3, 64)
            >>> _ = loss(torch.randn(4, 64), torch.tensor([0, 0, 2, 0]))
            >>> loss.seen
            tensor([3., 0., 1.])
        """
        shape = (self.num_classes,) if per_class else ()
        kept = torch.full(shape, value, dtype=validation.kept_dtype(), device=self.weight.device)
        self.register_buffer(name, kept)
        self._first_values[name] = value
        if name not in self.statistics:
            self.statistics = (*self.statistics, name)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        label_weight: Tensor | None = None,
        other_labels: Tensor | None = None,
        lam: float | Tensor | None = None,
        return_correct: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        r"""The loss of a batch; see :func:`angular_losses.margin_softmax_loss`.

        With K labels a row its loss is the sum of those with each of them, by their weights v:

        .. math:: L_i = \sum_k v_{ik}\, L(x_i, y_{ik})

        Args:
            embeddings: (N, d), floating point.
            labels: (N,) integers in [0, C), or ``ignore_index``; or (N, K) for several labels a
                row, which takes the time of K batches. A row with fewer labels is filled with
                ``ignore_index``.
            sample_weight: (N,) weight of each row, on top of that of its class.
            label_weight: (N, K) weight of each label; by default all of a row weigh alike, and 1
                together.
            other_labels: (N,) second labels of mixed rows (mixup, CutMix): short for labels (N, 2)
                with the weights lam and 1 - lam.
            lam: The share of ``labels`` in [0, 1], a number or (N,); needed with ``other_labels``.
                The values of a tensor are checked on the CPU alone.
            return_correct: Whether to return which rows are classified correctly too, found in the
                same pass: those where a class of their own, of weight above 0, has the largest
                cosine, without the margin (with lengths of centres, where the loss keeps them).

        Returns:
            A scalar, or (N,) for reduction "none"; float32 at least. With ``return_correct`` a pair
            of it and (N,) booleans, False for ignored rows.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape, a device or a label is out of place.
        """
        labels, label_weight = self._labels(embeddings, labels, label_weight, other_labels, lam)
        each, ranking = None, None
        if label_weight is None:
            batch = self._checked(embeddings, labels)
            counts = batch.kept
            if sample_weight is not None:  # before statistics move
                device = embeddings.device
                validation.floating("sample_weight", sample_weight, len(labels), device=device)
        else:
            each = label_weight.shape[1]
            batch = self._checked(embeddings.repeat_interleave(each, 0), labels.flatten())
            label_weight = label_weight.to(working_dtype(embeddings, self.weight))
            counts, sample_weight = label_columns.of_rows(label_weight, sample_weight)
            counts = counts if batch.kept is None else counts.where(batch.kept, 0)
        if return_correct:
            ranking = Ranking(batch.embeddings, working_dtype(batch.embeddings, batch.weight))
        loss = self._pass(batch, counts, sample_weight, ranking)
        if each is not None and self.reduction == "none":
            loss = loss.view(-1, each).sum(1)
        if ranking is None:
            return loss
        own, other = self.shard.largest(ranking.both)
        correct = own >= other if counts is None else (own >= other) & (counts > 0)
        return loss, correct if each is None else correct.view(-1, each).any(1)

    if TYPE_CHECKING:  # nn.Module's takes and returns anything

        @overload
        def __call__(
            self,
            embeddings: Tensor,
            labels: Tensor,
            sample_weight: Tensor | None = None,
            *,
            label_weight: Tensor | None = None,
            other_labels: Tensor | None = None,
            lam: float | Tensor | None = None,
            return_correct: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            *batch: Tensor | None,
            return_correct: Literal[True],
            **options: Tensor | float | None,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self, *batch: Tensor | None, return_correct: bool, **options: Tensor | float | None
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *batch: Any, **options: Any) -> Any: ...  # noqa: D102

    def _pass(
        self,
        batch: Batch,
        counts: Tensor | None,
        sample_weight: Tensor | None,
        ranking: Ranking | None,
    ) -> Tensor:
        """The loss with one label a row, and what a training step moves."""
        for name in self.statistics:
            if name not in self._buffers:
                raise ValueError(f"statistics: expected the names of buffers, got {name!r}")
        repeats = self._repeats_a_step()
        is_step = self.training and torch.is_grad_enabled() and not repeats
        if is_step:
            self._begin_step(batch, counts)
        moving, draws = (self.statistics, self.schedule, self._drawn), self.shard != WHOLE
        with state_of_a_pass(self, *moving, draws=draws, repeats=repeats) as this:
            options = Options(
                self.penalty(batch.embeddings),
                self.reduction,
                self.class_weight,
                sample_weight,
                self.mode,
                self.memory_budget,
                ranking,
            )
            loss = self._batch_loss(batch, options)
        if is_step:
            self.advance()
        if this is not None and self.training:
            this.keep(loss)
        if not torch.compiler.is_compiling():
            self._count(is_step)
        return loss

    def _begin_step(self, batch: Batch, counts: Tensor | None) -> None:
        """What precedes the loss of a training step: a look at the first batch, statistics."""
        if self._looks_at_lengths and validation.is_readable(batch.embeddings):
            self._looks_at_lengths = False
            rows = batch.embeddings.detach()
            warn_of_unit_vectors(self, rows if batch.kept is None else rows[batch.kept])
        if type(self).observe is not MarginLoss.observe:
            if counts is not None and counts.dtype == torch.bool:
                counts = counts.to(working_dtype(batch.embeddings, batch.weight))
            with torch.no_grad(), without_autocast(batch.embeddings.device):
                self.observe(batch.embeddings.detach(), batch.labels, counts)

    def advance(self) -> None:
        """Count a training step."""
        if self.schedule is not None:
            self.schedule.advance()

    @contextmanager
    def same_step(self) -> Iterator[None]:
        """While this lasts, forward passes belong to the training step before, and move no state.

        They use the schedule's share and the statistics that the last step used. For a step that
        takes several forward passes, such as SAM's, or gradients accumulated over small batches
        where a schedule is to count the optimiser's steps.

        Example:
            >>> from angular_losses import ArcFaceLoss, MarginWarmup
            >>> loss = ArcFaceLoss(10, 64, schedule=MarginWarmup(100))
            >>> embeddings, labels = torch.randn(8, 64), torch.arange(8)
            >>> first = loss(embeddings, labels)
            >>> with loss.same_step():
            ...     second = loss(embeddings, labels)
            >>> bool(first == second), loss.schedule.step.item()
            (True, 1)
        """
        before, self._is_same_step = self._is_same_step, True
        try:
            yield
        finally:
            self._is_same_step = before

    def _batch_loss(self, batch: Batch, options: Options) -> Tensor:
        """The loss with one label a row, state left as it is: the margin softmax."""
        embeddings, labels = batch.embeddings, batch.labels
        softmax = Softmax(
            self.margin_function(embeddings, labels),
            self.row_scale(embeddings),
            self.negatives_function(embeddings, labels),
            self.normalize_weight,
            self.label_smoothing,
        )
        return softmax_loss(batch, softmax, options)

    def _centres_here(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The centres that this process holds, all as a rule, and the labels as they count them."""
        return self.shard.centres(self.weight, self.sub_centers), self.shard.local(labels)

    def target_angles(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The angles to the targets' nearest centres (N,); the gradient reaches the centres."""
        weight, here = self._centres_here(labels)
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
        target = self.row_target(embeddings, labels)
        if not callable(target):
            raise TypeError(f"row_target: expected a function of theta and share, got {target!r}")
        return in_force(target, self.schedule, self.gradient)

    def _of_classes(
        self,
        name: str,
        value: float | Tensor | Sequence[float],
        check: Callable[[str, object], float],
    ) -> float | Tensor:
        """A number, checked, or one for each class (C,), kept as a buffer of that name."""
        if isinstance(value, (Real, str)):
            return check(name, value)
        value = validation.of_classes(name, value)
        validation.floating(name, value, self.num_classes)
        for extreme in value.aminmax():
            if validation.has_values(extreme):
                check(name, extreme.item())
        kept = value.detach().clone().to(self.weight.device)
        self.register_buffer(name, kept)
        return kept

    @torch.no_grad()
    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Add classes to a trained loss; those it has keep their centres and their numbers.

        ``weight`` becomes a new parameter, so make a new optimiser, or give it this one. Of what is
        kept for each class, new classes have weight 1, the largest of the margins, and the first
        value of a statistic.

        Args:
            num_new: How many classes are added.
            init: The directions of their centres, floating point, such as
                :func:`mean_directions` of their data: (num_new, d), near which all sub-centres of
                a class start, or (num_new * sub_centers, d). By default, and where a row is zero,
                they are drawn at random. They are given the mean length of the centres there are.

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
        num_new = validation.positive_integer("num_new", num_new)
        old, new = self.weight, first_directions(init, num_new, self.sub_centers, self.weight)
        mean_length = self.shard.total(lengths(old).sum()) / (self.num_classes * self.sub_centers)
        new = new * mean_length.to(new.dtype)
        self._extend_buffers(num_new)
        weight = self.shard.appended(old, new, num_new)
        self.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        self.num_classes += num_new
        watch(self)

    @torch.no_grad()
    def drop_sub_centers(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Keep the dominant centre of each class alone: the nearest one of most of its rows.

        Where labels are noisy, rows far from it (in the paper further than 75 degrees) are to be
        left out, and the network trained again. ``weight`` becomes a new parameter (C, d), so make
        a new optimiser, or give it this one.

        Args:
            batches: Embeddings (N, d) and labels (N,) of the training data, batch by batch, such as
                a generator over a data loader; it runs without gradients.

        Returns:
            The angle of each row to the centre kept, in radians, float64, in the order of the
            batches; NaN for an ignored row.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If there are no batches, or a shape, a device or a label is out of place.
                Nothing is changed then.

        Example:
            >>> from angular_losses import SubCenterArcFaceLoss
            >>> loss = SubCenterArcFaceLoss(10, 64, sub_centers=2)
            >>> angles = loss.drop_sub_centers([(torch.randn(30, 64), torch.arange(30) % 10)])
            >>> far = (angles.rad2deg() > 75).nonzero()[:, 0]
            >>> loss.weight.shape
            torch.Size([10, 64])

        References:
            Deng et al., "Sub-center ArcFace", ECCV 2020, section 3.3.
        """
        kept, angles = dominant_centres(batches, self.weight, self.sub_centers, self.ignore_index)
        self.weight = nn.Parameter(self.weight[kept], self.weight.requires_grad)
        self.sub_centers = 1
        watch(self)
        return angles

    def _extend_buffers(self, num_new: int) -> None:
        """Make room for new classes in what is kept for each class."""
        fills: dict[str, float | None] = {"class_weight": 1.0, "margin": None}
        fills |= {k: first for k, first in self._first_values.items() if k in self.statistics}
        for name, fill in fills.items():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.shape == (self.num_classes,):
                last = buffer.max() if fill is None else buffer.new_tensor(fill)
                setattr(self, name, torch.cat([buffer, last.expand(num_new)]))

    def extra_repr(self) -> str:
        """The settings, with options left at their defaults left out."""
        sizes = str(self.num_classes), str(self.embedding_size)
        return ", ".join([*sizes, *settings(self, MarginLoss.__init__)])

    def _checked(self, embeddings: Tensor, labels: Tensor) -> Batch:
        return checked(
            embeddings, self.weight, labels, self.ignore_index, self.sub_centers, self.shard
        )

    def _labels(
        self,
        embeddings: Tensor,
        labels: Tensor,
        label_weight: Tensor | None,
        other_labels: Tensor | None,
        lam: float | Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Labels (N,), or (N, K) with their weights (N, K), of what a user passes."""
        if other_labels is None and lam is None:
            return label_columns.several(
                embeddings, labels, label_weight, self.ignore_index, self.num_classes
            )
        if label_weight is not None:
            raise ValueError("label_weight: expected it without other_labels and lam")
        if other_labels is None or lam is None:
            missing = "other_labels" if other_labels is None else "lam"
            raise ValueError(f"{missing}: expected it beside the other of other_labels and lam")
        sizes = self.ignore_index, self.sub_centers, self.num_classes
        for name, each in (("labels", labels), ("other_labels", other_labels)):
            validation.batch(embeddings, self.weight, each, *sizes, name=name)
        return label_columns.mixed(embeddings, labels, other_labels, lam)

    def _repeats_a_step(self) -> bool:
        """Whether a pass belongs to the step before.

        One inside a backward pass does: checkpointing recomputes what the backward pass needs. Not
        if the pass to be recomputed had no gradients, as reentrant checkpointing has it.
        """
        if not self.training:
            return False
        if self._is_same_step or not is_in_backward():
            return self._is_same_step
        return not (self._uncounted and is_in_reentrant_checkpoint())

    @property
    def _drawn(self) -> Tensor | int | None:
        """What this pass has drawn, where a recomputation has to have the same."""
        return None

    def _count(self, is_step: bool) -> None:
        """Take notice of a pass that a backward pass may have to recompute."""
        if self.training and not torch.is_grad_enabled():
            self._uncounted += not self._is_same_step
        elif is_step and self._uncounted:  # a module is slow to set what is as it was
            self._uncounted = self._uncounted - 1 if is_in_backward() else 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:  # noqa: ANN401
        """Load the full state of a sharded loss too.

        Its weight is (C, sub_centers, d), and it may count batches.
        """
        weight, by_class = state_dict.get(f"{prefix}weight"), (self.num_classes, self.sub_centers)
        if isinstance(weight, Tensor) and weight.dim() == 3 and weight.shape[:2] == by_class:
            state_dict[f"{prefix}weight"] = weight.flatten(0, 1)
        if not hasattr(self, "batches"):
            state_dict.pop(f"{prefix}batches", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MarginLoss:
        """Keep the buffers in float32 at least: in half precision running statistics stall."""
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = buffers
        for name, buffer in buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                dtype = torch.promote_types(moved.dtype, torch.float32)
                is_kept = moved.dtype in (dtype, buffer.dtype)
                buffers[name] = moved if is_kept else buffer.to(moved.device, dtype)
        return self


show_options(MarginLoss, LossOptions)
