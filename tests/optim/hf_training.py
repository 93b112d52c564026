"""A training run by `transformers.Trainer` with an optimizer of the suite: in this process, or as one of several."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from optim import hf

EXACT = {"muon": {"ns_dtype": "param"}}
"""Settings without which rounding in bfloat16 makes runs that are equal but for the order of sums differ visibly."""


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
