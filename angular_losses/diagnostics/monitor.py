"""The monitor, which collects the measures during training."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from .. import collectives, validation
from ..engine.placement import WHOLE
from ..geometry import lengths, precise_dtype
from ..losses.base import MarginLoss
from ..losses.centres import ClassCentres
from ..losses.state import is_in_backward
from ..margins import MarginFunction
from .measures import (
    angle_histogram,
    batch_angles,
    centre_separation,
    collapsed_classes,
    effective_margin,
    gradient_norm_per_class,
    histogram_quantile,
    margin_violations,
)
from .plots import plot_angles, plot_gradient_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 180
# Above the rounding differences of equal centres on different devices.
TOLERANCE = 1e-5
# The rows of the sums per class.
ROWS, TARGET, NEAREST, MARGIN, VIOLATIONS, ERRORS, NOT_FINITE, GRADIENT = range(8)


class Snapshot(NamedTuple):
    """The data of a monitor, on the CPU, returned by :meth:`AngularMonitor.snapshot`.

    Attributes:
        numbers: The metrics of :meth:`AngularMonitor.summary`.
        target: (180,) histogram of the target angles, one bin per degree.
        nearest: (180,) histogram of the angles to the nearest other class.
        rows: (C,) number of rows of each class.
        target_mean: (C,) mean target angle of each class, radians; NaN for classes without rows.
        violation_rate: (C,) share of the rows of each class that violate the margin.
        gradient_norm: (C,) mean gradient norm of the centre of each class; NaN without gradients.
    """

    numbers: dict[str, float]
    target: Tensor
    nearest: Tensor
    rows: Tensor
    target_mean: Tensor
    violation_rate: Tensor
    gradient_norm: Tensor


class AngularMonitor:
    """Collects angles, margin violations and gradients during training, without synchronising.

    ::

        monitor = AngularMonitor(loss, every=10)
        with monitor.attach():                        # or call update explicitly
            for step, (images, labels) in enumerate(batches):
                loss(network(images), labels).backward()
                ...
                if step % 1000 == 999:
                    print(monitor.log(step, writer))  # a dict; starts the next window

    A measured step costs one (N, d) x (d, C) product in float32, where the loss takes three or
    four, and one pass over the gradient of the centres. Sums and histograms are stored on the
    device of the loss, 64 bytes per class; only :meth:`snapshot`, :meth:`summary` and :meth:`log`
    synchronise with it.

    Args:
        loss: A loss of this package, including
            :mod:`~angular_losses.integrations.pytorch_metric_learning`; it is not modified.
        every: Measure only every k-th batch.

    Attributes:
        history: The dicts that :meth:`log` returned, for :func:`plot_history`.

    Raises:
        TypeError: If the loss is not one of those, or ``every`` not an int.
        ValueError: If the loss has fewer than two classes, or ``every`` is below 1.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> loss = ArcFaceLoss(num_classes=10, embedding_size=64)
        >>> monitor = AngularMonitor(loss)
        >>> monitor.update(torch.randn(32, 64), torch.arange(32) % 10)
        >>> summary = monitor.summary()
        >>> summary["rows"], f"{summary['margin_mean']:.2f}"
        (32.0, '0.50')
    """

    def __init__(self, loss: ClassCentres, *, every: int = 1) -> None:
        if not isinstance(loss, ClassCentres):
            raise TypeError(f"loss: expected a MarginLoss, got {loss!r}")
        if getattr(loss, "shard", WHOLE) != WHOLE:
            raise TypeError(
                "loss: expected an unsharded loss, use unshard(loss), of all classes, use "
                "sample_classes(loss, 1)"
            )
        if loss.num_classes < 2:
            raise ValueError(f"loss: expected at least 2 classes, got {loss.num_classes}")
        self.loss = loss
        self.every = validation.positive_integer("every", every)
        self.history: list[dict[str, float]] = []
        self._batches = 0
        self._sums: Tensor | None = None
        # The centres whose gradient is measured, and the hook that measures it.
        self._watched: tuple[nn.Parameter, RemovableHandle] | None = None

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Measure a batch with the current margin; does not synchronise.

        Args:
            embeddings: (N, d), floating point.
            labels: (N,) integers in [0, C), or the loss's ``ignore_index``: such rows are ignored.
                With several labels (N, K) a row counts once for each.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes or devices do not fit, or a label is out of range.
        """
        self._batches += 1
        if not self._is_sampled():
            return
        loss = self.loss
        centres = loss._by_centre(loss._centres)
        if isinstance(labels, Tensor) and labels.dim() == 2:
            embeddings = embeddings.repeat_interleave(labels.shape[1], 0)
            labels = labels.flatten()
        kept = validation.batch(embeddings, centres, labels, loss.ignore_index, loss.sub_centers)
        if kept is None:
            kept = torch.ones_like(labels, dtype=torch.bool)
        labels = labels.long().where(kept, 0)
        angles = batch_angles(embeddings, centres, labels, loss.sub_centers)
        margin = self._margin(embeddings, labels)
        finite = angles.target.isfinite() & angles.nearest.isfinite()
        counted = kept & finite
        measured = {
            ROWS: counted,
            TARGET: angles.target,
            NEAREST: angles.nearest,
            MARGIN: effective_margin(margin, angles.target),
            VIOLATIONS: margin_violations(angles, margin),
            ERRORS: angles.gap <= 0,
        }
        histograms, per_class, _ = self._views(self._sums_on(centres.device))
        for histogram, theta in zip(histograms, angles[:2], strict=True):
            histogram += angle_histogram(theta.masked_fill(~counted, torch.nan), BINS)
        columns = {name: value.where(counted, 0) for name, value in measured.items()}
        columns[NOT_FINITE] = kept & ~finite
        stacked = torch.stack([columns[row].to(per_class.dtype) for row in range(GRADIENT)])
        per_class[:GRADIENT].index_add_(1, labels, stacked)

    @torch.no_grad()
    def update_gradients(self, gradient: Tensor) -> None:
        """Measure the gradient of the class centres, if the last batch was measured.

        Args:
            gradient: In the shape of the loss's weight, such as ``loss.weight.grad`` after
                ``backward`` (``W`` in pytorch-metric-learning); a ``GradScaler`` scales it.

        Raises:
            TypeError: If the gradient is not a floating-point tensor.
            ValueError: If its shape does not fit.
        """
        if not self._is_sampled():
            return
        validation.floating("gradient", gradient, *self.loss._centres.shape)
        gradient = self.loss._by_centre(gradient)
        _, per_class, gradients_seen = self._views(self._sums_on(gradient.device))
        norms = gradient_norm_per_class(gradient, self.loss.sub_centers)
        is_finite = norms.isfinite().all()  # not after a row with a NaN, or an overflow
        per_class[GRADIENT] += norms.where(is_finite, 0)
        gradients_seen += is_finite

    def attach(self) -> ExitStack:
        """Register hooks, so that the loss calls both updates in training mode.

        The margin is that of the schedule for the batch; if it depends on running statistics of the
        embeddings, it is that before the update by the batch.

        Returns:
            A context manager; its exit, or its ``close()``, removes the hooks.
        """
        hooks = ExitStack()
        loss = cast(nn.Module, self.loss)
        hooks.enter_context(loss.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._watch(self.loss._centres)
        hooks.callback(self._watch, None)
        return hooks

    def reset(self) -> None:
        """Discard the collected data, but not ``history``."""
        self._sums = None

    def snapshot(self, *, across_ranks: bool = True) -> Snapshot:
        """The data since the last reset; synchronises once.

        Args:
            across_ranks: Reduce over all ranks where ``torch.distributed`` is initialised, and warn
                if their class centres differ; all ranks have to call it then. False: this rank
                only.
        """
        sums = self._sums_on(self.loss._centres.device)
        divergence = sums.new_zeros(())
        if across_ranks:
            sums, divergence = collectives.total(sums), self._divergence()
        counted = torch.cat([sums, divergence[None]]).cpu()
        if counted[-1] > TOLERANCE:
            warnings.warn(
                "weight: the class centres differ between processes; wrap the loss like the "
                "network (DistributedDataParallel, accelerator.prepare), or shard it",
                stacklevel=2,
            )
        (target, nearest), per_class, gradients_seen = self._views(counted[:-1])
        rows = per_class[ROWS]
        per_row = per_class / rows
        norms = per_class[GRADIENT] / gradients_seen
        total = per_class.sum(1)
        mean = (total / total[ROWS]).tolist()
        numbers = {
            "rows": float(total[ROWS]),
            "not_finite": float(total[NOT_FINITE]),
            "classes_seen": float((rows > 0).sum()),
            "target_mean": mean[TARGET],
            "target_median": histogram_quantile(target, 0.5),
            "nearest_mean": mean[NEAREST],
            "nearest_median": histogram_quantile(nearest, 0.5),
            "margin_mean": mean[MARGIN],
            "violation_rate": mean[VIOLATIONS],
            "error_rate": mean[ERRORS],
            "gradient_norm_mean": float(norms.mean()),
            "gradient_norm_max": float(norms.max()),
        }
        return Snapshot(numbers, target, nearest, rows, per_row[TARGET], per_row[VIOLATIONS], norms)

    def summary(self, *, centres: bool = False, across_ranks: bool = True) -> dict[str, float]:
        """The metrics of a :meth:`snapshot`.

        Angles are in radians; metrics without data are NaN.

        - ``rows``, ``classes_seen``: the numbers of rows and of classes.
        - ``not_finite``: rows with a NaN or infinity, excluded from all other metrics.
        - ``target_mean``, ``target_median``, ``nearest_mean``, ``nearest_median``: angles to the
          own class and to the nearest other one; medians accurate to 1 degree (0.017).
        - ``margin_mean``: the effective margin (:func:`effective_margin`).
        - ``violation_rate``, ``error_rate``: share of misclassified rows with the margin
          (:func:`margin_violations`) and without it.
        - ``gradient_norm_mean``, ``gradient_norm_max``: over the classes, of the mean over batches
          whose gradient is finite.
        - With ``centres``: ``separation_min``, ``separation_bound``, ``collapsed_pairs`` and
          ``without_direction`` of :func:`centre_separation` and :func:`collapsed_classes`.

        Args:
            centres: Include the separation of the class centres: a (C, d) x (d, C) product, the
                cost of C / N batches. Under ``fully_shard`` all ranks have to call it.
            across_ranks: See :meth:`snapshot`.
        """
        numbers = self.snapshot(across_ranks=across_ranks).numbers
        return numbers | self._separation() if centres else numbers

    def log(
        self,
        step: int,
        writer: Any = None,  # noqa: ANN401 - whatever has add_scalar
        *,
        centres: bool = False,
        figures: bool = False,
    ) -> dict[str, float]:
        """Summarise and write the batches since the last log, and reset.

        Args:
            step: The training step, for the writer's axis and for ``history``.
            writer: A ``SummaryWriter`` of TensorBoard or a similar object: scalars are written with
                ``add_scalar``, the distributions of angles (degrees) with ``add_histogram`` and
                figures with ``add_figure``, if it has these methods.
            centres: See :meth:`summary`.
            figures: Write figures too, which needs matplotlib.

        Returns:
            The :meth:`summary` with "step", which is also appended to ``history``.

        Raises:
            TypeError: If the writer has no ``add_scalar``.
            ImportError: If figures are requested and matplotlib is not installed.
        """
        if writer is not None and not hasattr(writer, "add_scalar"):
            raise TypeError(f"writer: expected an object with add_scalar, got {writer!r}")
        snapshot = self.snapshot()
        if centres:
            snapshot.numbers.update(self._separation())
        if writer is not None:
            _write(writer, step, snapshot, self.figures(snapshot) if figures else {})
        self.history.append({"step": float(step), **snapshot.numbers})
        self.reset()
        return self.history[-1]

    def figures(self, snapshot: Snapshot | None = None) -> dict[str, Figure]:
        """Figures of a snapshot: "angles" if there are rows, "gradient_norms" if gradients.

        Args:
            snapshot: The data; by default the current snapshot.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        snapshot = snapshot or self.snapshot()
        drawn = {}
        if snapshot.rows.any():
            margin = snapshot.numbers["margin_mean"]
            drawn["angles"] = plot_angles(snapshot.target, snapshot.nearest, margin=margin)
        if snapshot.gradient_norm.nan_to_num().any():
            drawn["gradient_norms"] = plot_gradient_norms(snapshot.gradient_norm, snapshot.rows)
        return drawn

    def _is_sampled(self) -> bool:
        """Whether the last batch is measured."""
        return max(self._batches - 1, 0) % self.every == 0

    def _before_forward(
        self, loss: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if loss.training and not is_in_backward():  # where checkpointing recomputes a pass
            given = inspect.signature(loss.forward).bind(*args, **kwargs)
            given.apply_defaults()
            embeddings, labels = given.arguments["embeddings"], given.arguments["labels"]
            other, lam = (given.arguments.get(name) for name in ("other_labels", "lam"))
            if isinstance(loss, MarginLoss) and other is not None:  # with the errors of the loss
                labels, _ = loss._labels(embeddings, labels, None, other, lam)
            elif isinstance(embeddings, Tensor) and isinstance(labels, Tensor):
                labels = self._followed(embeddings, labels)
            self._watch(self.loss._centres)
            self.update(embeddings, labels)

    def _followed(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The labels, where a loss with PML's interface brings them and its centres."""
        cast_types = getattr(self.loss, "cast_types", None)
        if cast_types is None:
            return labels
        cast_types(self.loss._centres.dtype, embeddings.device)
        return labels.to(embeddings.device)

    @_disable_dynamo
    def _watch(self, centres: nn.Parameter | None) -> None:
        """Measure the gradient of these centres, new ones after ``extend``, and of no others."""
        if self._watched is not None:
            if self._watched[0] is centres:
                return
            self._watched[1].remove()
            self._watched = None
        if centres is not None and centres.requires_grad:
            handle = centres.register_hook(self._after_backward)  # type: ignore[no-untyped-call]
            self._watched = centres, handle

    def _after_backward(self, gradient: Tensor) -> None:
        if self.loss.training:
            self.update_gradients(gradient)

    def _margin(self, embeddings: Tensor, labels: Tensor) -> MarginFunction:
        """The margin of a batch, without lengths; of a random one, the loss's next draws."""
        loss, devices = self.loss, [embeddings.device] if embeddings.is_cuda else []
        with torch.random.fork_rng(devices, enabled=loss.is_random):
            margin = loss.margin_function(embeddings, labels)
        if loss.normalize_weight:
            return margin
        centres = loss._by_centre(loss._centres)
        length = lengths(centres.index_select(0, labels))  # a factor of the target logit
        return lambda theta: margin(theta) / length.clamp(min=torch.finfo(length.dtype).tiny)

    def _sums_on(self, device: torch.device) -> Tensor:
        """All sums in one tensor, for a single all_reduce and a single copy to the host."""
        size = 2 * BINS + (GRADIENT + 1) * self.loss.num_classes + 1
        # Another size: classes were added.
        if self._sums is None or self._sums.device != device or len(self._sums) != size:
            with torch.inference_mode(False):  # to be added to outside of it too
                self._sums = torch.zeros(size, dtype=precise_dtype(device), device=device)
        return self._sums

    def _views(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Histograms (2, bins), sums per class (8, C), and the number of gradients."""
        histograms = sums[: 2 * BINS].view(2, BINS)
        per_class = sums[2 * BINS : -1].view(GRADIENT + 1, self.loss.num_classes)
        return histograms, per_class, sums[-1]

    def _divergence(self) -> Tensor:
        """The relative difference of the centres between processes, a scalar; 0 if equal."""
        centres = self.loss._centres.detach()
        precise = precise_dtype(centres.device)
        if hasattr(centres, "full_tensor"):  # a DTensor of fully_shard: shards of one tensor
            return torch.zeros((), dtype=precise, device=centres.device)
        summed = centres.sum(0, dtype=precise)
        return collectives.spread(summed).amax() / summed.abs().amax()

    def _separation(self) -> dict[str, float]:
        centres = self.loss._by_centre(self.loss._centres.detach())
        if hasattr(centres, "full_tensor"):  # a DTensor of fully_shard
            centres = centres.full_tensor()
        separation = centre_separation(centres, self.loss.sub_centers)
        collapsed = collapsed_classes(separation)
        return {
            "separation_min": float(separation.minimum),
            "separation_bound": separation.bound,
            "collapsed_pairs": float(len(collapsed.pairs)),
            "without_direction": float(len(collapsed.without_direction)),
        }


def _write(writer: Any, step: int, snapshot: Snapshot, figures: dict[str, Figure]) -> None:  # noqa: ANN401
    for name, number in snapshot.numbers.items():
        writer.add_scalar(f"angular/{name}", number, step)
    if hasattr(writer, "add_histogram") and snapshot.rows.any():
        middles = torch.arange(BINS) + 0.5
        for name, counts in (("target", snapshot.target), ("nearest", snapshot.nearest)):
            # Writers take values, not counts: about 10,000 values represent the shares.
            share = (counts * min(1.0, 1e4 / float(counts.sum()))).round().long()
            values = middles.repeat_interleave(share)
            writer.add_histogram(f"angular/{name}_degrees", values, step)
    if hasattr(writer, "add_figure"):
        for name, figure in figures.items():
            writer.add_figure(f"angular/{name}", figure, step)
