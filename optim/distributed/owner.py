"""The division of matrices among ranks: each matrix has one rank that stores its state and steps it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from optim import cpu_jit
from optim.distributed.collectives import MESSAGE, bundles, group_size
from optim.optimizer import Optimizer
from optim.rule import State, UpdateRule
from optim.saved import loaded_state
from optim.sharding import is_sharded


class OwnerComputes(Optimizer):
    """An optimizer that divides the work on whole matrices (rules with `elementwise = False`) among processes.

    Use it instead of the optimizer that it is given, whose param groups it takes, before that optimizer has stepped.
    The tensors of such rules are sorted by decreasing size and assigned to the ranks in turn. The owner stores the
    state of the whole tensor and steps it as a single process would, so that results do not depend on the number of
    ranks (except for the order of sums in the gradients). All other tensors are stepped as before: those of elementwise
    rules, which do not need other ranks, and those of rules whose tensors depend on each other (`UpdateRule.coupled`).
    With `elementwise`, replicated parameters of elementwise rules are divided, too, so that every state is stored once
    (ZeRO-1, by whole tensors).

    - Replicated parameters (DDP: the same parameter and gradient on every rank): owners share the new parameters by
      all-gather, with each rank's part padded to the longest one. In a step, each rank receives about the size of all
      parameters.
    - Parameters of FSDP2 (DTensor, rows over one mesh dimension): gradient and parameter are sent to the owner by
      all-to-all, and its new parameter is sent back. In total, each rank sends 3 times the size of its shards. Uneven
      and empty shards are supported.

    A message has about 32 MiB, so that the memory in addition to the states is that of a few of the largest tensors.
    `state_dict` and `load_state_dict` are collective: call them on all ranks. A state dict contains the whole states of
    all tensors. It is the same on every rank and as in a single process, and can be loaded with any number of ranks, or
    into an `Optimizer`. Between these calls `state` only has the tensors that this rank owns, so `UpdateMap.of` needs a
    plain optimizer that was loaded from the state dict.

    Args:
        optimizer: The optimizer, before its first step.
        process_group: The ranks; all of them by default. With one process, nothing differs from the given optimizer.
        elementwise: Whether replicated parameters of elementwise rules are divided among ranks, too. Their states then
            take the memory of one process in total, at the cost of an all-gather of the new parameters.

    Raises:
        TypeError: For DTensors that are not sharded by rows over exactly the ranks of the group.
        ValueError: If the optimizer has already stepped.

    Source:
        Jordan et al. 2024 (KellerJordan/Muon) for assigning and gathering the weights, microsoft/dion for rows.

    Differs:
        The owner computes the whole step, with norms of whole matrices. Dion's NorMuon rescales by the norm of the
        local rows and therefore depends on the number of ranks. Messages have the dtypes of parameter and gradient, not
        bfloat16.

    Example:
        >>> from optim import create
        >>> from optim.distributed import OwnerComputes
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> optimizer = OwnerComputes(create("muon", model.named_parameters(), lr=0.02))
        >>> model(torch.ones(2, 8)).sum().backward()
        >>> optimizer.step()  # with one process, the step of the given optimizer
    """

    def __init__(
        self, optimizer: Optimizer, process_group: dist.ProcessGroup | None = None, *, elementwise: bool = False
    ) -> None:
        if optimizer.state:
            raise ValueError(
                "OwnerComputes: the optimizer already has a state; wrap it before its first step, and load the state "
                "dict afterwards"
            )
        self.process_group, self.elementwise = process_group, elementwise
        groups = []
        for group in optimizer.param_groups:
            params, names = group["params"], group.get("param_names")
            rest = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            groups.append(rest | {"params": list(zip(names, params, strict=True)) if names else list(params)})
        defaults = optimizer.defaults
        super().__init__(groups, defaults["rule"], lr=defaults["lr"], weight_decay=defaults["weight_decay"])
        self.divide, self.divisions = optimizer.divide, optimizer.divisions

    def __getstate__(self) -> dict[str, Any]:
        """Add the process group to what torch copies and pickles, which is groups and states."""
        return super().__getstate__() | {"process_group": self.process_group, "elementwise": self.elementwise}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `Optimizer` does.

        Args:
            param_group: A dictionary with `params` and settings.

        Raises:
            TypeError: For a DTensor whose rows are not distributed over the ranks.
        """
        before = len(self.param_groups)
        super().add_param_group(param_group)
        for group in self.param_groups[before:]:
            for param in group["params"]:
                if is_sharded(param) and self._divides(group["rule"], param):
                    _check_rows(param, group_size(self.process_group))

    def _divided(self, rule: UpdateRule) -> bool:
        whole = self.elementwise or not rule.elementwise
        return group_size(self.process_group) > 1 and whole and not rule.coupled

    def _divides(self, rule: UpdateRule, param: Tensor) -> bool:
        """Return whether one rank steps the whole parameter; elementwise rules step the shards that each rank has."""
        return self._divided(rule) and not (rule.elementwise and is_sharded(param))

    def _owners(self) -> dict[Tensor, int]:
        """Return the owner of every tensor of a divided rule."""
        dealt = [p for group in self.param_groups for p in group["params"] if self._divides(group["rule"], p)]
        dealt.sort(key=lambda p: -p.numel())  # stable: tensors of equal size keep the order of the groups
        size = group_size(self.process_group)
        return {param: i % size for i, param in enumerate(dealt)}

    def _share(self, rule: UpdateRule, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
        if self._divided(rule):  # the owner does it, with whole gradients
            return args[2], args[3]
        return super()._share(rule, *args)

    def _step_those(
        self, rule: UpdateRule, params: list[Tensor], grads: list[Tensor], *, lr: float | Tensor, weight_decay: float
    ) -> list[bool]:
        own = [i for i, param in enumerate(params) if not self._divides(rule, param)]
        fine = dict.fromkeys(params, True)
        if own or not params:
            mine = [params[i] for i in own]
            done = super()._step_those(rule, mine, [grads[i] for i in own], lr=lr, weight_decay=weight_decay)
            fine.update(zip(mine, done, strict=True))
        if len(own) == len(params):
            return [fine[param] for param in params]
        owners, group = self._owners(), self.process_group

        def step(keys: Sequence[Tensor], whole: Sequence[Tensor], own_grads: Sequence[Tensor]) -> None:
            """Step tensors as their owner: `whole` are the parameters of `keys`, under which states are stored."""
            for key, tensor in zip(keys, whole, strict=True):
                if not self.state[key]:
                    self.state[key].update(rule.init(tensor))
            states: list[State] = [self.state[key] for key in keys]
            if rule.shares:
                good = [i for i, finite in enumerate(cpu_jit.all_finite(own_grads)) if finite]
                some = [states[i] for i in good]
                rule.share([own_grads[i] for i in good], some, some)
            done = cpu_jit.step(rule, whole, own_grads, states, lr=lr, weight_decay=weight_decay)
            fine.update(zip(keys, done, strict=True))

        kinds: dict[Any, list[int]] = {}
        divided = [i for i, param in enumerate(params) if self._divides(rule, param)]
        for i in sorted(divided, key=lambda i: -params[i].numel()):
            kinds.setdefault((is_sharded(params[i]), params[i].dtype, grads[i].dtype), []).append(i)
        for (sharded, *_), index in kinds.items():
            for run in bundles([params[i].numel() * params[i].element_size() for i in index], MESSAGE):
                some = [index[k] for k in run]
                (_by_rows if sharded else _by_replicas)(
                    [params[i] for i in some], [grads[i] for i in some], [owners[params[i]] for i in some], group, step
                )
        return [fine[param] for param in params]

    # ------------------------------------------------------------------------------------------------------ state dicts

    def state_dict(self) -> dict[str, Any]:
        """Return the whole states of all tensors, equal on every rank. This is collective: call it on all ranks."""
        borrowed = self._gather_states()
        try:
            saved = super().state_dict()
        finally:
            for param in borrowed:
                del self.state[param]
        whole = {
            key: {entry: value.full_tensor() if is_sharded(value) else value for entry, value in state.items()}
            for key, state in sorted(saved["state"].items())
        }
        return saved | {"state": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as `Optimizer` does; each rank keeps the states of the tensors that it owns."""
        super().load_state_dict(state_dict)
        owners = self._owners()
        rank = dist.get_rank(self.process_group) if owners else 0
        for param, owner in owners.items():
            if owner != rank:
                self.state.pop(param, None)
        for group in self.param_groups:
            for param in group["params"]:
                if is_sharded(param) and param not in owners and param in self.state:
                    self.state[param] = _spread(self.state[param], group["rule"].init(param))

    def _loaded(self, rule: UpdateRule, param: Tensor, state: Mapping[str, Any]) -> State:
        if not is_sharded(param) or not self._divides(rule, param):
            return super()._loaded(rule, param, state)
        whole = torch.empty(param.shape, dtype=param.dtype, device="meta")  # an owner has all rows
        return loaded_state(rule, whole, state, on=_local(param).device)

    def _gather_states(self) -> list[Tensor]:
        """Fill `state` with the states that other ranks own, and return their parameters."""
        owners = self._owners()
        if not owners:
            return []
        rank = dist.get_rank(self.process_group)
        device = _local(next(iter(owners))).device
        have = torch.tensor([rank == owner and param in self.state for param, owner in owners.items()], device=device)
        have = have.to(torch.uint8)
        dist.all_reduce(have, dist.ReduceOp.MAX, group=self.process_group)
        rules = {param: group["rule"] for group in self.param_groups for param in group["params"]}
        borrowed = []
        for (param, owner), made in zip(owners.items(), have.tolist(), strict=True):
            if not made:
                continue
            if owner != rank:
                self.state[param] = rules[param].init(_local(param).new_empty(param.shape))
                borrowed.append(param)
            source = owner if self.process_group is None else dist.get_global_rank(self.process_group, owner)
            for value in self.state[param].values():  # in the order of `init`, on every rank
                sent = value.to(device).contiguous()
                dist.broadcast(sent, source, group=self.process_group)
                if owner != rank:
                    value.copy_(sent)
        return borrowed


_Step: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def _local(x: Tensor) -> Tensor:
    """Return the rows of a DTensor that this rank has; other tensors are returned unchanged."""
    local: Tensor = x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]
    return local.detach()


def _spread(state: State, like: State) -> State:
    """Return the whole state with the shards of `like`; entries that are already sharded are unchanged."""
    from torch.distributed.tensor import distribute_tensor

    return {
        key: distribute_tensor(value, like[key].device_mesh, like[key].placements)  # type: ignore[attr-defined]
        if is_sharded(like[key]) and not is_sharded(value)
        else value
        for key, value in state.items()
    }


def _check_rows(param: Tensor, ranks: int) -> None:
    from torch.distributed.tensor import Shard

    placements, mesh = param.placements, param.device_mesh  # type: ignore[attr-defined]
    if tuple(placements) != (Shard(0),) or mesh.size() != ranks:
        raise TypeError(
            f"OwnerComputes: a parameter of shape {tuple(param.shape)} has placements {tuple(placements)} on a mesh of "
            f"{mesh.size()}; expected rows over all {ranks} ranks, (Shard(dim=0),), as fully_shard creates them"
        )


def _by_replicas(
    params: list[Tensor], grads: list[Tensor], owners: list[int], group: dist.ProcessGroup | None, step: _Step
) -> None:
    """Let owners step their tensors, and send the results to all ranks."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    held = [[i for i, owner in enumerate(owners) if owner == r] for r in range(size)]
    mine = [params[i] for i in held[rank]]
    step(mine, mine, [grads[i] for i in held[rank]])
    longest = max(sum(params[i].numel() for i in some) for some in held)
    sent = params[0].new_zeros(longest)
    own = _joined([p.detach().reshape(-1) for p in mine], sent)
    sent[: own.numel()] = own
    received = sent.new_empty(size * longest)
    dist.all_gather_into_tensor(received, sent, group=group)
    for r in range(size):
        if r != rank:
            _fill([params[i] for i in held[r]], received[r * longest : (r + 1) * longest])


def _by_rows(
    params: list[Tensor], grads: list[Tensor], owners: list[int], group: dist.ProcessGroup | None, step: _Step
) -> None:
    """Send the rows of gradients and parameters to the owners, which step whole tensors and send the new rows back."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    held = [[i for i, owner in enumerate(owners) if owner == r] for r in range(size)]
    mine = held[rank]
    rows = [_local(p) for p in params]

    def whole_of(column: Sequence[Tensor]) -> list[Tensor]:
        sent = [_joined([column[i].reshape(-1) for i in some], column[0]) for some in held]
        came = _all_to_all(sent, [sum(len(_span(params[i], r, size)) for i in mine) for r in range(size)], group)
        parts = [iter(torch.split(x, [len(_span(params[i], r, size)) for i in mine])) for r, x in enumerate(came)]
        return [torch.cat([next(part) for part in parts]).reshape(params[i].shape) for i in mine]

    whole_grads, whole = whole_of([_local(g) for g in grads]), whole_of(rows)
    step([params[i] for i in mine], whole, whole_grads)
    sent = []
    for r in range(size):
        spans = [_span(params[i], r, size) for i in mine]
        sent.append(_joined([w.reshape(-1)[s.start : s.stop] for w, s in zip(whole, spans, strict=True)], rows[0]))
    came = _all_to_all(sent, [sum(rows[i].numel() for i in some) for some in held], group)
    for some, flat in zip(held, came, strict=True):
        _fill([rows[i] for i in some], flat)


def _span(param: Tensor, rank: int, size: int) -> range:
    """Return the entries of the flat tensor that a rank has: as many rows as in `torch.chunk`, which may be none."""
    each = -(-param.shape[0] // size)
    width = math.prod(param.shape[1:])
    return range(width * min(rank * each, param.shape[0]), width * min((rank + 1) * each, param.shape[0]))


def _all_to_all(sent: Sequence[Tensor], counts: list[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Send sent[r] to rank r, and receive counts[r] entries from rank r."""
    flat = torch.cat(list(sent))
    received = flat.new_empty(sum(counts))
    dist.all_to_all_single(received, flat, counts, [len(part) for part in sent], group=group)
    return list(torch.split(received, counts))


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(list(parts)) if parts else like.new_empty(0)


def _fill(params: Sequence[Tensor], flat: Tensor) -> None:
    """Write the entries of `flat` to the parameters; the rest of it is padding."""
    start = 0
    for param in params:
        param.copy_(flat[start : start + param.numel()].reshape(param.shape))
        start += param.numel()
