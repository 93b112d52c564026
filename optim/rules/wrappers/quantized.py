"""States of 8 or 4 bits: a rule whose running averages are stored as codes, with one scale per block."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim import cpu_jit
from optim.checks import check_choice, check_counts, check_flag, check_positive_counts
from optim.cpu_jit.threads import together
from optim.kernels import adamw_8bit
from optim.moments import moment_dtype
from optim.rule import OfParam, State, UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.wrappers.around import Around
from optim.rules.wrappers.codebooks import CODES, VALUES
from optim.rules.wrappers.coding import Coding
from optim.rules.wrappers.pieces import WithoutMemory, flat_part
from optim.sharding import is_sharded

CHUNK = 1 << 17
"""The number of elements that a step decodes at a time (rounded to whole blocks), under elementwise rules."""

_SCALES = "_absmax"


@dataclass(frozen=True, kw_only=True)
class Quantized(Around):
    """A rule whose running averages are stored as codes of 8 or 4 bits.

    A stored number is x = book[code] a, with a = max |x| of its block. A step decodes the state, steps with the inner
    rule in full precision, and encodes the result.

    Args:
        inner: Any rule except those that read a curvature (Sophia, AdaHessian), those with a basis of singular vectors
            (Conda, GaLore, Fira; `LowRank` may have a `Quantized` rule inside) and other `Quantized` rules.
        code: "dynamic" rounds to the nearest of 256 values over seven decades, which are signed except for second
            moments. "linear" is round(127 x / a), and round(255 x / a) for second moments, with ties to even. Second
            moments need "dynamic"; "linear" is sufficient for Muon's momentum. "fp8_e4m3" and "fp8_e5m2" round to the
            nearest number of that float8 format, divided by its largest one. "4bit" rounds to the nearest of 16 values,
            which are dynamic for signed entries and k / 16 with k = 1 to 16 for second moments; two codes are one byte.
        block_size: The number of consecutive entries of the flattened tensor that share a scale; the last block may be
            shorter. The published 4-bit states have 128.
        min_size: The smallest number of entries of a tensor that is coded; smaller ones are stored as the inner rule
            stores them. A param group may have its own: ``{"params": embeddings, "min_size": 2**62}`` keeps the states
            of embeddings in full precision (`stable_embedding_groups`).
        floor: Whether positive second moments never have the code of zero. Otherwise they have it below 1.6e-7 times
            the largest one of the block, and if the next gradient is zero, Adam then steps by m / eps, which is
            unbounded. The published codes behave as with False. It has no effect on 4 bits, which have no code of zero.
        stochastic: Whether to round up or down at random, with x as the mean. The random bits are a function of `seed`,
            the step, the entry of the state and the position (Philox), so that no other generator is affected and a
            resumed run draws the same numbers.
        seed: The seed of stochastic rounding.

    Shapes:
        Any. Blocks extend over rows, so that results depend on how a tensor is divided. Not elementwise.

    State:
        1 byte per parameter and moment, or half a byte with "4bit", and 4 bytes per block of a moment. Codes are uint8
        (int8 for signed linear codes) and scales are float32, whatever the parameter's dtype is. With "4bit" only
        entries of the parameter's shape are coded, as a flat tensor of bytes.

    Source:
        Dettmers et al. 2021, arXiv 2110.02861; bitsandbytes 0.50.2, its exact nearest-code quantiser and decay before
        the update. Linear codes of momentum: arXiv 2509.23106. 4 bits: Li et al. 2023, arXiv 2309.01507, with the code
        books of torchao's AdamW4bit.

    Differs:
        `floor`. bitsandbytes has other forms as well: its GPU kernel decays after the update and preserves the sign of
        m, and its CPU library looks codes up on a coarser grid. Its blocks always have 256 entries, while those of the
        paper have 2048.

    Example:
        >>> from optim import LionRule, Quantized
        >>> rule = Quantized(inner=LionRule(), min_size=0)
        >>> state = rule.init(torch.empty(64, 64))
        >>> {name: str(t.dtype) for name, t in state.items() if t.ndim}
        {'exp_avg': 'torch.uint8', 'exp_avg_absmax': 'torch.float32'}
    """

    name: ClassVar[str] = "quantized"
    elementwise: ClassVar[bool] = False

    code: str = "dynamic"
    block_size: int = 256
    min_size: int = 4096
    floor: bool = True
    stochastic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        called = type(self).__name__
        if not isinstance(self.inner, UpdateRule):
            raise ValueError(f"{called}: inner = {self.inner!r}; it must be a rule such as AdamWRule()")
        if self.inner.uncodable:
            raise ValueError(
                f"{called}: inner = {self.inner!r}; it must be a rule such as AdamWRule(), {self.inner.uncodable}"
            )
        check_choice(called, CODES, code=self.code)
        check_positive_counts(called, block_size=self.block_size)
        if self._per_byte > 1 and self.block_size % 2:
            raise ValueError(
                f"{called}: block_size = {self.block_size}; it must be even, because two codes are one byte"
            )
        check_counts(called, min_size=self.min_size, seed=self.seed)
        check_flag(called, floor=self.floor, stochastic=self.stochastic)

    def init(self, param: OfParam) -> State:
        """Return the inner rule's state, with zeros as codes and a scale of zero per block.

        Raises:
            ValueError: For a sharded parameter, unless it is small.
        """
        state: State = {}
        with nullcontext() if is_sharded(param) else WithoutMemory(max(1, self.min_size)):
            made = self.inner.init(param)
        for key, value in made.items():
            if self._is_coded(value, param):
                if is_sharded(param):
                    raise ValueError(
                        f"{type(self).__name__}: a parameter is sharded, and blocks that a shard cuts would have other "
                        "scales; use the rule inside without 8-bit states"
                    )
                blocks = -(-value.numel() // self.block_size)
                shape = value.shape if self._per_byte == 1 else (-(-value.numel() // 2),)
                state[key] = torch.zeros(shape, dtype=self._coding.dtype(key), device=param.device)
                state[key + _SCALES] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
            else:
                state[key] = value
        return state

    def update(self, grad: OfParam, state: State, param: OfParam) -> tuple[OfParam, State]:
        """Return the inner rule's direction for the decoded state, and the new state encoded."""
        direction, new = self.inner.update(grad, self.inside(state, param), param)
        return direction, self._encoded(new, state)

    def state_settings(self) -> dict[str, Any]:
        """Return the settings that determine what codes mean and which entries share a scale."""
        own = {"code": self.code, "block_size": self.block_size, "min_size": self.min_size}
        return super().state_settings() | own

    @property
    def uncodable(self) -> str:
        """Why the state cannot be stored as codes: it already consists of codes."""
        return "not a rule that is already quantised"

    def stepped(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        *,
        lr: float | Tensor,
        weight_decay: float | Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the inner rule's step and the new state encoded; the state is decoded once."""
        inner = self.inside(state, param)
        moved, new = self.inner.stepped(param, grad, inner, lr=lr, weight_decay=weight_decay, out=out)
        return moved, self._encoded(new, state)

    @property
    def step_is_update(self) -> bool:
        """Whether the step may be compiled as a whole: it may not, codes are decoded and encoded piece by piece."""
        return False

    def step(self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, weight_decay: float) -> None:
        """Step one parameter; see `step_all`."""
        self.step_all([param], [grad], [state], lr=lr, weight_decay=weight_decay)

    def step_all(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        *,
        lr: float | Tensor,
        weight_decay: float,
    ) -> None:
        """Step in place, decoding `CHUNK` entries at a time under an elementwise inner rule, and one tensor otherwise.

        In addition to the state, memory contains those entries (per thread) and the temporaries of the inner rule's
        step; for rules for whole matrices it contains one matrix. On a GPU, AdamW with dynamic codes uses
        `optim.kernels.adamw_8bit` for all tensors that the kernel supports at once.
        """
        entries = list(zip(params, grads, states, strict=True))
        rows = [self._kernel_row(*entry) for entry in entries]
        self._step_by_kernel([(r, e[2]) for r, e in zip(rows, entries, strict=True) if r], lr, weight_decay)
        for param, grad, state in (e for r, e in zip(rows, entries, strict=True) if not r):
            own_step = not self.inner.step_is_update and type(self.inner).step_part is UpdateRule.step_part
            if self.inner.elementwise and not own_step and _has_flat_codes(param, state):
                self._step_pieces(param, grad, state, lr=lr, weight_decay=weight_decay)
            else:
                inner = self._decoded_in_pieces(state, param)
                cpu_jit.step(self.inner, [param], [grad], [inner], lr=lr, weight_decay=weight_decay)
                for key, value in inner.items():
                    if key + _SCALES in state:
                        flat = value.reshape(-1)
                        for codes, scales, x, start in self._pieces(state[key], state[key + _SCALES], flat):
                            self._coding.encode_to(codes, scales, key, x, inner["step"], start=start)

    def _pieces(self, codes: Tensor, scales: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield flat pieces of whole blocks: codes, their scales and values, and the index of the first entry."""
        blocks = max(1, CHUNK // self.block_size)
        size = blocks * self.block_size
        parts = (
            torch.split(codes.view(-1), size // self._per_byte),
            torch.split(scales, blocks),
            torch.split(values, size),
        )
        for i, (c, s, x) in enumerate(zip(*parts, strict=True)):
            yield c, s, x, i * size

    def _decoded_in_pieces(self, state: State, param: Tensor) -> State:
        """Return what `inside` returns, without temporaries of the tensor's size."""
        made = {key: value for key, value in state.items() if not key.endswith(_SCALES)}
        for key in made:
            if key + _SCALES in state:
                made[key] = torch.empty(self._shape(state[key], param), dtype=moment_dtype(param), device=param.device)
                for codes, scales, x, _ in self._pieces(state[key], state[key + _SCALES], made[key].view(-1)):
                    x.copy_(self._coding.decode(key, codes, scales, x.dtype, len(x)))
        return made

    def _kernel_row(self, param: Tensor, grad: Tensor, state: State) -> adamw_8bit.Row | None:
        """Return the tensors of this parameter that the kernel reads and writes, or None if it does not support it."""
        if type(self.inner) is not AdamWRule or self.inner.amsgrad or self.code != "dynamic" or self.stochastic:
            return None
        if "exp_avg" + _SCALES not in state or "exp_avg_sq" + _SCALES not in state:
            return None
        m, v = "exp_avg", "exp_avg_sq"
        row = (param, grad, state[m], state[m + _SCALES], state[v], state[v + _SCALES])
        return row if adamw_8bit.fits(row, self.block_size) else None

    def _step_by_kernel(
        self, rows: Sequence[tuple[adamw_8bit.Row, State]], lr: float | Tensor, weight_decay: float
    ) -> None:
        if not rows:
            return
        inner = self.inner
        assert isinstance(inner, AdamWRule)
        for _, state in rows:
            state["step"] += 1
        adamw_8bit.adamw_8bit_step(
            [row for row, _ in rows],
            [inner.scalars(int(state["step"])) for _, state in rows],
            books=(VALUES["dynamic", True], VALUES["dynamic", False]),
            block_size=self.block_size,
            lr=float(lr),
            weight_decay=weight_decay,
            betas=inner.betas,
            eps=inner.eps,
            eps_root=inner.eps_root,
            stochastic_rounding=inner.stochastic_rounding,
            floor=self.floor,
        )

    def _step_pieces(
        self, param: Tensor, grad: Tensor, state: State, *, lr: float | Tensor, weight_decay: float
    ) -> None:
        coded = [key for key in state if key + _SCALES in state]
        rest = {key: t for key, t in state.items() if key not in coded and not key.endswith(_SCALES)}
        blocks = max(1, CHUNK // self.block_size)
        size = blocks * self.block_size
        dtype = moment_dtype(param)
        form = (1,) * (param.ndim - 1) + (-1,)  # the number of dimensions is kept, because a rule may depend on it
        codes_of = [torch.split(state[key].view(-1), size // self._per_byte) for key in coded]
        plain = param.is_contiguous() and grad.is_contiguous()
        scales = [torch.split(state[key + _SCALES], blocks) for key in coded]
        left = deque(range(len(codes_of[0])))
        after: list[State] = []
        failed: list[BaseException] = []

        def piece(i: int) -> State:
            part = {key: t.clone() for key, t in rest.items()}  # counts: the steps of all pieces together are one step
            places = [(key, c[i], s[i]) for key, c, s in zip(coded, codes_of, scales, strict=True)]
            where = slice(i * size, min((i + 1) * size, param.numel()))
            for key, codes, scale in places:
                part[key] = self._coding.decode(key, codes, scale, dtype, where.stop - where.start).view(form)
            inner = {key: part[key] for key in state if key in part}  # in the inner rule's order
            with flat_part(param.detach(), where) as some, flat_part(grad, where, kept=True) as some_grad:
                p, g = some.view(form), some_grad.view(form)
                if self.inner.step_is_update:
                    cpu_jit.step(self.inner, [p], [g], [inner], lr=lr, weight_decay=weight_decay)
                else:
                    self.inner.step_part(p, g, inner, start=where.start, lr=lr, weight_decay=weight_decay)
            for key, codes, scale in places:
                self._coding.encode_to(codes, scale, key, part[key].view(-1), part["step"], start=i * size)
            return {key: part[key] for key in rest}  # the decoded numbers of the piece are released

        def work() -> None:  # the result does not depend on the number of threads: pieces are independent
            while left:
                try:
                    after.append(piece(left.popleft()))
                except IndexError:  # another thread took the last one
                    return
                except BaseException as error:
                    failed.append(error)
                    left.clear()

        with torch.no_grad():
            native = param.is_cpu and dtype == torch.float32 and not self.stochastic and cpu_jit.codes.supports(param)
            # in a tensor that is not contiguous, a row may belong to several pieces
            together(work, min(torch.get_num_threads(), len(left)) - 1 if native and plain else 0)
        if failed:
            raise failed[0]
        for key, t in rest.items():
            t.copy_(after[0][key])

    def inside(self, state: State, param: Tensor) -> State:
        """Return the decoded state in the form of the inner rule; entries that are not coded are not copied."""
        dtype = moment_dtype(param)
        return {
            key: self._decoded(key, value, state[key + _SCALES], dtype, param) if key + _SCALES in state else value
            for key, value in state.items()
            if not key.endswith(_SCALES)
        }

    @property
    def _coding(self) -> Coding:
        return Coding(self.code, self.block_size, self.floor, self.stochastic, self.seed)

    @property
    def _per_byte(self) -> int:
        return self._coding.per_byte

    def _is_coded(self, value: Tensor, param: Tensor) -> bool:
        fits = self._per_byte == 1 or value.shape == param.shape  # two codes per byte do not show another shape
        return fits and value.is_floating_point() and value.ndim > 0 and value.numel() >= max(1, self.min_size)

    def _shape(self, codes: Tensor, param: Tensor) -> torch.Size:
        """Return the shape of the numbers that are stored as these codes."""
        return codes.shape if self._per_byte == 1 else param.shape

    def _decoded(self, key: str, codes: Tensor, scales: Tensor, dtype: torch.dtype, param: Tensor) -> Tensor:
        shape = self._shape(codes, param)
        return self._coding.decode(key, codes, scales, dtype, shape.numel()).view(shape)

    def _encoded(self, new: State, old: State) -> State:
        state: State = {}
        for key, value in new.items():
            if key + _SCALES in old:
                codes, state[key + _SCALES] = self._coding.encode(key, value, new["step"])
                state[key] = codes.view(old[key].shape)
            else:
                state[key] = value
        return state


def _has_flat_codes(param: Tensor, state: State) -> bool:
    coded = [state[key] for key in state if key + _SCALES in state]
    return bool(coded) and not is_sharded(param) and all(map(Tensor.is_contiguous, coded))
