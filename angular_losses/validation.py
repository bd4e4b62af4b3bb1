"""Validation of arguments: messages start with the argument and state what was expected.

A wrong type is a TypeError; a wrong value, shape or device is a ValueError.
None of these functions synchronises with an accelerator: shapes, dtypes and devices are available
on the host, and label values are asserted on the device.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any, SupportsIndex, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Check: TypeAlias = Callable[[str, object], float]


def number(name: str, value: object, low: float, high: float = math.inf, unit: str = "") -> float:
    """Return ``value``, a number of Python or NumPy, as a float when low <= value < high."""
    # That of Real alone takes longer than all of the rest.
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        of_unit = f" of {unit}" if unit else ""
        raise TypeError(f"{name}: expected a number{of_unit}, got {_describe(value)}")
    if not low <= float(value) < high or float(value) == -math.inf:
        unit = f" {unit}" if unit else ""
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}){unit}, got {value!r}")
    return float(value)


# A number within certain bounds.
finite: Check = partial(number, low=-math.inf)
negative: Check = partial(number, low=-math.inf, high=0.0)
multiplicative_margin: Check = partial(number, low=1.0)  # it multiplies the angle
cosine_margin: Check = partial(number, low=0.0, high=2.0)  # it is subtracted from the cosine


def positive(name: str, value: object) -> float:
    """Return ``value`` as a float when it is above 0 and finite."""
    if isinstance(value, (float, Real)) and value == 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    return number(name, value, 0.0)


def angular_margin(name: str, value: object) -> float:
    """Return a margin that is added to the angle: radians in [0, pi)."""
    try:
        return number(name, value, 0.0, math.pi, "radians")
    except ValueError as error:
        if isinstance(value, Real) and math.pi <= float(value) < 180:
            in_radians = f"{value:g} degrees would be {math.radians(value):.4f} radians"
            raise ValueError(f"{error}; degrees are not accepted ({in_radians})") from None
        raise


def share(name: str, value: object) -> float:
    """Return ``value`` as a float when it is in [0, 1]."""
    found = finite(name, value)
    if not 0 <= found <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return found


def bounds(name: str, value: tuple[float, float], check: Check) -> tuple[float, float]:
    """Return two numbers, the lower first, each as ``check`` returns it."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"{name}: expected two numbers, the lower first, got {value!r}")
    low, high = (check(name, each) for each in value)
    if low >= high:
        raise ValueError(f"{name}: expected the lower first, got {value!r}")
    return low, high


def integer(name: str, value: object) -> int:
    """Return ``value``, anything with ``__index__``, as an int."""
    found: int | None
    try:
        # Under torch.compile operator.index would make a constant of a size that changes.
        found = value if isinstance(value, int) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {_describe(value)}")
    return found


def positive_integer(name: str, value: object) -> int:
    """Return ``value``, anything with ``__index__``, as an int when it is at least 1."""
    found = integer(name, value)
    if found < 1:
        raise ValueError(f"{name}: expected at least 1, got {found}")
    return found


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def floating(
    name: str, value: object, *shape: int | str, device: torch.device | None = None
) -> None:
    """Raise unless ``value`` is a floating-point tensor of ``shape``; a str allows any size."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {_describe(value)}")
    sizes = value.shape
    fits = len(sizes) == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(sizes, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({expected}), got {tuple(sizes)}")
    if device is not None and value.device != device:
        raise ValueError(
            f"{name}: expected device {device}, that of embeddings, got {value.device}"
        )


def width(name: str, value: Tensor, size: int, num_classes: int) -> None:
    """Raise ValueError unless ``value`` (N, d) has the dimension ``size`` of the class centres."""
    if value.shape[1] == size:
        return
    guess = ""
    if value.shape[1] == num_classes:
        guess = (
            f". As wide as there are classes: are these logits, or are num_classes {num_classes} "
            f"and embedding_size {size} exchanged?"
        )
    raise ValueError(
        f"{name}: expected shape (N, {size}), the class centres' size, got {tuple(value.shape)}"
        f"{guess}"
    )


def of_classes(name: str, value: object) -> Tensor:
    """Return a tensor as it is, and another sequence of numbers, one a class, as a tensor (C,)."""
    if isinstance(value, Tensor):
        return value
    is_array = hasattr(value, "__array__") and getattr(value, "ndim", 1) > 0
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or is_array):
        raise TypeError(f"{name}: expected a number for each class (C,), got {_describe(value)}")
    numbers = [finite(name, each) for each in cast(Iterable[Any], value)]
    return torch.tensor(numbers, dtype=kept_dtype(), device="cpu")


def kept_dtype() -> torch.dtype:
    """The dtype of numbers that a loss keeps: torch's default, but float32 at least."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def class_counts(name: str, value: object, num_classes: int | None = None) -> Tensor:
    """Return the number of samples of each class (C,), all at least 1, as float32."""
    value = of_classes(name, value)
    if value.dim() != 1 or value.numel() == 0 or num_classes not in (None, len(value)):
        expected = "C" if num_classes is None else num_classes
        raise ValueError(f"{name}: expected shape ({expected},), got {tuple(value.shape)}")
    smallest = value.min()
    if has_values(smallest) and not smallest.item() >= 1:
        raise ValueError(f"{name}: expected at least 1 sample of each class, got {smallest.item()}")
    return value.detach().float()


