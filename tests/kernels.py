"""What tests of Triton kernels share: tensors amid NaN, outputs that begin as NaN, a count of launches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from optim import backend

GUARD = 16
"""Elements of NaN on both sides of a tensor; 16 keep it aligned to 16 bytes, an odd `shift` takes that away."""

odd_sizes = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""For hypothesis tests with `kernel_device`, which is the same for every example; the interpreter is slow."""


def poisoned(x: Tensor, device: torch.device, shift: int = 0) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous copy of x inside a larger buffer, and a check that nothing was written around it."""
    floating = x.is_floating_point()
    poison = torch.nan if floating else 255
    buffer = torch.full((x.numel() + 2 * GUARD + shift,), poison, dtype=x.dtype, device=device)
    inside = buffer[GUARD + shift : GUARD + shift + x.numel()].view(x.shape)
    inside.copy_(x)

    def check() -> None:
        around = torch.cat([buffer[: GUARD + shift], buffer[GUARD + shift + x.numel() :]])
        assert (around.isnan() if floating else around == 255).all(), "written outside of the tensor"

    return inside, check


def spread(x: Tensor, device: torch.device, gap: int = 3) -> Tensor:
    """x [..., m, n] with `gap` entries of NaN between its rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + gap), torch.nan, dtype=x.dtype, device=device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@contextmanager
def nan_outputs() -> Iterator[None]:
    """Tensors made by torch.empty and torch.empty_like begin as NaN: what a kernel leaves out is seen."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **kwargs: object) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", filled(torch.empty))
        patch.setattr(torch, "empty_like", filled(torch.empty_like))
        yield


class Launches(list[str]):
    """The names of the kernels that were launched."""

    def take(self) -> list[str]:
        """Those since the last call."""
        names = list(self)
        self.clear()
        return names


@contextmanager
def counted() -> Iterator[Launches]:
    """Kernels run as ever, and are counted."""
    seen, launch = Launches(), backend.launch

    def recording(kernel: object, grid: Sequence[int], *args: object, **settings: object) -> None:
        seen.append(kernel.__name__)  # type: ignore[attr-defined]
        launch(kernel, grid, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "launch", recording)
        yield seen


def assert_rounded(got: Tensor, exact: Tensor, *, rtol: float, atol: float) -> None:
    """`got` is the float32 `exact`, rounded once to its dtype; Triton's interpreter rounds towards zero to bfloat16."""
    if got.dtype != torch.float32:
        rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype] * 1.01
        atol = max(atol, 1e-7)
    torch.testing.assert_close(got.float(), exact.float(), rtol=rtol, atol=atol)
