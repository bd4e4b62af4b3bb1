"""The rows of all ranks, by one collective: embeddings, labels, and what else belongs to a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.placement import Shard

# Before the rows of a message: how many there are, the bytes of one, the embeddings' dtype, which
# columns there are; then, in UTF-8, why a rank refuses its batch.
NUMBERS, TEXT = 4, 480
HEADER = 8 * NUMBERS + TEXT
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Batch(NamedTuple):
    """What a loss is called with, of one rank or of all."""

    embeddings: Tensor
    labels: Tensor
    sample_weight: Tensor | None = None
    other_labels: Tensor | None = None
    lam: float | Tensor | None = None


class Gathering:
    """Gathers the batches of all ranks, of any sizes.

    A message has room for as many rows as the largest batch so far. Where one is larger, or rows
    take other bytes, the headers say so, and all gather again: as a rule that is the first time.

    Args:
        shard: The line to the other ranks.
        ignore_index: The label of a row that does not count, such as one that fills up a batch.
        batch_size: The most rows that any rank brings, or None: then they tell each other.
    """

    def __init__(self, shard: Shard, ignore_index: int, batch_size: int | None) -> None:
        self._shard, self._ignore_index, self._batch_size = shard, ignore_index, batch_size
        self._room = (batch_size or 0, 0)  # rows, bytes of one

    def __call__(self, batch: Batch, check: Callable[[Batch], None]) -> Batch:
        """The rows of all ranks, filled up to blocks of equal size with rows to be ignored.

        Args:
            batch: This rank's.
            check: Raises ValueError or TypeError if it is not in order.

        Returns:
            All rows: embeddings in float32 at least, without a graph.

        Raises:
            TypeError: If ``check`` does, of this rank's batch.
            ValueError: Likewise, or if another rank refuses its own, or has other columns.
        """
        refusal: ValueError | TypeError | None = None
        columns: list[Tensor] = []
        try:
            check(batch)
            self._check_size(batch)
            columns = self._columns(batch)
            header = _header(columns, _present(batch))
        except (ValueError, TypeError) as error:
            refusal, header = error, _refusal(error)
        # Where the labels are no tensor, the others are told of it all the same.
        device = getattr(batch.labels, "device", torch.device(self._shard.mesh.device_type))
        while True:
            room = self._room
            found = self._exchange(columns, header, device)
            if not self._must_read(header, found):
                most = room[0]
                break
            headers = found[:, : 8 * NUMBERS].contiguous().view(torch.int64).tolist()
            self._refuse(refusal, headers, found)
            most = max(rows for rows, *_ in headers)
            if all(_fits(each, room) for each in headers):
                most = most if self._batch_size is None else room[0]
                break
            self._room = max(most, room[0]), header[1]
        return self._unpacked(batch, columns, found[:, HEADER:], most)

    def _check_size(self, batch: Batch) -> None:
        rows = len(batch.labels)
        if self._batch_size is not None and rows > self._batch_size:
            raise ValueError(
                f"embeddings: expected at most batch_size {self._batch_size} rows, got {rows}"
            )

    def _columns(self, batch: Batch) -> list[Tensor]:
        """What belongs to each row: labels first, embeddings last."""
        columns, lam = [batch.labels.long()], batch.lam
        if batch.other_labels is not None:
            columns.append(batch.other_labels.long())
        if lam is not None:
            lam = torch.as_tensor(lam, dtype=torch.float64, device=batch.labels.device)
            columns.append(lam.expand(len(batch.labels)))
        if batch.sample_weight is not None:
            columns.append(batch.sample_weight.detach().double())
        return [*columns, batch.embeddings.detach()]

    def _exchange(self, columns: list[Tensor], header: list[int], device: torch.device) -> Tensor:
        """The messages of all ranks (size, bytes)."""
        rows, per_row = self._room
        parts = [torch.tensor(header, dtype=torch.int64).view(torch.uint8).to(device)]
        if _fits(header, self._room):
            parts += [self._filled(column, rows) for column in columns]
        else:
            parts.append(torch.zeros(rows * per_row, dtype=torch.uint8, device=device))
        return self._shard.gathered(torch.cat(parts))

    def _filled(self, column: Tensor, rows: int) -> Tensor:
        """The bytes of a column, filled up to a number of rows."""
        if len(column) < rows:
            fill = 0 if column.is_floating_point() else self._ignore_index
            filled = column.new_full((rows, *column.shape[1:]), fill)
            filled[: len(column)] = column
            column = filled
        return column.contiguous().view(torch.uint8).flatten()

    def _must_read(self, header: list[int], found: Tensor) -> bool:
        """Whether the headers are looked at: always but where a GPU would be waited for."""
        is_free = found.device.type == "cpu" or self._batch_size is None
        return is_free or not _fits(header, self._room)

    def _refuse(
        self, refusal: ValueError | TypeError | None, headers: list[list[int]], found: Tensor
    ) -> None:
        """Raise, on every rank, if one has refused its batch or has other columns."""
        if refusal is not None:
            raise refusal
        for rank, (rows, *_) in enumerate(headers):
            if rows < 0:
                text = bytes(found[rank, 8 * NUMBERS : HEADER].tolist()).rstrip(b"\0")
                raise ValueError(f"{text.decode(errors='replace')} (rank {rank}'s batch)")
        if len({tuple(kind) for _, *kind in headers}) > 1:
            raise ValueError(
                "embeddings: expected one dtype on all ranks, and sample_weight, other_labels and "
                "lam on all or none"
            )

    def _unpacked(self, batch: Batch, columns: list[Tensor], found: Tensor, most: int) -> Batch:
        """The columns of all ranks, ``most`` rows of each."""
        place, unpacked = 0, []
        for column in columns:
            each = column[:0].new_empty(1, *column.shape[1:]).nbytes
            width = self._room[0] * each
            values = found[:, place : place + width].contiguous().view(column.dtype)
            values = values.view(len(found), self._room[0], *column.shape[1:])
            unpacked.append(values[:, :most].flatten(0, 1))
            place += width
        labels, *others, embeddings = unpacked
        present = iter(others)
        other_labels = None if batch.other_labels is None else next(present)
        lam = None if batch.lam is None else next(present)
        sample_weight = None if batch.sample_weight is None else next(present)
        # The gradients of the ranks are added up in this dtype.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        return Batch(embeddings.to(dtype), labels, sample_weight, other_labels, lam)


def _header(columns: list[Tensor], present: int) -> list[int]:
    bytes_of_row = sum(column[:0].new_empty(1, *column.shape[1:]).nbytes for column in columns)
    dtype = DTYPES.index(columns[-1].dtype)
    return [len(columns[0]), bytes_of_row, dtype, present, *[0] * (TEXT // 8)]


def _refusal(error: Exception) -> list[int]:
    """The header of a rank that refuses its batch, with the reason after the numbers."""
    text = str(error).encode()[:TEXT].ljust(TEXT, b"\0")
    return [-1, *[0] * (NUMBERS - 1), *memoryview(text).cast("q").tolist()]


def _present(batch: Batch) -> int:
    optional = batch.other_labels, batch.lam, batch.sample_weight
    return sum(2**i for i, column in enumerate(optional) if column is not None)


def _fits(header: list[int], room: tuple[int, int]) -> bool:
    rows, bytes_of_row = header[:2]
    return 0 <= rows <= room[0] and bytes_of_row == room[1]
