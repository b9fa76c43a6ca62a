"""Batches streamed from a CSV file in bounded memory."""

from collections.abc import Iterator

import numpy as np
import torch

from lightning_altmin.arguments import check_count
from lightning_altmin.data.csv_rows import CSVError, CSVFile, RowReader, Rows
from lightning_altmin.data.csv_schema import RowSchema
from lightning_altmin.data.indexed_loader import check_shares
from lightning_altmin.data.resumable_loader import Batch, ResumableLoader
from lightning_altmin.data.seeding import derived_generator
from lightning_altmin.trainer.progress import TrainingProgress


class CSVLoader(ResumableLoader):
    """Iterable of batches over consecutive rows of a file, resumable at any batch.

    With a shuffle buffer the rows are cut into blocks of that many, and the rows of each block come in a random order;
    the blocks stay in the order of the file. So a resumed epoch passes over the blocks before its own without parsing
    them. At most ``max(shuffle_buffer, batch_size) + chunk_rows`` rows are held at a time, and for a moment a copy.

    Of several processes each reads the whole file and keeps its part of every batch of ``world * batch_size`` rows, so
    that they see the batches of one process, malformed lines are an error on all of them, and none waits for another.

    Args:
        file: the file.
        schema: the meaning of its columns.
        batch_size: rows per batch and process.
        start: number of the first row to use.
        rows: number of rows to use; None uses all to the end of the file, and the loader then has no length.
        shuffle_buffer: rows per shuffled block; 0 keeps the order of the file.
        drop_last: whether a last batch that is not full is left out.
        chunk_rows: rows parsed at a time; it changes memory and speed only.
        progress: who counts the trained batches, see ``ResumableLoader``.

    Raises:
        ValueError: if a number is out of range, or there would be no batch.
    """

    def __init__(
        self,
        file: CSVFile,
        schema: RowSchema,
        batch_size: int,
        start: int = 0,
        rows: int | None = None,
        shuffle_buffer: int = 0,
        drop_last: bool = False,
        chunk_rows: int = 10_000,
        progress: TrainingProgress | None = None,
    ) -> None:
        super().__init__(progress)
        check_count("batch_size", batch_size)
        check_count("chunk_rows", chunk_rows)
        check_count("shuffle_buffer", shuffle_buffer, 0)
        check_count("start", start, 0)
        if rows is not None:
            check_count("rows", rows, 0, otherwise="None for all")
        if rows is not None and rows < (batch_size if drop_last else 1):
            raise ValueError(
                f"the loader would be empty: {rows} rows with batch_size={batch_size}, drop_last={drop_last}"
            )
        self.batch_size = batch_size
        self.shuffle_buffer = shuffle_buffer
        self.drop_last = drop_last
        self._file = file
        self._schema = schema
        self._start = start
        self._rows = rows
        self._chunk_rows = chunk_rows

    def share(self, rank: int, world: int) -> None:
        """Hand out this process's part of every batch of ``world * batch_size`` rows; nothing is padded or repeated.

        A last batch that is not full is dealt out as evenly as possible.

        Args:
            rank: number of this process.
            world: number of processes.

        Raises:
            ValueError: if a process would get nothing of the last batch; where the number of rows is not known, when
                that batch is reached.
        """
        if self._rows is not None:
            check_shares(self._rows, self.batch_size, world, self.drop_last)
        self._rank, self._world = rank, world

    @property
    def is_random(self) -> bool:
        """Whether rows are shuffled."""
        return self.shuffle_buffer > 0

    @property
    def epoch_length(self) -> int | None:
        """Number of batches, None if the number of rows is not known."""
        if self._rows is None:
            return None
        full, rest = divmod(self._rows, self._global_size)
        return full + (1 if rest and not self.drop_last else 0)

    def layout(self) -> dict[str, int | bool]:
        """The settings that say which rows a batch number stands for."""
        return {
            "start": self._start,
            "rows": -1 if self._rows is None else self._rows,
            "batch_size": self._global_size,  # so another number of processes may go on with the epoch
            "shuffle_buffer": self.shuffle_buffer,
            "drop_last": self.drop_last,
        }

    def batches_from(self, seed: int | None, start: int) -> Iterator[Batch]:
        """Build the batches of one epoch from number ``start`` on."""
        size = self._global_size
        first = start * size  # every batch before this one is full
        pieces = self._in_order(first) if seed is None else self._shuffled(first, seed)
        held: list[Rows] = []
        count, full_batches = 0, 0
        for piece in pieces:
            held.append(piece)
            count += len(piece)
            if count < size:
                continue
            rows = np.concatenate(held)
            whole = count - count % size
            for low in range(0, whole, size):
                yield self._schema.decode(rows[low : low + size][self.own_part(size)])
                full_batches += 1
            held = [rows[whole:].copy()]  # a copy: a view would keep all the rows
            count -= whole
        if count and not self.drop_last:
            check_shares(count, self.batch_size, self._world, drop_last=False)
            yield self._schema.decode(np.concatenate(held)[self.own_part(count)])
        elif full_batches == 0 and start == 0:
            raise ValueError(
                f"{self._file.path} gives no batch: it has {count} rows where batch_size={size} and "
                f"drop_last={self.drop_last}"
            )

    @property
    def _global_size(self) -> int:
        """Rows of a batch on all processes together."""
        return self._world * self.batch_size

    def _in_order(self, first: int) -> Iterator[Rows]:
        with self._file.rows(self._start + first, self._schema.columns) as reader:
            while len(rows := self._read(reader, first, self._chunk_rows)):
                yield rows
                first += len(rows)

    def _shuffled(self, first: int, seed: int) -> Iterator[Rows]:
        block, trained = divmod(first, self.shuffle_buffer)
        at = block * self.shuffle_buffer
        with self._file.rows(self._start + at, self._schema.columns) as reader:
            while len(rows := self._read_block(reader, at)):
                order = torch.randperm(len(rows), generator=derived_generator(seed, block)).numpy()
                yield rows[order[trained:]]
                at += len(rows)
                block, trained = block + 1, 0

    def _read_block(self, reader: RowReader, at: int) -> Rows:
        chunks: list[Rows] = []
        count = 0
        while count < self.shuffle_buffer:
            wanted = min(self._chunk_rows, self.shuffle_buffer - count)
            chunks.append(self._read(reader, at + count, wanted))
            count += len(chunks[-1])
            if len(chunks[-1]) < wanted:
                break
        return np.concatenate(chunks)

    def _read(self, reader: RowReader, at: int, count: int) -> Rows:
        """Read and check up to ``count`` rows, the first being number ``at`` of those to use."""
        wanted = count if self._rows is None else min(count, self._rows - at)
        if wanted == 0:
            return np.empty((0, self._schema.columns))
        rows = reader.read(wanted)
        if self._rows is not None and len(rows) < wanted:
            raise CSVError(
                f"{self._file.path}: the file ends after {self._start + at + len(rows)} rows where at least "
                f"{self._start + self._rows} were expected; was it changed during the run?"
            )
        self._schema.check(rows, self._file, self._start + at)
        return rows
