"""Bounds on the separation of points on a sphere, which class centres cannot exceed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import validation


def separation_bound(num_classes: int, embedding_size: int) -> float:
    r"""An upper bound, in radians, on the smallest angle between C class centres in d dimensions.

    =====================  ========================================================  ============
    where                  bound                                                     reached
    =====================  ========================================================  ============
    C <= d + 1             acos(-1 / (C - 1)), the regular simplex (Rankin)          always
    d + 1 < C <= 2d        pi / 2, the cross-polytope (Rankin)                       always
    d = 2                  2 pi / C, the regular polygon                             always
    d = 3                  acos((cot(w)^2 - 1) / 2), w = pi C / (6 (C - 2))          C = 12
                           (Fejes Toth)
    d >= 4, C > 2d         Levenshtein's linear-programming bound                    C = 240 in
                                                                                     d = 8, ...
    =====================  ========================================================  ============

    Finding the best arrangement itself (the Tammes problem) is open for almost every C and d, so
    the bound is not always attainable.

    Args:
        num_classes: The number of classes, C >= 2.
        embedding_size: The dimension of the embeddings, d.

    Raises:
        TypeError: If an argument is not an int.
        ValueError: If there are fewer than two classes, or d < 1.

    Example:
        >>> math.degrees(separation_bound(3, 512))
        120.00000000000001
        >>> round(math.degrees(separation_bound(100_000, 512)), 2)
        87.62

    References:
        Rankin, "The Closest Packing of Spherical Caps in n Dimensions", 1955;
        Fejes Toth, "Ueber die Abschaetzung des kuerzesten Abstandes zweier Punkte eines auf einer
        Kugelflaeche liegenden Punktsystems", 1943;
        Levenshtein, "Universal Bounds for Codes and Designs", Handbook of Coding Theory, 1998,
        section 5.
    """
    count = validation.positive_integer("num_classes", num_classes)
    size = validation.positive_integer("embedding_size", embedding_size)
    if count < 2:
        raise ValueError(f"num_classes: expected at least 2, got {count}")
    if count <= size + 1:
        return math.acos(-1 / (count - 1))
    if size == 1:
        return 0.0
    if count <= 2 * size:
        return math.pi / 2
    if size == 2:
        return 2 * math.pi / count
    if size == 3:
        cotangent = 1 / math.tan(math.pi * count / (6 * (count - 2)))
        return math.acos((cotangent**2 - 1) / 2)
    return math.acos(_levenshtein(count, size))


def _levenshtein(count: int, size: int) -> float:
    r"""A lower bound on the largest cosine between two of C > 2d points.

    With mu the distribution of one coordinate of a random point of the sphere and v = (p_0(1), ...)
    its orthonormal polynomials at 1, Levenshtein's cosine is the largest node of the quadrature of
    mu - delta_1 / C that is exact to the highest degree possible: Gauss's, or Radau's with -1 as
    another node. The nodes of both are the eigenvalues of a small matrix.
    """
    order = 3
    while count > _fewest_points_of_a_design(order + 1, size):
        order += 1
    nodes = (order + 1) // 2
    place: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    degree = torch.arange(1, nodes + 1, **place)
    off_diagonal = (
        degree * (degree + size - 3) / ((2 * degree + size - 2) * (2 * degree + size - 4))
    )
    jacobi = torch.diag(off_diagonal.sqrt(), 1) + torch.diag(off_diagonal.sqrt(), -1)
    squares = [_harmonics(j, size) for j in range(nodes)]
    at_one = torch.tensor(squares, **place).sqrt()
    removed = torch.outer(at_one, at_one) / count
    identity = torch.eye(nodes, **place)
    first, second = jacobi[:nodes, :nodes], (jacobi @ jacobi)[:nodes, :nodes]
    if order % 2:
        return _largest_eigenvalue(first - removed, identity - removed)
    # Radau: the weight 1 + t removes the node at -1.
    return _largest_eigenvalue(first + second - 2 * removed, identity + first - 2 * removed)


def _largest_eigenvalue(matrix: Tensor, metric: Tensor) -> float:
    """The largest x with matrix v = x metric v, for symmetric matrices and a positive metric."""
    factor = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return float(torch.linalg.eigvalsh(whole)[-1])


def _fewest_points_of_a_design(strength: int, size: int) -> int:
    """Delsarte, Goethals and Seidel's lower bound on the size of a spherical design.

    Reference: "Spherical Codes and Designs", 1977, theorems 5.11 and 5.12.
    """
    half, odd = divmod(strength, 2)
    return math.comb(size + half - 1, size - 1) + math.comb(size + half - 2 + odd, size - 1)


def _harmonics(degree: int, size: int) -> int:
    """The number of spherical harmonics of a degree; the square of p_degree(1)."""
    return math.comb(size + degree - 1, size - 1) - math.comb(size + degree - 3, size - 1)
