"""A sampler that gives rows in a fixed order: after a resume, in several processes, in a Trainer, or in your own loop.

sampler = OrderSampler(scores=losses, shape="saw", form=Form(window=64))
sampler.attach(trainer)  # any transformers Trainer, or TRL's SFTTrainer
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler

from datatools import files
from datatools.errors import DataError, UsageError
from datatools.files.order_file import Order
from datatools.order.shapes import Form, arrange, positions, shuffled
from datatools.stats import Numbers

NAME = "order_sampler.json"
"""The file in a Trainer's output folder with the digest of the order that its checkpoints were trained in."""


class OrderSampler(Sampler[int]):
    """Row numbers in a fixed order, the same in every epoch unless it shuffles within windows.

    In a Trainer, several processes share each step's rows in this order, and a resumed run continues at the next row:
    the Trainer passes over the rows that were trained. In a loop of your own, `skip` does so, and `shard` gives the
    rows of one process.

    Args:
        order: the row numbers, each of 0..n-1 once; or leave it out and give scores.
        scores: one finite number per row, from which `arrange` makes the order.
        shape: shape of the order of the scores.
        form: numbers of the shape. A window is shuffled anew in every epoch (`set_epoch`).
        seed: seed of the shuffle.

    Raises:
        UsageError: unless exactly one of order and scores is given, and the order has every row once.

    Example:
        >>> sampler = OrderSampler(scores=[3.0, 1.0, 2.0])
        >>> list(sampler), list(sampler.skip(1)), list(sampler)
        ([1, 2, 0], [2, 0], [1, 2, 0])

    """

    def __init__(
        self,
        order: Sequence[int] | None = None,
        *,
        scores: Numbers | None = None,
        shape: str = "sort",
        form: Form | None = None,
        seed: int = 0,
    ) -> None:
        if (order is None) == (scores is None):
            raise UsageError("OrderSampler: give an order (row numbers) or scores, and not both")
        form = form or Form()
        plain = Form(form.layers, form.sections, form.ratio)
        given = () if order is None else order  # perhaps an array, which has no truth value
        made = arrange(scores, shape, form=plain) if scores is not None else [int(row) for row in given]
        if not made:
            raise UsageError("OrderSampler: the order has no rows")
        if sorted(made) != list(range(len(made))):
            known = set(made)
            lost = next((row for row in range(len(made)) if row not in known), None)
            raise UsageError(
                f"OrderSampler: an order of {len(made)} rows must have each of 0 to {len(made) - 1} once"
                + (f"; {lost} is missing" if lost is not None else "")
            )
        self.order, self.window, self.seed, self.epoch = made, form.window, seed, 0
        self.batch_size: int | None = None
        self._skip, self._share = 0, (0, 1, 1)

    @classmethod
    def of(cls, order: Order, ids: Sequence[str]) -> OrderSampler:
        """Make a sampler of an order of batches, such as the order.npz of `datatools order`.

        Args:
            order: the order; its batches must have one size.
            ids: the id of each row of the data set.

        Returns:
            The sampler; `attach` refuses a Trainer with steps of another number of rows.

        Raises:
            UsageError: if batches have different sizes.
            DataError: if rows of the order are not in the data set, or the order does not have each of its rows once.

        """
        place = {identity: row for row, identity in enumerate(ids)}
        rows = [identity for step in range(len(order)) for identity in order[step]]
        lost = [identity for identity in rows if identity not in place]
        if lost or len(set(rows)) != len(rows) or len(rows) != len(ids):
            what = f"row {lost[0]!r} is not in the data set" if lost else f"{len(set(rows))} rows of {len(rows)} steps"
            raise DataError(
                f"OrderSampler: an order of {len(rows)} rows for a data set of {len(ids)} rows ({what}); the data set "
                "must have the rows of the order, each once: select them by id first"
            )
        sizes = {len(batch) for batch in order.batches}
        if len(sizes) > 1:
            raise UsageError(
                f"OrderSampler: the batches of the order have {min(sizes)} to {max(sizes)} rows, not one size"
            )
        made = cls([place[identity] for identity in rows])
        made.batch_size = sizes.pop()
        return made

    def __len__(self) -> int:
        size, _, world = self._share
        return len(positions(len(self.order), *self._share)) if world > 1 or size > 1 else len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Return the rows of an epoch; rows to skip are skipped once."""
        rows = shuffled(self.order, self.window, self.seed + self.epoch)
        if self._share[2] > 1:
            rows = [rows[place] for place in positions(len(rows), *self._share)]
        start, self._skip = self._skip, 0
        return iter(rows[start:])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which a shuffle within windows depends; Trainer and accelerate call it.

        Args:
            epoch: number of the epoch.

        """
        self.epoch = epoch

    def skip(self, rows: int) -> OrderSampler:
        """Leave out the first rows of the next epoch, which were trained before a loop of your own was interrupted.

        Args:
            rows: number of rows of this process.

        Returns:
            The sampler itself.

        Raises:
            UsageError: if an epoch has fewer rows.

        """
        if not 0 <= rows <= len(self):
            raise UsageError(f"OrderSampler: cannot skip {rows} rows of an epoch of {len(self)}")
        self._skip = rows
        return self

    def shard(self, rank: int, world: int, batch_size: int) -> OrderSampler:
        """Give the rows of one process of a DDP loop of your own: each step trains on the next world x batch_size rows.

        Args:
            rank: number of the process.
            world: number of processes.
            batch_size: rows of a step of one process.

        Returns:
            A sampler for this process; not for a Trainer or accelerate, which distribute batches themselves.

        Raises:
            UsageError: if the rank is not one of `world` processes, or a batch has no row.

        """
        if not 0 <= rank < world or batch_size < 1:
            raise UsageError(f"OrderSampler: rank {rank} of {world} processes with batches of {batch_size} rows")
        made = OrderSampler(self.order, form=Form(window=self.window), seed=self.seed)
        made.batch_size, made.epoch, made._share = self.batch_size, self.epoch, (batch_size, rank, world)
        return made

    def digest(self) -> str:
        """Identify the order, its windows and their seed.

        Returns:
            A digest.

        """
        return files.digest(json.dumps([self.order, self.window, self.seed]).encode())

    def attach(self, trainer: Any) -> None:
        """Make a Trainer train in this order, in place of its own sampler.

        Args:
            trainer: a transformers Trainer or a subclass, such as TRL's SFTTrainer.

        Raises:
            UsageError: if the Trainer streams its data or starts its epochs again when it resumes, its data set has
                another number of rows, or its steps have another number of rows than the batches of an order file.

        """
        data, args = trainer.train_dataset, trainer.args
        if self._share[2] > 1:
            raise UsageError("OrderSampler: a Trainer distributes batches itself; attach the sampler without shard()")
        if data is None or not hasattr(data, "__len__"):
            raise UsageError("OrderSampler: the Trainer has no data set with a length; an order needs row numbers")
        if len(data) != len(self.order):
            raise UsageError(
                f"OrderSampler: an order of {len(self.order)} rows for a data set of {len(data)} rows; make the order "
                "of the rows that the Trainer has (packing and filtering change their number)"
            )
        if getattr(args, "ignore_data_skip", False):
            raise UsageError(
                "OrderSampler: with ignore_data_skip a resumed run starts the order again; set it to False"
            )
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.batch_size is not None and step != self.batch_size:
            raise UsageError(
                f"OrderSampler: the Trainer's steps have {step} rows (per device x accumulation x processes), but the "
                f"batches of the order have {self.batch_size}"
            )

        def sampler(*_: Any, **__: Any) -> OrderSampler:
            self._check_folder(Path(args.output_dir), leads=args.process_index == 0)
            return self

        trainer._get_train_sampler = sampler

    def _check_folder(self, folder: Path, *, leads: bool) -> None:
        """Refuse a folder whose checkpoints were trained in another order, and note this one."""
        path = folder / NAME
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if known is not None and known != {"order": self.digest()} and any(folder.glob("checkpoint-*")):
            raise DataError(
                f"{folder} has checkpoints that were trained in another order ({NAME}); use the same order and seed, "
                "or another output_dir"
            )
        if leads:
            files.make_folder(folder)
            files.write_text(path, json.dumps({"order": self.digest()}))
