"""An optimizer as a function: the update that it would make for given gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optim import torch_states
from optim.moments import moment_dtype
from optim.registry import RULES, rule_from
from optim.rule import State, UpdateRule
from optim.saved import bare_name, check_state, expected_state, loaded_state

Grads: TypeAlias = Mapping[str, Tensor]
Rules: TypeAlias = UpdateRule | Mapping[str, UpdateRule]


@dataclass(frozen=True)
class UpdateMap:
    """An optimizer at one step as a function from gradients to directions, by parameter name; it never changes a state.

    The direction of a parameter is what its rule would multiply by the learning rate and subtract if the given gradient
    were the next one. Weight decay is not part of it, because it does not depend on data. Both calls accept any subset
    of the names, so that features can be computed layer by layer.

    Args:
        rules: The rule of each parameter, by name.
        states: The state of each parameter, by name.
        params: The parameters, by name.

    Example:
        >>> from optim import SGD, UpdateMap
        >>> model = torch.nn.Linear(3, 2)
        >>> update = UpdateMap.of(SGD(model.named_parameters(), lr=0.1))
        >>> directions = update.per_sample({"weight": torch.ones(5, 2, 3)})
        >>> directions["weight"].shape
        torch.Size([5, 2, 3])
    """

    rules: Mapping[str, UpdateRule]
    states: Mapping[str, State]
    params: Mapping[str, Tensor]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, *, rules: Rules | None = None, copy: bool = True) -> "UpdateMap":
        """Return the map of an optimizer built from named parameters.

        Args:
            optimizer: An optimizer of this package, or torch's AdamW, SGD, NAdam or Muon.
            rules: Rules to use with the same states instead of the optimizer's own: one for all parameters, or by name.
                Examples are the rule of LESS's published features, and `SGDRule` for plain gradients.
            copy: Whether to take a snapshot. Without it, the map follows later steps of the optimizer and needs no
                memory.

        Returns:
            The map.

        Raises:
            ValueError: If parameters have no names or a state does not fit its rule.
        """
        states: dict[str, State] = {}
        params: dict[str, Tensor] = {}
        chosen: dict[str, UpdateRule] = {}
        for group in optimizer.param_groups:
            if "param_names" not in group:
                raise ValueError("UpdateMap.of needs names: build the optimizer from model.named_parameters()")
            for name, param in zip(group["param_names"], group["params"], strict=True):
                rule = _choose(rules, name, group)
                value = param.detach().clone() if copy else param.detach()
                chosen[name], params[name] = rule, value
                states[name] = _state_for(name, rule, value, group, optimizer.state.get(param, {}), copy=copy)
        return cls(chosen, states, params)

    @classmethod
    def from_state_dict(
        cls, saved: Mapping[str, Any], params: Mapping[str, Tensor], *, rules: Rules | None = None
    ) -> "UpdateMap":
        """Return the map of a saved `Optimizer.state_dict()`, or of one that torch's AdamW, SGD, NAdam or Muon wrote.

        Args:
            saved: The state dict.
            params: The same parameters by name. They are matched by name where the state dict has names (`param_names`,
                or names as keys, as FSDP writes them; wrapper prefixes are ignored), otherwise by order.
            rules: As in `of`; the saved rules by default.

        Returns:
            The map.

        Raises:
            ValueError: If names, their number or shapes do not match, or if the rule of a group cannot be determined.
        """
        stripped = {bare_name(name): name for name in params}
        entries = list(_saved_entries(saved))
        if len(entries) != len(params):
            raise ValueError(f"the state dict has {len(entries)} parameters, but {len(params)} were given")
        states: dict[str, State] = {}
        chosen: dict[str, UpdateRule] = {}
        for (saved_name, group, state), in_order in zip(entries, params, strict=True):
            name = in_order if saved_name is None else stripped.get(bare_name(saved_name))
            if name is None:
                raise ValueError(f"the state dict has a parameter {saved_name!r}, which was not given")
            rule = chosen[name] = _choose(rules, name, group)
            states[name] = _state_for(name, rule, params[name].detach(), group, state, copy=True)
        return cls(chosen, states, {name: param.detach() for name, param in params.items()})

    def __call__(self, grads: Grads) -> dict[str, Tensor]:
        """Map gradients name -> [*shape] to directions name -> [*shape]; differentiable with respect to the gradients.

        Args:
            grads: The gradients, by parameter name.

        Returns:
            The directions, by parameter name.

        Raises:
            KeyError: For unknown names.
            ValueError: For wrong shapes.
        """
        return {
            name: self.rules[name].update(grad, self.states[name], self.params[name])[0]
            for name, grad in self._checked(grads, batched=False)
        }

    def per_sample(self, grads: Grads) -> dict[str, Tensor]:
        """Map gradients name -> [batch, *shape] to directions name -> [batch, *shape], each row independently.

        Elementwise rules broadcast, and other rules use `torch.vmap`, so that there is no loop over the batch.

        Args:
            grads: The gradients, by parameter name.

        Returns:
            The directions, by parameter name.

        Raises:
            KeyError: For unknown names.
            ValueError: For wrong shapes.
        """
        directions: dict[str, Tensor] = {}
        for name, grad in self._checked(grads, batched=True):
            rule, state, param = self.rules[name], self.states[name], self.params[name]
            if rule.elementwise:
                directions[name] = rule.update(grad, state, param)[0]
            elif len(grad) == 0:  # torch.vmap cannot make scalars from an empty batch
                directions[name] = grad.to(moment_dtype(param))
            else:
                directions[name] = torch.vmap(lambda g, r=rule, s=state, p=param: r.update(g, s, p)[0])(grad)
        return directions

    def _checked(self, grads: Grads, *, batched: bool) -> Iterator[tuple[str, Tensor]]:
        for name, grad in grads.items():
            if name not in self.params:
                raise KeyError(f"a gradient was given for {name!r}, which is not a parameter of this map")
            want = tuple(self.params[name].shape)
            got = tuple(grad.shape[1:] if batched and grad.ndim else grad.shape)
            if got != want or (batched and grad.ndim != len(want) + 1):
                expected = ("batch", *want) if batched else want
                raise ValueError(f"the gradient of {name!r} has shape {tuple(grad.shape)}, expected {expected}")
            yield name, grad


def _choose(rules: Rules | None, name: str, group: Mapping[str, Any]) -> UpdateRule:
    if isinstance(rules, UpdateRule):
        return rules
    if rules is not None and name in rules:
        return rules[name]
    rule = group.get("rule")
    if isinstance(rule, UpdateRule):
        return rule
    if isinstance(rule, Mapping):
        return rule_from(rule)
    theirs = torch_states.counterpart(group)
    if theirs is not None:
        try:
            return rule_from(torch_states.described(group, rule_from({"name": theirs.name, **theirs.settings})))
        except ValueError:  # a switch that no rule here has
            pass
    raise ValueError(f"cannot determine which rule wrote the state of {name!r}; pass rules=, one of {', '.join(RULES)}")


def _state_for(
    name: str, rule: UpdateRule, param: Tensor, group: Mapping[str, Any], entries: Mapping[str, Any], *, copy: bool
) -> State:
    """Return the entries that the rule needs, in its dtypes; a new state if the parameter was never stepped."""
    state: Mapping[str, Any] | None = entries
    theirs = torch_states.counterpart(group)
    if entries and "rule" not in group and theirs is not None and theirs.name == rule.name:
        state = torch_states.native(rule, entries)
    if not state:
        return _told(rule, rule.init(param), group)
    needed = expected_state(rule, param)
    missing = sorted(set(needed) - set(state))
    if missing:
        raise ValueError(f"the state of {name!r} has {sorted(state)}; the rule {rule.describe()} also needs {missing}")
    kept = {key: state[key] for key in needed}
    check_state(repr(name), rule, param, kept)
    if not copy and all(kept[key].dtype == needed[key].dtype for key in needed):
        return _told(rule, kept, group)
    return _told(rule, loaded_state(rule, param, kept), group)


def _told(rule: UpdateRule, state: State, group: Mapping[str, Any]) -> State:
    """Return the state with what the rule reads from its group, as the next step would set it."""
    return rule.told(state, lr=group.get("lr", 0.0), weight_decay=group.get("weight_decay", 0.0))


def _saved_entries(saved: Mapping[str, Any]) -> Iterator[tuple[str | None, Mapping[str, Any], Mapping[str, Any]]]:
    """Yield (name or None, group, state) for every saved parameter, in order."""
    for group in saved["param_groups"]:
        names = group.get("param_names") or [key if isinstance(key, str) else None for key in group["params"]]
        for key, name in zip(group["params"], names, strict=True):
            yield name, group, saved["state"].get(key, {})