def classes_of(name: str, weight: Tensor, sub_centers: int) -> int:
    """Return the number of classes that have the rows of ``weight`` (C * sub_centers, d)."""
    if weight.shape[0] % positive_integer("sub_centers", sub_centers):
        raise ValueError(
            f"{name}: expected a multiple of sub_centers {sub_centers} rows, got {weight.shape[0]}"
        )
    return weight.shape[0] // sub_centers


def batch(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int | None = None,
    sub_centers: int = 1,
    num_classes: int | None = None,
    name: str = "labels",
) -> Tensor | None:
    """Raise unless embeddings (N, d), weight (C, d) and labels (N,) are consistent.

    With sub-centres the weight is (C * sub_centers, d). If it is a shard of the classes,
    ``num_classes`` is their total number.

    On the CPU a label out of range raises immediately. On other devices, and under
    ``torch.compile``, it is asserted on the device without a synchronisation; on MPS before torch
    2.13, which has no such operator, it raises immediately too, and is not checked under
    ``torch.compile``. Inside a ``torch.func`` transform label values cannot be read; the lookup of
    the class centre raises instead.

    Returns:
        A mask (N,) of the labels that are not ``ignore_index``; None if certainly none is.
    """
    floating("embeddings", embeddings, "N", "d")
    floating("weight", weight, "C", "d", device=embeddings.device)
    here = classes_of("weight", weight, sub_centers)
    num_classes = here if num_classes is None else num_classes
    width("embeddings", embeddings, weight.shape[1], num_classes)
    if 0 in (num_classes, embeddings.shape[1]):
        raise ValueError(
            f"weight: expected at least one class and one dimension, got {tuple(weight.shape)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {_describe(labels)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected shape ({embeddings.shape[0]},), one label an embedding, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != embeddings.device:
        raise ValueError(
            f"{name}: expected device {embeddings.device}, that of embeddings, got {labels.device}"
        )
    return _kept(name, labels, num_classes, ignore_index)


_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32),
)
# Devices without asynchronous assertions: MPS before torch 2.13.
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_WITHOUT_ASSERT = () if _has_kernel("aten::_assert_async.msg", "MPS") else ("mps",)


# Names of options in other libraries, with the name here.
SYNONYMS = {
    "s": "scale",
    "m": "margin",
    "gamma": "scale",
    "temperature": "scale",
    "easy_margin": "beyond",
    "weight": "class_weight",
    "K": "sub_centers",
    "smoothing": "label_smoothing",
    "size_average": "reduction",
    **dict.fromkeys(("in_features", "embed_dim", "feat_dim", "descriptors_dim"), "embedding_size"),
    **dict.fromkeys(("out_features", "class_num", "num_class", "n_classes"), "num_classes"),
}


def unknown_options(cls: type[nn.Module], unknown: Iterable[str]) -> TypeError:
    """The error for options that a module does not have, with suggestions."""
    options = [
        name
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    lines = []
    for name in unknown:
        synonym = SYNONYMS.get(name)
        close = [synonym] if synonym in options else difflib.get_close_matches(name, options, 1)
        expected = " or ".join(close or sorted(set(options)))
        lines.append(f"{name}: {cls.__name__} has no such option, expected {expected}")
    return TypeError("\n".join(lines))


def is_transformed(tensor: Tensor) -> bool:
    """Whether the tensor is inside ``torch.func.vmap``, ``grad`` or another such transform."""
    is_compiling = torch.compiler.is_compiling()
    return not is_compiling and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_transforming() -> bool:
    """Whether such a transform is active, on any tensor."""
    is_compiling = torch.compiler.is_compiling()
    return not is_compiling and torch._C._functorch.peek_interpreter_stack() is not None


# Not before torch 2.8.
knows_hooks = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def hooks_in_force() -> tuple[Callable[..., object], Callable[..., Tensor]] | None:
    """The hooks of saved tensors in force, such as checkpointing's; None where it is not known."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) if knows_hooks else None


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor has values: not on the meta device, nor while tracing a graph."""
    is_traced = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
    return not (is_traced or tensor.is_meta)


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be read without synchronising with a device."""
    return tensor.device.type == "cpu" and has_values(tensor) and not is_transformed(tensor)


def _kept(name: str, labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor | None:
    labels = labels.long()  # a narrower type would overflow
    if (
        is_readable(labels)
        and (ignore_index is None or ignore_index < 0)
        and torch.equal(labels, labels.clamp(0, num_classes - 1))
    ):
        return None
    inside, kept = (labels >= 0) & (labels < num_classes), None
    message = f"{name}: expected values in [0, {num_classes})"
    if ignore_index is not None:
        kept = labels != ignore_index
        inside = inside | ~kept
        message += f" or ignore_index {ignore_index}"
    if is_transformed(labels):
        return kept
    can_assert = labels.device.type not in _WITHOUT_ASSERT
    if is_readable(labels) or (has_values(labels) and not can_assert):
        if not inside.all():
            raise ValueError(f"{message}, got {int(labels[~inside][0])}")
    elif can_assert:
        torch._assert_async(inside.all(), message)
    return kept


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype}"
    return f"{value!r} of type {type(value).__name__}"
