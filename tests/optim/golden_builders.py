"""The optimizers under test as golden cases describe them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optim import (
    AdaBeliefRule,
    AdaHessianRule,
    AdamMini,
    AdamPRule,
    AdamW8bitRule,
    AdamWRule,
    BlockwiseAdamRule,
    CondaRule,
    EXAdamRule,
    LionRule,
    LowRank,
    Muon8bitRule,
    MuonRule,
    NAdamRule,
    NorMuonRule,
    Optimizer,
    ROOTRule,
    SCALERule,
    SGDPRule,
    SGDRule,
    SGDSaIRule,
    SinkGDRule,
    SophiaGRule,
    SophiaHRule,
    SPAMRule,
    StableSPAMRule,
    State,
    SWANRule,
    create,
    curvature,
    rule_from,
)
from tests.optim.golden import LOSSES, Case, Named, NotBuilt, arrays


def by_groups(
    entry: dict[str, Any], named: Named, rule_of: Callable[[dict[str, Any]], Any], decay_of: Any = None
) -> Optimizer:
    """An optimizer with the param groups of an Adam-family case; rule_of makes the rule of a group's settings."""
    at = dict(named)
    groups = []
    for given in entry["param_groups"] or [{"params": entry["params"]}]:
        settings = entry["hyper"] | {k: v for k, v in given.items() if k != "params"}
        decay = settings.get("weight_decay", 0.0)
        if decay_of is not None:
            decay = decay_of(settings)
        groups.append(
            {
                "params": [(n, at[n]) for n in given["params"]],
                "rule": rule_of(settings),
                "lr": settings["lr"],
                "weight_decay": decay,
            }
        )
    return Optimizer(groups, groups[0]["rule"], lr=groups[0]["lr"])


def only(settings: dict[str, Any], *known: str) -> dict[str, Any]:
    """The settings without lr and decay; an unknown one that is switched on is an optimizer that is not built."""
    rest = {k: v for k, v in settings.items() if k not in ("lr", "weight_decay")}
    for key, value in rest.items():
        if key not in known and value not in (None, False):
            raise NotBuilt(f"setting {key}")
    return {k: v for k, v in rest.items() if k in known}


def adamw(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: AdamWRule(**only(s, "betas", "eps", "amsgrad")))


def sgd(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: SGDRule(**only(s, "momentum", "dampening", "nesterov")))


def lion(entry: dict[str, Any], named: Named) -> Optimizer:
    def decay(settings: dict[str, Any]) -> float:  # lucidrains divides by the constructor's learning rate
        return settings["weight_decay"] / (entry["hyper"]["lr"] if settings.get("decoupled_weight_decay") else 1.0)

    return by_groups(entry, named, lambda s: LionRule(**only(s | {"decoupled_weight_decay": None}, "betas")), decay)


def coupled_or_not(settings: dict[str, Any], switch: str) -> tuple[dict[str, Any], float]:
    """The settings without that switch and with `l2`, and the decoupled decay: all of the decay is one or the other."""
    rest = {k: v for k, v in settings.items() if k != switch}
    decay = settings.get("weight_decay", 0.0)
    return (rest | {"l2": 0.0}, decay) if settings[switch] else (rest | {"l2": decay}, 0.0)


