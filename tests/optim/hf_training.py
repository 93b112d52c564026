"""A training run by `transformers.Trainer` with an optimizer of the suite: in this process, or as one of several."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from optim import hf

EXACT: dict[str, dict[str, Any]] = {"muon": {"ns_dtype": "param"}, "soap": {"eps": 1e-3, "max_precond_dim": 8}}
"""Settings without which rounding makes runs that are equal but for the order of sums differ visibly: Muon's in
bfloat16, and SOAP's in the basis of directions without gradient, of which the longer sides have some.
"""


class ShardedOnCPU(Trainer):
    """accelerate gives FSDP to accelerators only; here its plugin is put in by hand, and the rest of its code runs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        self.is_fsdp_enabled = True


def rows() -> list[dict[str, torch.Tensor]]:
    """32 distinct rows of one length."""
    ids = torch.randint(0, 250, (32, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(
    model: Any, out: Path, name: str, *, hyper: dict[str, Any] | None = None, sharded: bool = False, **changes: Any
) -> Trainer:
    """Four steps of four rows, a checkpoint every two."""
    settings = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
                "weight_decay": 0.1, "lr_scheduler_type": "linear", "logging_steps": 1}  # fmt: skip
    args = TrainingArguments(
        str(out), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **settings | changes
    )
    made = (ShardedOnCPU if sharded else Trainer)(
        model, args, train_dataset=rows(), optimizer_cls_and_kwargs=hf.resolve(name, args, **hyper or {})
    )
    made.remove_callback(PrinterCallback)
    return made


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def stepped(model: Any, name: str, steps: int = 2, *, whole: Any = None, parts: int = 1, **hyper: Any) -> Any:
    """The optimizer that Trainer would build, after some steps of this rank's share of four rows, in micro-batches.

    whole: the model to build the optimizer of, if another than runs (Trainer gives it the unwrapped one under DDP).
    """
    spread = torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    factory, settings = hf.resolve(name, lr=1e-2, weight_decay=0.1, **EXACT.get(name, {}) | hyper)
    optimizer = factory()(model if whole is None else whole, **settings)
    data = torch.stack([row["input_ids"] for row in rows()])
    for t in range(steps):
        batch = data[4 * t : 4 * t + 4][rank::size]
        for ids in batch.chunk(parts):
            (model(input_ids=ids, labels=ids).loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def families(folder: str, names: list[str]) -> dict[tuple[str, str], Any]:
    """(optimizer, "ddp" or "fsdp2") -> whole parameters by name after two steps; the message, where it is refused."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.filterwarnings("ignore", message=".*does not refresh the curvature")
    replica = load(Path(folder), torch.float64)
    start = {n: p.clone() for n, p in replica.state_dict().items()}
    found: dict[tuple[str, str], Any] = {}
    for name in names:
        replica.load_state_dict(start)
        replica.zero_grad()
        stepped(DistributedDataParallel(replica), name, whole=replica)
        found[name, "ddp"] = {n: p.detach().clone() for n, p in replica.named_parameters()}
        sharded = load(Path(folder), torch.float64)
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        try:
            stepped(sharded, name)
        except (ValueError, TypeError) as error:
            found[name, "fsdp2"] = str(error)
            continue
        found[name, "fsdp2"] = {n: p.full_tensor().detach().clone() for n, p in sharded.named_parameters()}
    return found


def main(folder: str, out: str, kind: str, names: str) -> None:
    """One of several processes: trains with each optimizer, twice where sharded, the second time from a checkpoint."""
    for name in names.split(","):
        for run in ("whole", "resumed") if kind == "fsdp2" else ("whole",):
            AcceleratorState._reset_state()
            place = Path(out) / f"{kind}-{name}"
            settings = {"hyper": EXACT.get(name), "sharded": kind == "fsdp2", "per_device_train_batch_size": 2}
            done = trainer(load(Path(folder)), place, name, **settings)
            done.train(resume_from_checkpoint=str(place / "checkpoint-2") if run == "resumed" else None)
            # a detached copy of every whole parameter; the plain ones are whole already
            params = {
                n.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for n, p in done.model_wrapped.named_parameters()
            }
            state = next(iter(done.optimizer.state.values()))
            seen = {"types": sorted({type(v).__name__ for v in state.values() if v.dim() > 0})}
            rank = torch.distributed.get_rank()
            torch.save(params, Path(out) / f"{kind}-{name}-{run}-{rank}.pt")
            (Path(out) / f"{kind}-{name}-{run}-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
