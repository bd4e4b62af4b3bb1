"""Gathers the rows of all ranks with one collective: embeddings, labels and per-row arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.shard import Shard

# The header of a message: number of rows, bytes per row, dtype of the embeddings, which columns are
# present, whether a gradient is needed, and the call; then, in UTF-8, the error message of a rank
# that rejects its batch.
NUMBERS, TEXT = 4, 480
HEADER = 8 * NUMBERS + TEXT
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RankBatch(NamedTuple):
    """The arguments of a loss, of one rank or of all."""

    embeddings: Tensor
    labels: Tensor
    sample_weight: Tensor | None = None
    label_weight: Tensor | None = None


class Gathering:
    """Gathers the batches of all ranks, which may differ in size.

    A message has the capacity of the largest batch so far. If a batch is larger, or the bytes per
    row differ, the headers show it, and all ranks gather again: usually only in the first step.
    ``batch_size`` is the largest number of rows of any rank; None: exchanged between the ranks.
    Gradients of this rank's rows are multiplied by ``factor``.
    """

    def __init__(
        self, shard: Shard, ignore_index: int, batch_size: int | None, factor: float
    ) -> None:
        self.shard, self._ignore_index, self._batch_size = shard, ignore_index, batch_size
        self._factor = factor
        self._capacity = (batch_size or 0, 0)  # rows, bytes per row

    def __call__(self, checked: Callable[[], RankBatch], call: int) -> RankBatch:
        """The rows of all ranks, padded to blocks of equal size with ignored rows.

        Embeddings are in float32 at least; those of this rank are on its autograd graph. The
        ValueError or TypeError of ``checked``, which returns this rank's rows, is a ValueError on
        the other ranks. So is another ``call`` there, a number for what is done with the rows.
        """
        rejection: ValueError | TypeError | None = None
        columns: list[Tensor] = []
        batch: RankBatch | None = None
        try:
            batch = checked()
            rows, largest = len(batch.labels), self._batch_size
            if largest is not None and rows > largest:
                raise ValueError(
                    f"embeddings: expected at most batch_size {largest} rows, got {rows}"
                )
            weights = batch.label_weight, batch.sample_weight
            given = [weight.detach().double() for weight in weights if weight is not None]
            columns = [batch.labels.long(), *given, batch.embeddings.detach()]
            header = _header(columns, batch, call)
        except (ValueError, TypeError) as error:
            rejection, header = error, _rejection(error)
        is_padded = self._batch_size is not None
        while True:
            found, capacity = self._exchange(columns, header), self._capacity
            if is_padded and found.device.type != "cpu" and _fits(header, capacity):
                break  # reading the headers would synchronise with a GPU
            headers = _values(found[:, : 8 * NUMBERS], torch.int64).tolist()
            self._raise_rejections(rejection, headers, found)
            most = max(rows for rows, *_ in headers)
            if all(_fits(each, capacity) for each in headers):
                break
            self._capacity = max(most, capacity[0]), header[1]
        most = capacity[0] if is_padded else most
        assert batch is not None  # who is rejected has raised
        return self._unpacked(batch, columns, found[:, HEADER:], most)

    def _exchange(self, columns: list[Tensor], header: list[int]) -> Tensor:
        """The messages of all ranks (size, bytes)."""
        rows, per_row = self._capacity
        device = self.shard.device  # wherever a rejected batch is
        sent = torch.tensor(header, dtype=torch.int64)
        parts = [sent.view(torch.uint8).to(device, non_blocking=True)]
        if _fits(header, self._capacity):
            parts += [self._padded(column, rows) for column in columns]
        else:
            parts.append(torch.zeros(rows * per_row, dtype=torch.uint8, device=device))
        return self.shard.gathered(torch.cat(parts))

    def _padded(self, column: Tensor, rows: int) -> Tensor:
        """The bytes of a column, padded to a number of rows."""
        if len(column) < rows:
            fill = 0 if column.is_floating_point() else self._ignore_index
            padded = column.new_full((rows, *column.shape[1:]), fill)
            padded[: len(column)] = column
            column = padded
        return column.contiguous().view(torch.uint8).flatten()

    def _raise_rejections(
        self, rejection: ValueError | TypeError | None, headers: list[list[int]], found: Tensor
    ) -> None:
        """Raise, on every rank, if one has rejected its batch or has other columns."""
        if rejection is not None:
            raise rejection
        for rank, (rows, *_) in enumerate(headers):
            if rows < 0:
                text = bytes(found[rank, 8 * NUMBERS : HEADER].tolist()).rstrip(b"\0")
                raise ValueError(f"{text.decode(errors='replace')} (rank {rank}'s batch)")
        if len({tuple(kind) for _, *kind in headers}) > 1:
            raise ValueError(
                "embeddings: expected one dtype on all ranks, the same call, as many labels a row, "
                "and a gradient, sample_weight, label_weight and return_correct on all or none "
                "(a rank without a batch passes 0 rows through its network too)"
            )

    def _unpacked(
        self, batch: RankBatch, columns: list[Tensor], found: Tensor, most: int
    ) -> RankBatch:
        """The columns of all ranks, ``most`` rows of each."""
        rows, unpacked = self._capacity[0], []
        parts = torch.split(found, [rows * _bytes_of_row(column) for column in columns], 1)
        for column, part in zip(columns, parts, strict=True):
            values = _values(part, column.dtype).view(len(found), rows, *column.shape[1:])
            unpacked.append(values[:, :most].flatten(0, 1))
        labels, *weights, embeddings = unpacked
        # The gradients of the ranks are summed in this dtype.
        embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

        def attached(own: Tensor | None, of_all: list[Tensor]) -> Tensor | None:
            return None if own is None else self.shard.attached(of_all.pop(), own, self._factor)

        return RankBatch(
            self.shard.attached(embeddings, batch.embeddings, self._factor),
            labels,
            attached(batch.sample_weight, weights),
            attached(batch.label_weight, weights),
        )


def _values(found: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (size, n) as values of another dtype."""
    # contiguous() would leave the stride of a single row as it is.
    return found.clone(memory_format=torch.contiguous_format).view(dtype)


def _bytes_of_row(column: Tensor) -> int:
    return column.element_size() * column.shape[1:].numel()


def _header(columns: list[Tensor], batch: RankBatch, call: int) -> list[int]:
    bytes_of_row = sum(map(_bytes_of_row, columns))
    dtype = DTYPES.index(columns[-1].dtype)
    weights = batch.sample_weight, batch.label_weight
    is_trained = batch.embeddings.requires_grad and torch.is_grad_enabled()
    # The gradients of weights take no collective, but alone they would make a backward pass.
    of_weights = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights)
    is_given = [each is not None for each in weights]
    bits = *is_given, is_trained, of_weights and not is_trained
    present = 16 * call + sum(2**i for i, is_present in enumerate(bits) if is_present)
    return [len(columns[0]), bytes_of_row, dtype, present, *[0] * (TEXT // 8)]


def _rejection(error: Exception) -> list[int]:
    """The header of a rank that rejects its batch, with the error message after the numbers."""
    text = str(error).encode()[:TEXT].ljust(TEXT, b"\0")
    return [-1, *[0] * (NUMBERS - 1), *memoryview(text).cast("q").tolist()]


def _fits(header: list[int], capacity: tuple[int, int]) -> bool:
    rows, bytes_of_row = header[:2]
    return 0 <= rows <= capacity[0] and bytes_of_row == capacity[1]