def nadam(entry: dict[str, Any], named: Named) -> Optimizer:
    def split(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
        return coupled_or_not(settings, "decoupled_weight_decay")

    known = ("betas", "eps", "momentum_decay", "l2")
    return by_groups(entry, named, lambda s: NAdamRule(**only(split(s)[0], *known)), lambda s: split(s)[1])


def adabelief(entry: dict[str, Any], named: Named) -> Optimizer:
    def split(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
        return coupled_or_not(settings, "weight_decouple")

    known = ("betas", "eps", "amsgrad", "rectify", "degenerated_to_sgd", "l2", "fixed_decay")
    return by_groups(entry, named, lambda s: AdaBeliefRule(**only(split(s)[0], *known)), lambda s: split(s)[1])


def exadam(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: EXAdamRule(**only(s, "betas", "eps")))


def adamp(entry: dict[str, Any], named: Named) -> Optimizer:
    known = ("betas", "eps", "delta", "wd_ratio", "nesterov")
    return by_groups(entry, named, lambda s: AdamPRule(**only(s, *known)))


def sgdp(entry: dict[str, Any], named: Named) -> Optimizer:
    known = ("momentum", "dampening", "nesterov", "eps", "delta", "wd_ratio")
    return by_groups(entry, named, lambda s: SGDPRule(**only(s, *known), project_buffer=not s["nesterov"]))


@dataclass(frozen=True, kw_only=True)
class RecordedMasks(SPAMRule):
    """SPAM with the masks that the published code drew: one a call, in an array of the case."""

    file: str = ""
    key: str = ""

    def _mask(self, n: Tensor, param: Tensor) -> Tensor:
        return torch.tensor(arrays(Path(self.file))[self.key][int(n) - 1]).bool()


def spam(entry: dict[str, Any], named: Named) -> Optimizer:
    """Decay after the update, in the terms of decay before it; none where a mask is, as published."""
    hyper = entry["hyper"]
    lr, decay = hyper["lr"], hyper["weight_decay"]
    known = ("betas", "eps", "correct_bias", "warmup_steps", "threshold", "DeltaT", "grad_accu_steps", "density")
    masked = entry.get("density_params", [])
    groups: list[dict[str, Any]] = [
        {"params": [n], "weight_decay": 0.0, "key": f"{entry['case']}/mask/{n}"} for n in masked
    ]
    rest = [n for n in entry["params"] if n not in masked]
    groups.append({"params": rest, "lr": lr * (1 - lr * decay), "weight_decay": decay / (1 - lr * decay), "density": 1})
    file = str(entry["at"] / entry["file"])
    return by_groups(
        entry | {"param_groups": groups},
        named,
        lambda s: (
            SPAMRule(**only(s, *known))
            if s.get("density", 1) == 1
            else RecordedMasks(**only(s, *known, "key"), file=file)
        ),
    )


def stable_spam(entry: dict[str, Any], named: Named) -> Optimizer:
    known = ("betas", "eps", "gamma1", "gamma2", "gamma3", "total_T", "eta_min", "update_proj_gap")
    return by_groups(entry, named, lambda s: StableSPAMRule(**only(s, *known)))


def sgd_sai(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: SGDSaIRule(**only(s, "momentum", "eps")))


def adam_mini(entry: dict[str, Any], named: Named) -> Optimizer:
    """By name for a transformer; other names have one v a tensor in the published code."""
    problem, settings = entry["problem_settings"], {k: v for k, v in entry["hyper"].items() if k != "whole_v"}
    if "n_heads" not in problem:
        return AdamMini(named, **settings, blocks="tensor")
    whole = entry["hyper"].get("whole_v", False)
    return AdamMini(named, **settings, dim=problem["dim"], n_heads=problem["n_heads"], whole_value=whole)


def blockwise_adam(entry: dict[str, Any], named: Named) -> Optimizer:
    block = "tensor" if all(len(names) == 1 for names in entry["blocks"]) else "group"
    groups = [{"params": names} for names in entry["blocks"]]
    return by_groups(
        entry | {"param_groups": groups}, named, lambda s: BlockwiseAdamRule(**only(s, "betas", "eps"), block=block)
    )


def matrices_and_rest(entry: dict[str, Any], named: Named, muon: dict[str, Any], rest: dict[str, Any]) -> Optimizer:
    split = {
        kind: [(n, p) for n, p in named if (entry["parameters"][n] == "muon") == (kind == "muon")]
        for kind in ("muon", "rest")
    }
    groups = [settings | {"params": split[kind]} for kind, settings in (("muon", muon), ("rest", rest)) if split[kind]]
    return Optimizer(groups, groups[0]["rule"], lr=groups[0]["lr"])


def ns_dtype(entry: dict[str, Any]) -> str:
    return "param" if entry["newton_schulz_dtype"] == entry["param_dtype"] else entry["newton_schulz_dtype"]


def coefficients(hyper: dict[str, Any]) -> tuple[tuple[float, float, float], ...]:
    given = hyper["ns_coefficients"]
    return tuple(tuple(t) for t in given) if isinstance(given[0], list) else (tuple(given),)  # type: ignore[return-value]


def muon(entry: dict[str, Any], named: Named) -> Optimizer:
    """Keller Jordan's code, or torch.optim.Muon."""
    h = entry["hyper_parameters"]
    common = {
        "momentum_form": "ema",
        "ns_steps": h["ns_steps"],
        "ns_eps": h["eps"],
        "ns_dtype": ns_dtype(entry),
        "nesterov": h["nesterov"],
        "ns_coefficients": coefficients(h),
    }
    if "adjust_lr_fn" in h:  # torch
        rule = MuonRule(**common, momentum=h["momentum"], scale=h["adjust_lr_fn"] or "original", ns_form="torch")
        return matrices_and_rest(entry, named, {"rule": rule, "lr": h["lr"], "weight_decay": h["weight_decay"]}, {})
    rule = MuonRule(**common, momentum=h["muon"]["momentum"], scale="original", conv_scale="kernel")
    adam = h.get("adam", {"lr": 0.0, "weight_decay": 0.0, "betas": (0.9, 0.95), "eps": 1e-10})
    adam_rule = AdamWRule(betas=adam["betas"], eps=adam["eps"])
    return matrices_and_rest(
        entry,
        named,
        {"rule": rule, "lr": h["muon"]["lr"], "weight_decay": h["muon"]["weight_decay"]},
        {"rule": adam_rule, "lr": adam["lr"], "weight_decay": adam["weight_decay"]},
    )


def moonlight(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    rule = MuonRule(
        momentum=h["momentum"],
        nesterov=h["nesterov"],
        ns_steps=h["ns_steps"],
        ns_eps=h["eps"],
        ns_dtype=ns_dtype(entry),
    )
    rest = AdamWRule(betas=h["adamw_betas"], eps=h["adamw_eps"], eps_before_correction=True)
    shared = {"lr": h["lr"], "weight_decay": h["wd"]}
    return matrices_and_rest(entry, named, {"rule": rule, **shared}, {"rule": rest, **shared})


def dion(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    scale = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms_adamw", None: "none"}[h["adjust_lr"]]
    table = "polar_express" if h["use_polar_express"] else "dion"
    rule = MuonRule(
        momentum=h["mu"],
        nesterov=h["nesterov"],
        scale=scale,
        cautious_decay=h["cautious_wd"],
        ns_coefficients=table,
        ns_eps=h["epsilon"],
        ns_dtype=ns_dtype(entry),
    )
    return matrices_and_rest(entry, named, {"rule": rule, "lr": h["lr"], "weight_decay": h["weight_decay"]}, {})


def by_rule(
    entry: dict[str, Any],
    named: Named,
    rule_of: Callable[[str], Any],
    settings: dict[str, Any],
    rest: dict[str, Any],
) -> Optimizer:
    """A group for each kind of parameter that the case tells apart; those of some Adam are `rest`."""
    at = dict(named)
    groups: dict[str, dict[str, Any]] = {}
    for name, kind in entry["parameters"].items():
        group = rest if kind.startswith("adam") else settings | {"rule": rule_of(kind)}
        groups.setdefault(kind, group | {"params": []})["params"].append((name, at[name]))
    given = list(groups.values())
    return Optimizer(given, given[0]["rule"], lr=given[0]["lr"])


def before(lr: float, decay: float) -> dict[str, float]:
    """Decay of the updated weights, in the terms of decay before the update."""
    return {"lr": lr * (1 - lr * decay), "weight_decay": decay / (1 - lr * decay)}


def normuon(entry: dict[str, Any], named: Named) -> Optimizer:
    """The published code."""
    h = entry["hyper_parameters"]
    matrix, adam = h["matrix"], h.get("adam", {"lr": 0.0, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0})
    rule = NorMuonRule(
        momentum=matrix["momentum"],
        beta2=matrix["beta2"],
        nesterov=h["nesterov"],
        ns_steps=h["ns_steps"],
        row_eps=h["eps_row"],
        conv_scale="kernel",
        ns_dtype=ns_dtype(entry),
    )
    rest = {
        "rule": AdamWRule(betas=adam["betas"], eps=adam["eps"]),
        "lr": adam["lr"],
        "weight_decay": adam["weight_decay"],
    }
    settings = {"lr": matrix["lr"], "weight_decay": matrix["weight_decay"]}
    return by_rule(entry, named, lambda kind: rule, settings, rest)


def normuon_paper(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    rule = NorMuonRule(
        momentum=h["beta1"],
        beta2=h["beta2"],
        nesterov=False,
        update_scale="match_rms",
        rms=h["rms"],
        row_eps=h["eps"],
        ns_eps=h["ns_eps"],
        ns_dtype=ns_dtype(entry),
    )
    return by_rule(entry, named, lambda kind: rule, {"lr": h["lr"], "weight_decay": h["weight_decay"]}, {})


def normuon_dion(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    scale = {"spectral_norm": "spectral_norm", "rms_norm": "match_rms_adamw"}[h["adjust_lr"]]
    table = "polar_express" if h["use_polar_express"] else "dion"
    rule = NorMuonRule(
        momentum=h["mu"],
        beta2=h["muon_beta2"],
        momentum_form="heavy_ball",
        nesterov=h["nesterov"],
        scale=scale,
        ns_coefficients=table,
        ns_eps=h["epsilon"],
        row_eps=h["eps_row"],
        cautious_decay=h["cautious_wd"],
        ns_dtype=ns_dtype(entry),
    )
    return by_rule(entry, named, lambda kind: rule, {"lr": h["lr"], "weight_decay": h["weight_decay"]}, {})


def root(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    table = dict(h["coefficients"])
    other = table.pop("other")
    shapes = tuple((tuple(json.loads(f"[{key.strip('()')}]")), tuple(triple)) for key, triple in table.items())
    rule = ROOTRule(
        momentum=h["momentum"],
        nesterov=h["nesterov"],
        ns_steps=h["root_steps"],
        ns_eps=h["ns_eps"],
        quantile=h["quantile"],
        shape_coefficients=shapes,
        ns_coefficients=(tuple(other),),
    )
    rest = AdamWRule(betas=h["adamw_betas"], eps=h["adamw_eps"], eps_before_correction=True)
    settings = {"lr": h["lr"], "weight_decay": h["wd"]}
    return by_rule(entry, named, lambda kind: rule, settings, settings | {"rule": rest})


def conda(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    settings = before(h["lr"], h["weight_decay"])
    fields = {key: h["matrix_group"][key] for key in ("update_proj_gap", "scale")}
    rule = CondaRule(betas=h["betas"], eps=h["eps"], **fields)
    rest = AdamWRule(betas=h["betas"], eps=h["eps"], eps_before_correction=True)
    return by_rule(entry, named, lambda kind: rule, settings, settings | {"rule": rest})


def stateless(entry: dict[str, Any], named: Named) -> Optimizer:
    """SWAN and SinkGD."""
    h = entry["hyper_parameters"]
    if entry["optimizer"] == "swan":
        rule: Any = SWANRule(alpha=h["alpha"], steps=h["k"], beta=h["beta"], center=h["center"])
    else:
        rule = SinkGDRule(alpha=h["alpha"], rounds=h["L"])
    rest = {"rule": AdamWRule(betas=h["adam_betas"], eps=h["adam_eps"]), "lr": h["alr"], "weight_decay": 0.0}
    return by_rule(entry, named, lambda kind: rule, {"lr": h["lr"], "weight_decay": h["wd"]}, rest)


def scale(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]

    def rule(kind: str) -> SCALERule:
        return SCALERule(
            momentum=h["momentum"] if kind.startswith("last") else 0.0,
            axis="outputs" if kind.endswith("dim 0") else "inputs",
        )

    adam = AdamWRule(betas=h["adamw_betas"], eps=h["adamw_eps"], eps_before_correction=True)
    rest = {"rule": adam, "lr": h["adam_lr"] or h["lr"], "weight_decay": h["wd"]}
    return by_rule(entry, named, rule, {"lr": h["lr"], "weight_decay": h["wd"]}, rest)


def sophia_g(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: SophiaGRule(**only(s | {"bs": None, "k": None}, "betas", "rho")))


def sampled_curvature(case: Case, inputs: dict[str, np.ndarray], p: dict[str, Tensor], t: int) -> dict[Tensor, Tensor]:
    """B g^2 of recorded gradients or labels; the published code makes it after the step before this one."""
    hyper = case.entry["hyper"]
    if t == 0 or t % hyper["k"]:
        return {}
    if case.problem["kind"] in LOSSES:
        labels = arrays(case.folder / case.entry["file"])[f"{case.entry['case']}/gnb_labels"][t // hyper["k"] - 1]
        loss = LOSSES[case.problem["kind"]](inputs | {"y": labels}, p)
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    else:
        present = [n for n in p if f"has_grad/{n}" not in inputs or inputs[f"has_grad/{n}"][t - 1]]
        grads = {n: torch.tensor(inputs[f"hess_grad/{n}"][t - 1], dtype=p[n].dtype) for n in present}
    return {p[n]: hyper["bs"] * g * g for n, g in grads.items()}


def sophia_h(entry: dict[str, Any], named: Named) -> Optimizer:
    return by_groups(entry, named, lambda s: SophiaHRule(**only(s | {"k": None}, "betas", "gamma", "eps")))


def adahessian(entry: dict[str, Any], named: Named) -> Optimizer:
    known = ("betas", "eps", "hessian_power", "spatial_average_block_size", "variant")
    extra: dict[str, Any] = {"variant": {"instr": "instruction", "image": "image"}[entry["variant"]]}
    if entry["hyper"]["spatial_average_block_size"] is None:
        extra["spatial_average_block_size"] = (-1, -1, -1, -1)
    return by_groups(entry, named, lambda s: AdaHessianRule(**only(s | extra, *known)))


def probed_curvature(case: Case, inputs: dict[str, np.ndarray], p: dict[str, Tensor], t: int) -> dict[Tensor, Tensor]:
    """z H z with the recorded probe of the step: normal for Sophia-H, signs for AdaHessian."""
    if t % case.entry["hyper"].get("k", 1):
        return {}
    kind = "z_gauss" if case.entry["optimizer"] == "SophiaH" else "z_rademacher"
    probes = [torch.tensor(inputs[f"{kind}/{n}"][t], dtype=x.dtype) for n, x in p.items()]
    found = curvature.hutchinson(lambda: LOSSES[case.problem["kind"]](inputs, p), list(p.values()), probes)
    return {x: h for x, h in zip(p.values(), found, strict=True) if h is not None}


CURVATURE: dict[str, Callable[[Case, dict[str, np.ndarray], dict[str, Tensor], int], dict[Tensor, Tensor]]] = {
    "SophiaG": sampled_curvature,
    "SophiaH": probed_curvature,
    "AdaHessian": probed_curvature,
}
"""Golden optimizer -> the estimates of the Hessian's diagonal before step t."""


def blockwise_lr(entry: dict[str, Any], named: Named) -> Optimizer:
    """The blockwise learning rate over the inner optimizer; blocks are told by the names alone."""
    h, inner = entry["hyper"], {"AdamW": "adamw", "Lion": "lion", "AdamMini": "adam_mini"}[entry["inner"]]
    blocks = {"embed": "embedding", "ln": "norm", "mlp": "ffn"}
    ratios = {blocks.get(block, block): ratio for block, ratio in h["ratios"].items()}
    shape = {k: entry["problem_settings"][k] for k in ("dim", "n_heads")} if inner == "adam_mini" else {}
    return create(
        inner,
        named,
        lr=h["base_lr"],
        weight_decay=h["weight_decay"],
        block_ratios=ratios,
        betas=h["betas"],
        **({} if h["eps"] is None else {"eps": h["eps"]}),
        **shape,
    )


def adam_8bit(entry: dict[str, Any], named: Named) -> Optimizer:
    """The nearest code and decay before the step: variant "exact"; the other two are there for information."""
    known = ("betas", "eps", "block_size", "min_size")
    hyper = {"min_size": entry["hyper"]["min_8bit_size"]}
    return by_groups(
        entry,
        named,
        lambda s: AdamW8bitRule().with_settings(
            **only({k: v for k, v in s.items() if k != "min_8bit_size"} | hyper, *known)
        ),
    )


def muon_8bit(entry: dict[str, Any], named: Named) -> Optimizer:
    h = entry["hyper_parameters"]
    rule = Muon8bitRule(code=h["scheme"], block_size=h["block_size"], min_size=0, floor=False).with_settings(
        momentum=h["momentum"], nesterov=h["nesterov"], ns_steps=h["ns_steps"], ns_eps=h["ns_eps"], ns_dtype="param"
    )
    adam = h["adam"] or {"betas": (0.9, 0.95), "eps": 1e-8, "lr": 0.0, "weight_decay": 0.0, "state": "float32"}
    rest: Any = AdamWRule(betas=adam["betas"], eps=adam["eps"])
    if adam["state"] != "float32":
        said = re.fullmatch(r"8-bit (\w+), block (\d+)", adam["state"])
        if said is None:
            raise NotBuilt(f"muon_8bit with Adam's state {adam['state']!r}")
        rest = AdamW8bitRule(inner=rest, code=said[1], block_size=int(said[2]), min_size=0, floor=False)
    settings = {"lr": h["lr"], "weight_decay": h["weight_decay"]}
    return by_rule(
        entry,
        named,
        lambda kind: rule,
        settings,
        {"rule": rest, "lr": adam["lr"], "weight_decay": adam["weight_decay"]},
    )


@dataclass(frozen=True, kw_only=True)
class RecordedBasis(LowRank):
    """A low-rank rule with the bases that the published code found or drew: arrays of the case, by their first step."""

    file: str = ""
    key: str = ""

    def _basis(self, state: State, length: int, rank: int, like: Tensor) -> Tensor:
        stored = arrays(Path(self.file))
        first = max(t for k in stored if k.startswith(self.key) and (t := int(k.rsplit("/", 1)[1])) <= state["step"])
        basis = torch.as_tensor(stored[f"{self.key}{first}"]).to(like.dtype)
        return basis if basis.shape == (length, rank) else basis.T


def low_rank(entry: dict[str, Any], named: Named) -> Optimizer:
    """GaLore, Fira and APOLLO; decay after the update, in the terms of decay before it."""
    h, kind = entry["hyper_parameters"], entry["optimizer"]
    matrix = h["matrix_group"]
    settings: dict[str, Any] = {k: matrix[k] for k in ("rank", "update_proj_gap", "proj_type")}
    settings |= {
        "form": {"galore": "project", "fira": "residual", "apollo": "scale"}[kind],
        "limiter_reset": False,
        "projection": {"random": "random"}.get(matrix.get("proj"), "svd"),
        "scale": matrix.get("alpha", matrix.get("scale")),
        "correct_bias": h["correct_bias"],
    }
    if kind == "apollo":
        settings |= {"scale_type": matrix["scale_type"], "scale_front": h["scale_front"]}
    inner = AdamWRule(betas=h["betas"], eps=h["eps"], bias_correction=False)
    rest = AdamWRule(betas=h["betas"], eps=h["eps"], eps_before_correction=True)
    groups = [
        {
            "params": [(n, p)],
            "rule": rest
            if entry["parameters"][n] == "adamw"
            else RecordedBasis(inner=inner, file=str(entry["at"] / entry["file"]), key=f"basis/{n}/", **settings),
        }
        for n, p in named
    ]
    return Optimizer(groups, rest, **before(h["lr"], h["weight_decay"]))


def suite(entry: dict[str, Any], named: Named) -> Optimizer:
    """A case that says in this package's terms what the authors' code ran with."""
    ours = entry["ours"]
    rule = rule_from({"name": ours["rule"]} | ours["settings"])
    return Optimizer(named, rule, lr=ours["lr"], weight_decay=ours["weight_decay"])


BUILDERS: dict[str, Callable[[dict[str, Any], Named], Optimizer]] = {
    "AdamW": adamw,
    "NAdam": nadam,
    "AdaBelief": adabelief,
    "EXAdam": exadam,
    "AdamP": adamp,
    "SGD": sgd,
    "SGDP": sgdp,
    "Lion": lion,
    "SPAM": spam,
    "StableSPAM": stable_spam,
    "SGDSaI": sgd_sai,
    "AdamMini": adam_mini,
    "BlockwiseAdam": blockwise_adam,
    "BlockwiseLR": blockwise_lr,
    "SophiaG": sophia_g,
    "SophiaH": sophia_h,
    "AdaHessian": adahessian,
    "muon": muon,
    "muon_moonlight": moonlight,
    "muon_dion": dion,
    "Adam8bit": adam_8bit,
    "muon_8bit": muon_8bit,
    "galore": low_rank,
    "fira": low_rank,
    "apollo": low_rank,
    "normuon": normuon,
    "normuon_paper": normuon_paper,
    "normuon_dion": normuon_dion,
    "root": root,
    "conda": conda,
    "swan": stateless,
    "sinkgd": stateless,
    "scale": scale,
    "suite": suite,
}
"""Golden optimizer -> how this suite makes it; a case of any other is reported as not built yet."""
