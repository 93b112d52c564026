"""Jobs of several gloo processes: a function of this package's modules on every rank, its results by rank."""

import importlib
import os
import socket
from pathlib import Path
from typing import Any

import torch

from tests.processes import spawn

_CODE = "import sys; from tests.optim.distributed.processes import rank_main; rank_main(*sys.argv[1:])"


def run(function: Any, ranks: int, folder: Path, *arguments: Any, timeout: float = 500) -> list[Any]:
    """`function(*arguments)` on so many ranks, started as torchrun starts them; what it returned, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "OPTIM_BACKEND": "torch",
    }  # to compile takes longer than these steps
    torch.save(arguments, folder / "arguments.pt")
    job = (function.__module__, function.__name__, str(folder))
    processes = [spawn(_CODE, *job, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(ranks)]
    try:
        errors = [process.communicate(timeout=timeout)[1][-3000:] for process in processes]
        assert not any(process.returncode for process in processes), "\n\n".join(errors)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank-{r}.pt", weights_only=False) for r in range(ranks)]


def rank_main(module: str, function: str, folder: str) -> None:
    """One rank of the job."""
    from optim.distributed import world

    torch.set_num_threads(1)
    with world() as here:
        arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
        result = getattr(importlib.import_module(module), function)(*arguments)
        torch.save(result, Path(folder) / f"rank-{os.environ['RANK']}.pt")
        torch.distributed.barrier()  # nobody leaves while others still talk
    assert here.size == int(os.environ["WORLD_SIZE"])
