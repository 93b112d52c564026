"""Kernels run where they should and nowhere else: every refusal of `use_triton`, and what steps then do."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from optim import AdamW, backend, cpu_jit
from tests.kernels import counted


class Subclass(Tensor):
    """As DTensor is one: its memory is not what its shape says."""


def test_plain_tensors_are_taken(kernel_device):
    x = torch.ones(3, device=kernel_device)
    parameter = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        assert backend.use_triton(x, parameter, x.bfloat16(), x.to(torch.uint8))
    assert not backend.use_triton()


REFUSED = {
    "float64": lambda x: x.double(),
    "complex": lambda x: torch.complex(x, x),
    "negated view": lambda x: torch.complex(x, x).conj().imag,
    "conjugated view": lambda x: torch.complex(x, x).conj(),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "subclass": lambda x: x.as_subclass(Subclass),
    "watched by autograd": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_kernels_cannot_read_is_refused(kernel_device, kind):
    x = torch.ones(3, device=kernel_device)
    other = REFUSED[kind](x)
    assert not backend.use_triton(other)
    assert not backend.use_triton(x, other), "also beside one that is fine"


def test_nothing_is_taken_inside_transformations(kernel_device):
    seen = []

    def look(x):
        seen.append(backend.use_triton(x))
        return x * 2

    x = torch.ones(2, 3, device=kernel_device)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.grad(lambda y: look(y).sum())(x)
    torch.func.functional_call(torch.nn.Identity(), {}, (x,))
    assert seen == [False] * 3
    assert backend.use_triton(x)


def test_sharded_parameters_are_stepped_by_the_definition(kernel_device, tmp_path):
    if kernel_device.type == "cuda":
        pytest.skip("a process group of CPU tensors")
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ends = []
        for rounding, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            whole = torch.linspace(-1, 1, 64, dtype=dtype)
            sharded = torch.nn.Parameter(distribute_tensor(whole.clone(), mesh, [Replicate()]))
            sharded.grad = distribute_tensor(torch.ones(64, dtype=dtype), mesh, [Replicate()])
            plain = torch.nn.Parameter(whole.clone())
            plain.grad = torch.ones(64, dtype=dtype)
            assert not backend.use_triton(sharded.detach())
            with counted() as launches:
                AdamW([sharded], stochastic_rounding=rounding).step()
            assert launches == []
            AdamW([plain], stochastic_rounding=rounding).step()
            ends.append((sharded.detach().to_local(), plain.detach()))
    finally:
        dist.destroy_process_group()
    for got, want in ends:
        torch.testing.assert_close(got, want, rtol=2**-7 if want.dtype == torch.bfloat16 else 1e-6, atol=0)


def test_mixed_groups_are_divided(kernel_device):
    """Contiguous float32 by the kernel; a transposed parameter, float64 and a strided gradient by the definition."""

    def ones(*shape):
        return torch.ones(*shape, device=kernel_device)

    strided = ones(4, 3).T
    params = [torch.nn.Parameter(p) for p in (ones(3, 4), strided, ones(5).double(), ones(3, 4), ones(6))]
    grads = [ones(3, 4), ones(3, 4), ones(5).double(), ones(4, 3).T, ones(12)[::2]]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    with counted() as launches:
        AdamW(params, lr=0.5, weight_decay=0.0).step()
    assert launches == ["_adamw_kernel"]
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.5))


@pytest.mark.parametrize("chosen", [None, "auto", "torch"])
def test_on_the_cpu_and_by_choice_nothing_is_launched(chosen, monkeypatch):
    monkeypatch.delenv("OPTIM_BACKEND", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OPTIM_BACKEND", chosen)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with counted() as launches:
        AdamW([p]).step()
    assert launches == []
    assert backend.use_cpu_jit() == (chosen != "torch" and backend._has_llvm())


def test_wrong_choices_are_named(monkeypatch):
    monkeypatch.setenv("OPTIM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="OPTIM_BACKEND is 'cuda'; choose auto, torch or triton"):
        backend.use_triton(torch.ones(1))
    monkeypatch.setenv("OPTIM_BACKEND", "triton")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backend.use_triton(torch.ones(1))


def test_a_gpu_where_nothing_compiles_is_left_to_torch_with_one_warning(monkeypatch):
    if backend.triton is None:
        pytest.skip("triton is not installed")

    def broken(*args, **kwargs):
        raise RuntimeError("Failed to find C compiler")

    device = torch.device("cuda", 97)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: None)
    monkeypatch.setattr(backend, "launch", broken)
    try:
        with pytest.warns(RuntimeWarning, match="do not run on cuda:97 .*C compiler.*OPTIM_BACKEND=torch"):
            assert not backend._can_launch(device)
        assert not backend._can_launch(device), "and no second warning, which would be an error here"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert not backend._can_launch(torch.device("cuda", 98)), "too old, without a word"
    finally:
        backend._can_launch.cache_clear()


def test_stochastic_rounding_is_not_compiled_away():
    """The CPU's compiler rounds to nearest; such a rule is stepped by its own definition."""
    from optim import AdamWRule

    p = torch.ones(3)
    assert cpu_jit.supports(AdamWRule(stochastic_rounding=True), p) == "the rule has its own step"
    assert cpu_jit.supports(AdamWRule(), p) == ""


WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None
os.environ["TRITON_INTERPRET"] = "1"
import torch
from datatools.projectors import SJLT
from optim import AdamW, AdamW8bit, backend
from optim.zeroth_order import noise
assert backend.triton is None
for kind in (AdamW, AdamW8bit):
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    kind([p]).step()
    assert p.isfinite().all() and (p < 1).all()
SJLT(dim=8).project({"w": torch.ones(2, 5)})
noise.add_normal_(torch.zeros(5), 1.0, 3)
assert not backend.use_triton(p.detach())
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(WITHOUT_TRITON, id="without triton everything imports and runs"),
        pytest.param(
            "import sys, torch, optim\nassert torch.version.cuda or 'triton' not in sys.modules",
            id="a torch without CUDA never imports triton",
        ),
    ],
)
def test_in_a_process_of_its_own(script):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OPTIM_BACKEND")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
