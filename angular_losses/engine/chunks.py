"""The classes of a margin softmax, chunk by chunk: their directions, cosines and exponentials."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .. import validation
from . import kernels

Deferred: TypeAlias = list[Callable[[], object]]
BeginSum: TypeAlias = Callable[[Tensor], Callable[[], Tensor]]

# Up to this scale exp(s cos), its sums over classes and their inverses stay inside float32
# (e^64 = 6e27), and no maximum has to be found and subtracted.
BOUNDED_SCALE = 64.0


class Inputs(NamedTuple):
    """What the passes take.

    Attributes:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres, floating point; with sub-centres (C * sub_centers, d).
        own: (N,) int64, the row of the weight that is the centre of the target; -1 where that is
            not here. The theta of such a row means nothing, and must get no gradient.
        row_scale: (N,) factor of the scale for each row, or None. Its gradient is right for a
            linear rule alone.
        class_share: (C,) the weights kappa, in the :func:`working_dtype`: those of the mean cosine
            (None leaves it out), or, where the rule is summed, those of the sum.
    """

    embeddings: Tensor
    weight: Tensor
    own: Tensor
    row_scale: Tensor | None = None
    class_share: Tensor | None = None


class Settings(NamedTuple):
    """How the passes run.

    Attributes:
        scale: The scale s > 0.
        chunk: The number of centres in a chunk.
        product_dtype: The dtype of the factors of the matrix products.
        stash: Whether E is kept for the backward pass, or computed again.
        differentiate: Whether there will be a backward pass.
        partial: Whether the centres of some targets are not here.
    """

    scale: float
    chunk: int
    product_dtype: torch.dtype
    stash: bool
    differentiate: bool
    partial: bool = False


class Rule(NamedTuple):
    """How the other classes enter a loss, where not each as exp(scale * cosine).

    Attributes:
        terms: A function of the cosines of some classes (K, N), elementwise, and of two numbers a
            row (N,), each or None: the target's logit before scaling, and a bias. It returns what
            takes the place of the cosines (K, N).
        with_slopes: A function of the cosines alone that returns the same, in [-1, 1] then, and its
            derivatives; None leaves those to autograd, as it must be with a bias.
        summed: Whether the terms themselves are summed, and not exp(scale * term).
        sub_centers: The number of centres of a class; the largest of their cosines is its own.
            Sub-centre k of class c is row c * sub_centers + k of the weight.
        keep_lengths: Whether the lengths of the centres are left in, as factors of their cosines.
    """

    terms: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None = None
    with_slopes: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    summed: bool = False
    sub_centers: int = 1
    keep_lengths: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether each centre enters as its cosine, or its cosine times its length."""
        return self.terms is None and self.sub_centers == 1 and not self.summed

    @property
    def has_slopes(self) -> bool:
        """Whether each class enters as a number in [-1, 1], whose derivative is known."""
        is_known = self.terms is None or self.with_slopes is not None
        return is_known and not (self.summed or self.keep_lengths)

    def nearest(self, cosines: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the centres' cosines (K * sub_centers, N) the largest of each class (K, N).

        And, in their place, its derivatives by them, not yet shared where several are the
        largest; None where a class has one centre.
        """
        if self.sub_centers == 1:
            return cosines, None
        of_class = self._by_class(cosines)
        largest = of_class.amax(1)
        of_class.eq_(largest[:, None])  # in floats, unlike ==, far faster than indices on a CPU
        return largest, cosines

    def of_centres(self, values: Tensor, slopes: Tensor | None) -> Tensor:
        """Values of classes (K, N) times the slopes of :meth:`nearest`, in the place of these.

        Where several centres are the nearest they have even shares, as with ``amax``.
        """
        if slopes is None:
            return values
        of_class = self._by_class(slopes)
        of_class *= (values / of_class.sum(1))[:, None]
        return slopes

    def of_classes(self, cosines: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        """The terms of classes (K, N), from the cosines of their centres (K * sub_centers, N)."""
        if self.sub_centers > 1:
            cosines = self._by_class(cosines).amax(1)
        return cosines if self.terms is None else self.terms(cosines, target, bias)

    def _by_class(self, values: Tensor) -> Tensor:
        """Values of centres (K * sub_centers, N) as (K, sub_centers, N)."""
        return values.view(values.shape[0] // self.sub_centers, self.sub_centers, values.shape[1])


PLAIN = Rule()


class Ranking:
    """The largest product of each row with a centre of its own class and with any other, (N,) each.

    Without the margin: a row is right where its own is the larger.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.both = rows.new_full((2, rows.shape[0]), -torch.inf, dtype=dtype)

    def add(self, own: Tensor, other: Tensor) -> None:
        """Update both with those of a chunk; -inf where it has none."""
        self.both = torch.maximum(self.both, torch.stack([own, other]))


class Others(NamedTuple):
    """What no operator can take, for it is a Python function or comes with one.

    Attributes:
        rule: How the other classes enter.
        target: (N,) the logit of the target before scaling, for a rule that looks at it.
        bias: (N,) the bias of a rule, in the :func:`working_dtype`, or None.
        begin_sum: Where the classes are shared between processes: what begins to sum the gradient
            of the embeddings over them, and returns how to end that. Between the two the gradient
            of the weight is computed.
        ranking: What the forward pass is to fill, where it is asked for.
        deferred: Where the forward pass puts what is to be done while its parts are summed over
            processes, if they are.
    """

    rule: Rule = PLAIN
    target: Tensor | None = None
    bias: Tensor | None = None
    begin_sum: BeginSum | None = None
    ranking: Ranking | None = None
    deferred: Deferred | None = None


class Terms:
    """A rule applied to one chunk after another, with its slopes: known, or autograd's."""

    def __init__(self, others: Others, *, differentiate: bool) -> None:
        self.rule, self.target, self.ranking = others.rule, others.target, others.ranking
        self.differentiate, bias = differentiate, others.bias
        self.bias = None if bias is None else bias.detach().requires_grad_(differentiate)
        self.bias_slope = None if bias is None else torch.zeros_like(bias)
        self._has_slopes = others.rule.has_slopes and differentiate

    def __call__(self, cosines: Tensor) -> Tensor:
        """The terms of a chunk, without a graph."""
        if self._has_slopes:
            terms, self._of_centres = self.rule.nearest(cosines)
            if self.rule.with_slopes is not None:
                terms, self._slopes = self.rule.with_slopes(terms)
            return terms
        has_hooks = not validation.knows_hooks or validation.hooks_in_force() is not None
        # Differentiated here, so hooks of saved tensors are not for them: those of checkpointing
        # would run the network again for each chunk.
        has_own = has_hooks and self.differentiate
        own = saved_tensors_hooks(_packed, _unpacked) if has_own else nullcontext()
        with torch.set_grad_enabled(self.differentiate), own:
            self._cosines = cosines.detach().requires_grad_(self.differentiate)
            self._terms = self.rule.of_classes(self._cosines, self.target, self.bias)
        return self._terms.detach()

    def slopes(self, weights: Tensor) -> Tensor:
        """The derivative of the sum of weights (K, N) times terms, by each centre's cosine."""
        if not self.differentiate:
            return weights
        if self._has_slopes:
            if self.rule.with_slopes is not None:
                weights *= self._slopes
            return self.rule.of_centres(weights, self._of_centres)
        if not self._terms.requires_grad:  # they do not depend on the cosines
            return torch.zeros_like(self._cosines)
        variables = [self._cosines] if self.bias is None else [self._cosines, self.bias]
        slopes, *of_bias = torch.autograd.grad(
            self._terms, variables, weights, materialize_grads=True
        )
        if self.bias_slope is not None:
            self.bias_slope += of_bias[0]
        return slopes

    def rescale(self, factor: Tensor) -> None:
        """The slopes so far by the bias, times a factor (N,), as the weights they were taken with.

        Where terms are not summed, those are relative to the largest logit so far.
        """
        if self.bias_slope is not None:
            self.bias_slope *= factor


def _packed(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version


def _unpacked(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:  # which autograd looks at where there are no hooks
        raise RuntimeError("negatives: expected them not to change in place what they have saved")
    return saved


class Chunks:
    """The classes, chunk by chunk, in one workspace; a class has one row, or as many as centres.

    Attributes:
        spans: The rows of each chunk; one None where a single chunk has all.
    """

    def __init__(
        self, inputs: Inputs, settings: Settings, unit: Tensor, scales: float | Tensor, terms: Terms
    ) -> None:
        num_centres, each = inputs.weight.shape[0], terms.rule.sub_centers
        self.size = min(max(settings.chunk // each, 1) * each, num_centres)
        self.spans: list[slice | None] = [None]
        if self.size < num_centres:
            starts = range(0, num_centres, self.size)
            self.spans = [slice(start, min(start + self.size, num_centres)) for start in starts]
        self.weight, self.own, self.rule = inputs.weight, inputs.own, terms.rule
        self.product_dtype, self._dtype = settings.product_dtype, unit.dtype
        self._terms = None if terms.rule.is_linear else terms
        self._ranking = terms.ranking
        self.class_share = inputs.class_share
        self.has_all_targets = len(self.spans) == 1 and not settings.partial
        self._scales = scales.T if isinstance(scales, Tensor) else scales
        self._unit, self._row_scales = unit, scales
        self._has_kernel = self.rule.is_linear and kernels.is_available(
            self.weight.device, self.product_dtype
        )
        self._is_reduced = self.product_dtype != unit.dtype
        # A single chunk has its results to itself; several take turns in the same memory.
        self._memory: dict[str, Tensor] = {}

    @functools.cached_property
    def _factors(self) -> Tensor:
        """What the centres are multiplied with (d, N)."""
        unit = self._unit * self._row_scales if self.rule.is_linear else self._unit
        return unit.to(self.product_dtype).T

    def workspace(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Memory for a result of a chunk's shape; None leaves it to the operator."""
        if self.spans[0] is None:
            return None
        if name not in self._memory:
            self._memory[name] = self.weight.new_empty(self.size, shape[1], dtype=dtype)
        return self._memory[name][: shape[0]]

    @staticmethod
    def rows(values: Tensor, span: slice | None) -> Tensor:
        """A chunk's part of what is kept for all centres, or all classes."""
        return values if span is None else values[span]

    def directions(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """Those of a chunk of centres (K, d), in the working dtype, or the centres themselves."""
        if self.rule.keep_lengths:
            return weight.to(self._dtype)
        out = self.workspace("directions", weight.shape, self._dtype)
        return torch.mul(weight, inverse, out=out)

    def factors(self, directions: Tensor) -> Tensor:
        """The same in the dtype of the products."""
        return self._to_multiply("factors", directions)

    def logits(self, span: slice | None, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """The logits of a chunk's classes (K, N) in the working dtype; -inf for a target in it.

        In ``out``, where E is to be kept, if that has the working dtype.
        """
        products = self._cosines(span, factors, out if self._terms is None else None)
        logits = products if self._terms is None else self._terms(products) * self._scales
        return self._without_targets(span, logits, -torch.inf)

    def _cosines(self, span: slice | None, factors: Tensor, out: Tensor | None = None) -> Tensor:
        """The products of a chunk's centres with the embeddings (K, N), in the working dtype."""
        if out is None or self._is_reduced:
            out = self.workspace(
                "products", (factors.shape[0], self._factors.shape[1]), self._dtype
            )
        products = multiply(factors, self._factors, self._dtype, out=out)
        if self._ranking is not None:
            self._rank(self._ranking, span, products)
        return products

    def _rank(self, ranking: Ranking, span: slice | None, products: Tensor) -> None:
        """Add the largest products to a ranking; the own class's are hidden for that time."""
        each, (row, is_here) = self.rule.sub_centers, self.own_row(span)
        rows = row[None]
        if each > 1:
            rows = rows - rows % each + torch.arange(each, device=row.device)[:, None]
        present = products.gather(0, rows)
        products.scatter_(0, rows, present.masked_fill(is_here, -torch.inf))
        ranking.add(present.amax(0).masked_fill(~is_here, -torch.inf), products.amax(0))
        products.scatter_(0, rows, present)

    def own_row(self, span: slice | None) -> tuple[Tensor, Tensor]:
        """Where each row's own centre is in a chunk (N,), and whether it is there at all (N,)."""
        start, stop = (0, self.weight.shape[0]) if span is None else (span.start, span.stop)
        own = self.own - start
        row = own.clamp(0, stop - start - 1)
        return row, row == own

    def exponentials(
        self,
        span: slice | None,
        factors: Tensor,
        shift: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """E of a chunk, to multiply with its centres, and the sums over its classes (N,)."""
        if self.rule.summed:
            return self._summed(span, factors, out)
        if not self._has_kernel:
            return self.exponentiate(self.logits(span, factors, out), shift, out)
        shape = factors.shape[0], self._factors.shape[1]
        if out is None:
            out = self.workspace("exponentials", shape, self.product_dtype)
        if out is None:
            out = factors.new_empty(shape)
        start = 0 if span is None else span.start
        sums = kernels.exponentials(factors, self._factors.T, self.own, start, shift, out)
        if self._ranking is not None:  # which has no products, and 0 for the target
            row, is_here = self.own_row(span)
            own = (factors.index_select(0, row) * self._factors.T).sum(1, dtype=self._dtype)
            other = out.amax(0).to(self._dtype).log()
            self._ranking.add(own.masked_fill(~is_here, -torch.inf), other)
        return out, sums

    def exponentiate(
        self, logits: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same from the logits, in their place."""
        if shift is not None:
            logits -= shift
        sums = logits.exp_().sum(0)
        if self._terms is not None:
            logits = self._terms.slopes(logits)
        return self._to_multiply("exponentials", logits, out), sums

    def _summed(
        self, span: slice | None, factors: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The slopes of the terms themselves, in the place of E, and the sums of the terms."""
        assert self._terms is not None
        terms = self._terms(self._cosines(span, factors))
        weights = torch.ones_like(terms)
        if self.class_share is not None:
            each, share = self.rule.sub_centers, self.class_share
            share = share if span is None else share[span.start // each : span.stop // each]
            weights *= share[:, None]
        weights = self._without_targets(span, weights, 0.0)
        # Not their product: a target's term, which does not count, may be infinite.
        sums = torch.where(weights == 0, 0, terms * weights).sum(0)
        return self._to_multiply("exponentials", self._terms.slopes(weights), out), sums

    def _without_targets(self, span: slice | None, values: Tensor, instead: float) -> Tensor:
        """The values of a chunk's classes (K, N), with those of the targets replaced."""
        each, start = self.rule.sub_centers, 0 if span is None else span.start
        own = self.own if each == 1 else self.own // each
        if self.has_all_targets:
            return values.scatter_(0, own[None], instead)
        return replaced(values, own - start // each, instead)

    def _to_multiply(self, name: str, values: Tensor, out: Tensor | None = None) -> Tensor:
        """The values in the dtype of the products, in ``out`` where they are kept."""
        if values is out or (out is None and not self._is_reduced):
            return values
        if out is None:
            out = self.workspace(name, values.shape, self.product_dtype)
        return values.to(self.product_dtype) if out is None else out.copy_(values)


def replaced(values: Tensor, own: Tensor, instead: float) -> Tensor:
    """Values (K, N) with another in row ``own`` (N,) of each column, where there is that row."""
    row = own.clamp(0, values.shape[0] - 1)[None]
    present = values.gather(0, row)
    return values.scatter_(0, row, present.masked_fill_(row == own, instead))


# On CUDA a product can be summed in a wider dtype than that of its factors, and since torch 2.10
# added to a matrix of that dtype.
_ADDS_WIDER = torch.__version__ >= "2.10"


def multiply(
    first: Tensor,
    second: Tensor,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """The matrix product in a dtype that may be wider than that of the factors.

    Args:
        first: (K, L).
        second: (L, M) in the same dtype.
        dtype: That of the result.
        out: (K, M) where the result goes; made where it is None.
        accumulate: Whether the product is added to ``out``.
    """
    if first.dtype == dtype:
        if out is not None and accumulate:
            return out.addmm_(first, second)
        return torch.mm(first, second, out=out)
    if first.is_cuda and _ADDS_WIDER:  # its sums are in the wider dtype, and stay there
        if out is not None and accumulate:
            return torch.addmm(out, first, second, out_dtype=dtype, out=out)
        return torch.mm(first, second, out_dtype=dtype, out=out)
    product = torch.mm(first, second)  # rounded to the dtype of its factors, as on the CPU
    if out is None:
        return product.to(dtype)
    return out.add_(product) if accumulate else out.copy_(product)
