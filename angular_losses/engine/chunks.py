"""The classes of a margin softmax, chunk by chunk: their directions, cosines and exponentials."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import normalize
from . import kernels

# Up to this scale exp(s cos), its sums over classes and their inverses stay inside float32
# (e^64 = 6e27), and no maximum has to be found and subtracted.
BOUNDED_SCALE = 64.0


class Rule(NamedTuple):
    """How the other classes enter a loss, where not each as exp(scale * cosine).

    Attributes:
        terms: A function of the cosines of some classes (K, N), elementwise, and of two numbers a
            row (N,), each or None: the target's logit before scaling, and a bias. It returns what
            takes the place of the cosines (K, N).
        summed: Whether the terms themselves are summed, and not exp(scale * term).
        sub_centers: The number of centres of a class; the largest of their cosines is its own.
            Sub-centre k of class c is row c * sub_centers + k of the weight.
        keep_lengths: Whether the lengths of the centres are left in, as factors of their cosines.
    """

    terms: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None = None
    summed: bool = False
    sub_centers: int = 1
    keep_lengths: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether each centre enters as its cosine, or its cosine times its length."""
        return self.terms is None and self.sub_centers == 1 and not self.summed

    def of_classes(self, cosines: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        """The terms of classes (K, N), from the cosines of their centres (K * sub_centers, N)."""
        if self.sub_centers > 1:
            num_centres, num_rows = cosines.shape
            shape = (num_centres // self.sub_centers, self.sub_centers, num_rows)
            cosines = cosines.view(shape).max(1).values
        return cosines if self.terms is None else self.terms(cosines, target, bias)


PLAIN = Rule()


class Terms:
    """A rule applied to one chunk after another; its slopes are autograd's, inside the chunk."""

    def __init__(
        self, rule: Rule, target: Tensor | None, bias: Tensor | None, *, differentiate: bool
    ) -> None:
        self.rule, self.target, self.differentiate = rule, target, differentiate
        self.bias = None if bias is None else bias.detach().requires_grad_(differentiate)
        self.bias_slope = None if bias is None else torch.zeros_like(bias)

    def __call__(self, cosines: Tensor) -> Tensor:
        """The terms of a chunk, without a graph."""
        with torch.set_grad_enabled(self.differentiate):
            self._cosines = cosines.detach().requires_grad_(self.differentiate)
            self._terms = self.rule.of_classes(self._cosines, self.target, self.bias)
        return self._terms.detach()

    def slopes(self, weights: Tensor) -> Tensor:
        """The derivative of the sum of weights (K, N) times terms, by each centre's cosine."""
        if not self.differentiate:
            return weights
        if self.bias is None or self.bias_slope is None:
            (slopes,) = torch.autograd.grad(
                self._terms, (self._cosines,), weights, materialize_grads=True
            )
            return slopes
        slopes, of_bias = torch.autograd.grad(
            self._terms, (self._cosines, self.bias), weights, materialize_grads=True
        )
        self.bias_slope += of_bias
        return slopes

    def rescale(self, factor: Tensor) -> None:
        """The slopes so far by the bias, times a factor (N,), as the weights they were taken with.

        Where terms are not summed, those are relative to the largest logit so far.
        """
        if self.bias_slope is not None:
            self.bias_slope *= factor


class Chunks:
    """The classes, chunk by chunk, in one workspace; a class has one row, or as many as centres."""

    def __init__(
        self,
        weight: Tensor,
        inverse: Tensor,
        unit: Tensor,
        own: Tensor,
        scales: float | Tensor,
        chunk: int,
        product_dtype: torch.dtype,
        terms: Terms,
        class_share: Tensor | None,
        partial: bool,
    ) -> None:
        (num_centres, size), rule = weight.shape, terms.rule
        chunk = max(chunk // rule.sub_centers, 1) * rule.sub_centers
        self.size = min(chunk, num_centres)
        starts = range(0, num_centres, self.size)
        self.spans = [slice(start, min(start + self.size, num_centres)) for start in starts]
        self.weight, self.inverse, self.own = weight, inverse, own
        self.rule, self.product_dtype = rule, product_dtype
        self._terms = None if rule.is_linear else terms
        self._class_share = class_share
        self._has_all_targets = len(self.spans) == 1 and not partial
        self._scales = scales.T if isinstance(scales, Tensor) else scales
        self._factors = (unit * scales if rule.is_linear else unit).to(product_dtype).T
        self._has_kernel = rule.is_linear and kernels.is_available(weight.device, product_dtype)
        self._centres = unit.new_empty(self.size, size, dtype=product_dtype)
        self._exponentials = unit.new_empty(self.size, unit.shape[0], dtype=product_dtype)
        # The same memory again where the products are done in the working dtype.
        self._is_reduced = product_dtype != unit.dtype
        self._unit, self._products = self._centres, self._exponentials
        if self._is_reduced:
            self._unit = unit.new_empty(self.size, size)
            self._products = unit.new_empty(self.size, unit.shape[0])

    def first_centres(self, span: slice) -> Tensor:
        """The directions of a chunk of centres (K, d), to multiply; finds their inverse lengths."""
        weight = self.weight[span]
        centres = self._centres[: weight.shape[0]]
        self.inverse[span] = normalize(weight, self._unit[: weight.shape[0]], out=centres)
        return centres.copy_(weight) if self.rule.keep_lengths else centres

    def unit_centres(self, span: slice) -> Tensor:
        """The same directions in the working dtype, from the inverse lengths."""
        weight = self.weight[span]
        unit = self._unit[: weight.shape[0]]
        if self.rule.keep_lengths:
            return unit.copy_(weight)
        return torch.mul(weight, self.inverse[span], out=unit)

    def centres(self, unit_centres: Tensor) -> Tensor:
        """Those to multiply again."""
        if not self._is_reduced:
            return unit_centres
        return self._centres[: unit_centres.shape[0]].copy_(unit_centres)

    def logits(self, span: slice, centres: Tensor, out: Tensor | None = None) -> Tensor:
        """The logits of a chunk's classes (K, N) in the working dtype; -inf for a target in it.

        In ``out``, where E is to be kept, if that has the working dtype.
        """
        in_place = out is not None and not self._is_reduced and self._terms is None
        products = out if in_place and out is not None else self._products[: centres.shape[0]]
        multiply(centres, self._factors, out=products)
        logits = products if self._terms is None else self._terms(products) * self._scales
        return self._without_targets(span, logits, -torch.inf)

    def own_row(self, span: slice) -> tuple[Tensor, Tensor]:
        """Where each row's own centre is in a chunk (N,), and whether it is there at all (N,)."""
        own = self.own - span.start
        row = own.clamp(0, span.stop - span.start - 1)
        return row, row == own

    def exponentials(
        self, span: slice, centres: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E of a chunk, to multiply with its centres, and the sums over its classes (N,)."""
        if self.rule.summed:
            return self._summed(span, centres, out)
        if not self._has_kernel:
            return self.exponentiate(self.logits(span, centres, out), shift, out)
        out = self._exponentials[: centres.shape[0]] if out is None else out
        columns = self._factors.T
        return out, kernels.exponentials(centres, columns, self.own, span.start, shift, out)

    def exponentiate(
        self, logits: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same from the logits, in their place."""
        if shift is not None:
            logits -= shift
        sums = logits.exp_().sum(0)
        if self._terms is not None:
            logits = self._terms.slopes(logits)
        return self._to_multiply(logits, out), sums

    def _summed(self, span: slice, centres: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """The slopes of the terms themselves, in the place of E, and the sums of the terms."""
        assert self._terms is not None
        products = self._products[: centres.shape[0]]
        multiply(centres, self._factors, out=products)
        terms = self._terms(products)
        weights = torch.ones_like(terms)
        if self._class_share is not None:
            each = self.rule.sub_centers
            weights *= self._class_share[span.start // each : span.stop // each, None]
        weights = self._without_targets(span, weights, 0.0)
        # Not their product: a target's term, which does not count, may be infinite.
        sums = torch.where(weights == 0, 0, terms * weights).sum(0)
        return self._to_multiply(self._terms.slopes(weights), out), sums

    def _without_targets(self, span: slice, values: Tensor, instead: float) -> Tensor:
        """The values of a chunk's classes (K, N), with those of the targets replaced."""
        each = self.rule.sub_centers
        if self._has_all_targets:
            own = self.own if each == 1 else self.own // each
            return values.scatter_(0, own[None], instead)
        row, is_here = self.own_row(span)
        if each > 1:
            label = self.own // each - span.start // each
            row = label.clamp(0, values.shape[0] - 1)
            is_here = row == label
        present = values.gather(0, row[None])
        return values.scatter_(0, row[None], present.masked_fill_(is_here, instead))

    def _to_multiply(self, values: Tensor, out: Tensor | None) -> Tensor:
        if not self._is_reduced and (self._terms is None or out is None):
            return values
        out = self._exponentials[: values.shape[0]] if out is None else out
        return out.copy_(values)


# On CUDA a product can be summed in a wider dtype than that of its factors, and since torch 2.10
# added to a matrix of that dtype.
_ADDS_WIDER = torch.__version__ >= "2.10"


def multiply(first: Tensor, second: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """The matrix product into ``out``, whose dtype may be wider than that of the factors."""
    if first.dtype == out.dtype:
        if accumulate:
            out.addmm_(first, second)
        else:
            torch.mm(first, second, out=out)
    elif first.is_cuda and _ADDS_WIDER:  # its sums are in float32, and stay there
        if accumulate:
            torch.addmm(out, first, second, out_dtype=out.dtype, out=out)
        else:
            torch.mm(first, second, out_dtype=out.dtype, out=out)
    elif accumulate:  # each product is rounded to the dtype of its factors, as on the CPU
        out += torch.mm(first, second)
    else:
        out.copy_(torch.mm(first, second))
