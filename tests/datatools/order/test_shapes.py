"""Orders from scores against the published code's rules, and the sampler that keeps them."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from datatools import DataError, Order, UsageError
from datatools.order import SHAPES, Form, OrderSampler, arrange


def test_shapes_are_those_of_the_published_code():
    """Places of 12 sorted items, worked out by the rules of microsoft/data-efficacy (fold, zigzag, STR, SAW)."""
    form = Form(layers=2, sections=2, ratio=0.25)
    made = {name: arrange(range(12), name, form=form) for name in SHAPES}
    assert made == {
        "sort": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        "reverse": [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        "fold": [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11],
        "zigzag": [0, 2, 4, 6, 8, 10, 11, 9, 7, 5, 3, 1],
        "stair": [0, 1, 2, 3, 5, 7, 4, 6, 8, 9, 10, 11],
        "saw": [0, 1, 2, 3, 5, 7, 8, 6, 4, 9, 10, 11],
    }


def test_orders_are_permutations_and_windows_change_places_by_less_than_their_size():
    for n in (1, 2, 3, 7, 50):
        scores = torch.randn(n, generator=torch.Generator().manual_seed(n)).tolist()
        for name in SHAPES:
            for sections in (1, 3, 60):
                plain = arrange(scores, name, form=Form(sections=sections))
                mixed = arrange(scores, name, form=Form(sections=sections, window=5), seed=1)
                assert sorted(plain) == sorted(mixed) == list(range(n))
                assert all(abs(plain.index(i) - mixed.index(i)) < 5 for i in range(n))
    assert arrange([1.0, 1.0, 0.0]) == [2, 0, 1], "equal scores keep their order"


class Rows(torch.utils.data.Dataset):
    """Rows whose numbers can be read from the batch."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"row": torch.tensor(i), "x": torch.tensor([float(i)])}


class Seen(torch.nn.Module):
    """A model that remembers the rows of each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.rows = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, row, x):
        self.rows.append(row.tolist())
        return {"loss": (self.w * x).square().mean()}


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, num_train_epochs=2, save_steps=3, report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="steps", **more,
    )  # fmt: skip


def test_a_trainer_keeps_the_order_also_after_a_resume(tmp_path):
    scores = [5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 6.0, 7.0]
    form = Form(window=4)

    def trained(folder, resume=None):
        trainer = Trainer(model=Seen(), args=arguments(folder), train_dataset=Rows(8))
        OrderSampler(scores=scores, form=form, seed=3).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.rows

    whole = trained(tmp_path / "a")
    flat = [row for step in whole for row in step]
    expected = OrderSampler(scores=scores, form=form, seed=3)
    first = list(expected)
    expected.set_epoch(1)
    assert flat == first + list(expected) and first != list(expected), "windows are shuffled anew in each epoch"
    assert trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3")) == whole[3:]
    assert trained(tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-6")) == whole[6:]
    other = Trainer(model=Seen(), args=arguments(tmp_path / "a"), train_dataset=Rows(8))
    OrderSampler(scores=scores).attach(other)
    with pytest.raises(DataError, match="trained in another order"):
        other.train()


def test_processes_share_each_step_in_order(monkeypatch):
    """As accelerate distributes batches under DDP, and `shard` in a loop without it; also after a resume."""
    sampler = OrderSampler(list(range(8))[::-1])
    loader = DataLoader(Rows(8), batch_size=2, sampler=sampler)
    ranks = []
    for rank in range(2):
        mine = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        ranks.append([batch["row"].tolist() for batch in skip_first_batches(mine, 1)])
    assert ranks == [[[3, 2]], [[1, 0]]], "step 2 trains on the next four rows"
    own = [list(DataLoader(Rows(8), batch_size=2, sampler=sampler.shard(r, 2, 2).skip(2))) for r in range(2)]
    assert [[batch["row"].tolist() for batch in one] for one in own] == ranks
    assert len(sampler.shard(0, 3, 2)) == len(sampler.shard(2, 3, 2)) == 4, "as many steps in each process"


def test_an_order_file_becomes_a_sampler(tmp_path):
    order = Order((("a", "b"), ("c", "d")), (1, 0))
    sampler = OrderSampler.of(order, ["d", "c", "b", "a"])
    assert list(sampler) == [1, 0, 3, 2]
    trainer = Trainer(model=Seen(), args=arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Rows(4))
    with pytest.raises(UsageError, match="steps have 4 rows .* the order have 2"):
        sampler.attach(trainer)
    with pytest.raises(DataError, match="row 'c' is not in the data set"):
        OrderSampler.of(order, ["a", "b", "d", "e"])
    with pytest.raises(UsageError, match="1 to 2 rows, not one size"):
        OrderSampler.of(Order((("a", "b"), ("c",)), (0, 1)), ["a", "b", "c"])


def test_what_has_no_order_is_refused(tmp_path):
    with pytest.raises(UsageError, match="unknown shape 'swa'; did you mean 'saw'"):
        arrange([1.0], "swa")
    with pytest.raises(UsageError, match="score of item 1 is nan"):
        arrange([1.0, float("nan")])
    with pytest.raises(UsageError, match="ratio from 0 to 0.5"):
        Form(ratio=0.7)
    with pytest.raises(UsageError, match="each of 0 to 2 once; 1 is missing"):
        OrderSampler([0, 2, 2])
    with pytest.raises(UsageError, match="the order has no rows"):
        OrderSampler([])
    assert list(OrderSampler(np.array([1, 0]))) == list(OrderSampler(torch.tensor([1, 0]))) == [1, 0]
    with pytest.raises(UsageError, match="and not both"):
        OrderSampler([0], scores=[1.0])
    trainer = Trainer(model=Seen(), args=arguments(tmp_path), train_dataset=Rows(4))
    with pytest.raises(UsageError, match="an order of 5 rows for a data set of 4 rows"):
        OrderSampler(range(5)).attach(trainer)
    trainer.args.ignore_data_skip = True
    with pytest.raises(UsageError, match="ignore_data_skip"):
        OrderSampler(range(4)).attach(trainer)
    assert not (tmp_path / "order_sampler.json").exists()
