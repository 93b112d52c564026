"""8-bit states: a rule whose running averages are stored as codes, with one scale per block."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from optim import cpu_jit
from optim.checks import check_choice, check_counts, check_flag, check_positive_counts
from optim.cpu_jit.threads import together
from optim.kernels import adamw_8bit
from optim.kernels.philox import random_words
from optim.moments import moment_dtype
from optim.rule import OfParam, State, UpdateRule
from optim.rules.adamw import AdamWRule
from optim.rules.wrappers.around import Around
from optim.rules.wrappers.codebooks import BOOKS, VALUES, take
from optim.rules.wrappers.pieces import WithoutMemory, flat_part
from optim.sharding import is_sharded

CHUNK = 1 << 17
"""The number of elements that a step decodes at a time (rounded to whole blocks), under elementwise rules."""

NON_NEGATIVE = frozenset({"exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var"})
"""Second moments: entries of states that are never negative, whose codes need no sign."""

_SCALES = "_absmax"


@dataclass(frozen=True, kw_only=True)
class Quantized(Around):
    """A rule whose running averages are stored as 8-bit codes.

    A stored number is x = book[code] a, with a = max |x| of its block. A step decodes the state, steps with the inner
    rule in full precision, and encodes the result.

    Args:
        inner: Any rule except those that read a curvature (Sophia, AdaHessian), those with a basis of singular vectors
            (Conda, GaLore, Fira; `LowRank` may have a `Quantized` rule inside) and other `Quantized` rules.
        code: "dynamic" rounds to the nearest of 256 values over seven decades, which are signed except for second
            moments. "linear" is round(127 x / a), and round(255 x / a) for second moments, with ties to even. Second
            moments need "dynamic"; "linear" is sufficient for Muon's momentum.
        block_size: The number of consecutive entries of the flattened tensor that share a scale; the last block may be
            shorter.
        min_size: The smallest number of entries of a tensor that is coded; smaller ones are stored as the inner rule
            stores them. A param group may have its own: ``{"params": embeddings, "min_size": 2**62}`` keeps the states
            of embeddings in full precision (`stable_embedding_groups`).
        floor: Whether positive second moments never have the code of zero. Otherwise they have it below 1.6e-7 times
            the largest one of the block, and if the next gradient is zero, Adam then steps by m / eps, which is
            unbounded. The published codes behave as with False.
        stochastic: Whether to round up or down at random, with x as the mean. The random bits are a function of `seed`,
            the step, the entry of the state and the position (Philox), so that no other generator is affected and a
            resumed run draws the same numbers.
        seed: The seed of stochastic rounding.

    Shapes:
        Any. Blocks extend over rows, so that results depend on how a tensor is divided. Not elementwise.

    State:
        1 byte per parameter and moment, and 4 bytes per block of a moment. Codes are uint8 (int8 for signed linear
        codes) and scales are float32, whatever the parameter's dtype is.

    Source:
        Dettmers et al. 2021, arXiv 2110.02861; bitsandbytes 0.50.2, its exact nearest-code quantiser and decay before
        the update. Linear codes of momentum: arXiv 2509.23106.

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
        check_choice(called, ("dynamic", "linear"), code=self.code)
        check_positive_counts(called, block_size=self.block_size)
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
            if self._is_coded(value):
                if is_sharded(param):
                    raise ValueError(
                        f"{type(self).__name__}: a parameter is sharded, and blocks that a shard cuts would have other "
                        "scales; use the rule inside without 8-bit states"
                    )
                blocks = -(-value.numel() // self.block_size)
                state[key] = torch.zeros(value.shape, dtype=self._dtype(key), device=param.device)
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
        return {"code": self.code, "block_size": self.block_size, "min_size": self.min_size}

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
                            self._encode_to(codes, scales, key, x, inner["step"], start=start)

    def _pieces(self, codes: Tensor, scales: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Yield flat pieces of whole blocks: codes, their scales and values, and the index of the first entry."""
        blocks = max(1, CHUNK // self.block_size)
        size = blocks * self.block_size
        parts = torch.split(codes.view(-1), size), torch.split(scales, blocks), torch.split(values, size)
        for i, (c, s, x) in enumerate(zip(*parts, strict=True)):
            yield c, s, x, i * size

    def _decoded_in_pieces(self, state: State, param: Tensor) -> State:
        """Return what `inside` returns, without temporaries of the tensor's size."""
        made = {key: value for key, value in state.items() if not key.endswith(_SCALES)}
        for key in made:
            if key + _SCALES in state:
                made[key] = torch.empty(state[key].shape, dtype=moment_dtype(param), device=param.device)
                for codes, scales, x, _ in self._pieces(state[key], state[key + _SCALES], made[key].view(-1)):
                    x.copy_(self._decode(key, codes, scales, x.dtype))
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
            books=(BOOKS[True].values, BOOKS[False].values),
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
        codes_of = [torch.split(state[key].view(-1), size) for key in coded]
        plain = param.is_contiguous() and grad.is_contiguous()
        scales = [torch.split(state[key + _SCALES], blocks) for key in coded]
        left = deque(range(len(codes_of[0])))
        after: list[State] = []
        failed: list[BaseException] = []

        def piece(i: int) -> State:
            part = {key: t.clone() for key, t in rest.items()}  # counts: the steps of all pieces together are one step
            places = [(key, c[i], s[i]) for key, c, s in zip(coded, codes_of, scales, strict=True)]
            where = slice(i * size, i * size + len(places[0][1]))
            for key, codes, scale in places:
                part[key] = self._decode(key, codes, scale, dtype).view(form)
            inner = {key: part[key] for key in state if key in part}  # in the inner rule's order
            with flat_part(param.detach(), where) as some, flat_part(grad, where, kept=True) as some_grad:
                p, g = some.view(form), some_grad.view(form)
                if self.inner.step_is_update:
                    cpu_jit.step(self.inner, [p], [g], [inner], lr=lr, weight_decay=weight_decay)
                else:
                    self.inner.step_part(p, g, inner, start=where.start, lr=lr, weight_decay=weight_decay)
            for key, codes, scale in places:
                self._encode_to(codes, scale, key, part[key].view(-1), part["step"], start=i * size)
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
            key: self._decode(key, value, state[key + _SCALES], dtype) if key + _SCALES in state else value
            for key, value in state.items()
            if not key.endswith(_SCALES)
        }

    def _is_coded(self, value: Tensor) -> bool:
        return value.is_floating_point() and value.ndim > 0 and value.numel() >= max(1, self.min_size)

    def _dtype(self, key: str) -> torch.dtype:
        return torch.int8 if self.code == "linear" and key not in NON_NEGATIVE else torch.uint8

    def _encoded(self, new: State, old: State) -> State:
        state: State = {}
        for key, value in new.items():
            if key + _SCALES in old:
                state[key], state[key + _SCALES] = self._encode(key, value, new["step"])
            else:
                state[key] = value
        return state

    def _encode(self, key: str, x: Tensor, step: Tensor, *, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return codes [*shape] and scales [blocks] of a tensor, or of a part of one that begins at entry `start`."""
        n, size = x.numel(), self.block_size
        flat = x.detach().reshape(-1)
        rows = (flat if n % size == 0 else functional.pad(flat, (0, -n % size))).view(-1, size)
        largest = rows.abs().amax(1).to(torch.float32)
        y = rows / torch.where(largest > 0, largest, 1.0).to(x.dtype).unsqueeze(1)
        signed = key not in NON_NEGATIVE
        draws: Tensor | None = None
        if self.stochastic:
            stream = (step.to(torch.int64) << 8) + sum(key.encode()) % 256
            words = random_words(y.numel(), seed=self.seed, stream=stream, start=start, device=x.device)
            draws = (words.to(y.dtype) / 2**32).view(y.shape)
        if self.code == "linear":
            y = y * (127 if signed else 255)
            codes = (y.round() if draws is None else (y + draws).floor()).to(self._dtype(key))
        elif draws is None:
            codes = BOOKS[signed].encode(y)
        else:
            codes = BOOKS[signed].encode_stochastic(y, draws)
        if self.floor and not signed:
            codes = codes.maximum((y > 0).to(torch.uint8))
        return codes.view(-1)[:n].view(x.shape), largest

    def _encode_to(self, codes: Tensor, scales: Tensor, key: str, x: Tensor, step: Tensor, *, start: int = 0) -> None:
        """Write the result of `_encode` to codes [n] and scales [blocks], by compiled code if possible."""
        if x.dtype == torch.float32 and not self.stochastic and cpu_jit.codes.supports(x, codes, scales):
            signed = key not in NON_NEGATIVE
            kind = self.code if signed or self.code == "dynamic" else "linear_unsigned"
            book = BOOKS[signed]
            floor = self.floor and not signed
            cpu_jit.codes.encode(
                x, codes, scales, book.first, book.limits, kind=kind, floor=floor, block_size=self.block_size
            )
        else:
            new, largest = self._encode(key, x, step, start=start)
            codes.copy_(new)
            scales.copy_(largest)

    def _decode(self, key: str, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        n, size = codes.numel(), self.block_size
        book = VALUES[self.code, key not in NON_NEGATIVE]
        if dtype == torch.float32 and cpu_jit.codes.supports(codes, scales):
            return cpu_jit.codes.decode(codes, scales, book, size)
        x = take(book, codes.reshape(-1).view(torch.uint8).int()).to(dtype)
        rows = (x if n % size == 0 else functional.pad(x, (0, -n % size))).view(-1, size)
        return (rows * scales.to(dtype).unsqueeze(1)).view(-1)[:n].view(codes.shape)


def _has_flat_codes(param: Tensor, state: State) -> bool:
    coded = [state[key] for key in state if key + _SCALES in state]
    return bool(coded) and not is_sharded(param) and all(map(Tensor.is_contiguous, coded))
