"""CoLM: small mini-batches that approximate the gradient of large ones, chosen inside the training loop.

Before each optimizer step, a large batch is drawn. All rows of small sources are kept, and rows of each large source
are chosen until the batch has its small size. The choice reads each row's gradient of one matrix, the last value
projection of the decoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel as DDP

from datatools.colm import monitor
from datatools.colm.choice import CORESET_METHODS, choose_rows, rows_called
from datatools.colm.chosen import Chosen
from datatools.colm.early import EARLY
from datatools.colm.exact import EXACT
from datatools.colm.feature import FeatureKind
from datatools.colm.given import choose_given
from datatools.colm.history import History, feature_rule
from datatools.colm.last_layer import LastLayer
from datatools.colm.logits import LOGITS
from datatools.colm.measuring import Measuring
from datatools.colm.paper_code import PAPER_CODE
from datatools.colm.probes import PROBES
from datatools.colm.quotas import Plan, plan
from datatools.colm.row_loss import ROW_LOSS
from datatools.colm.stale import STALE
from datatools.colm.stored import STORED
from datatools.colm.weights import correct_expectation
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.gradients import Batch, Loss
from datatools.selection.candidates import Selection
from datatools.subsets.facility_location import METRICS
from optim import UpdateRule

CORESET_FEATURES: dict[str, FeatureKind] = {
    kind.name: kind
    for kind in (
        EXACT,
        PROBES,
        PAPER_CODE,
        LOGITS,
        ROW_LOSS,
        EARLY,
        STORED,
        STALE,
    )
}
"""Values of `coreset.features`, by name."""


class CoLM(Measuring):
    """Chooses `keep` rows of a large batch: `colm(batch, sources, step=t)` returns a `Selection` (indices, weights).

    Only the model's outputs are read: no weight, gradient, mode or global generator is changed, even if an error is
    raised.

    Memory: 4 bytes x rows x coordinates for features (x elements of the matrix while a rule with state reads them), and
    the activations of the last layer and the head for `token_budget` tokens.

    Args:
        model: any decoder of transformers, with or without LoRA.
        losses: (model, batch) -> mean loss of each row's supervised tokens, floating dtype [n];
            `pipelines.models.losses.row_losses`.
        keep: rows kept of each large batch; calls can override it.
        small: sources whose rows are all kept (`small_sources`).
        features: "exact", each row's gradient of the last value projection (LoRA's B, or the weight), for one forward
            pass and a backward pass through the last layer; "probes", `probes` derivatives along random directions, for
            forward passes of the last layer only; "paper_code", one direction for the whole run times its central
            difference, the published method, whose features are all collinear; "logits" and "row_loss", for one forward
            pass; "early", gradients in the model's first quarter, for a part of a pass; "stored" and "stale", which
            each call gets (`given`), without a pass. A method that reads logits gets them in place of gradients.
        method: a name of `CORESET_METHODS`.
        metric: l1, l2 or cosine; used by facility location only.
        rule: the rule that turns gradients into features: "none", "adam" (betas 0.9 and 0.999, eps 1e-8, with a
            `History` of its own), or any elementwise `UpdateRule`; "auto" is adam for facility location and none for
            other methods.
        probes: number of random directions of features="probes".
        eps: step of the finite differences of features="paper_code".
        dim: largest feature dimension: facility location keeps this number of coordinates (`sparsify`), other methods
            project to it (SJLT); None keeps all.
        history: "selected" updates the rule's state with the chosen rows of large sources, "all" with all their rows.
        per_source: True chooses within each large source by quotas, False among all large sources at once.
        weights: "uniform" leaves the weights of a method as they are; "expectation" scales them so that each source
            counts as much as in the large batch (`correct_expectation`; large sources of which less than one row is
            kept on average, together: `Plan.strata`); "auto" is expectation for features that are given and uniform
            for others.
        max_weight: largest weight of "expectation".
        token_budget: tokens per forward pass, including padding; changes features by rounding only.
        projection: see `LastLayer.of`.
        seed: seed of all random draws; the same seed, step and lane give the same choice, whatever happened before.
        group: processes that hold the same batch: each runs its share of the passes, and all get the same choice. None
            means this process alone.

    Attributes:
        last: the last choice, a `Chosen`; None before the first call.
        wanted: mean gradient of target rows, float32 [d], set by `aim`; None before.
        rate: learning rate of the present step, for methods that need it; the caller sets it.
        memory: features of rows that were chosen lately, float32 [m, d], for methods that need them.
        overflows: number of calls in which small sources alone had more than `keep` rows.

    Raises:
        UsageError: if a setting is unknown or not positive. Calls raise it for a batch with fewer than `keep` rows.
        DataError: if `LastLayer.of` finds no projection. Calls raise it for rows without a supervised token or with a
            loss that is not finite.

    Source:
        Nguyen et al. 2025, arXiv 2407.19580.

    Differs:
        The default method is herding on exact gradients, because the published feature is one number per row (one
        direction for all rows and steps), and medoids do not approximate the mean. Losses are means over a row's own
        tokens. Random draws use private generators. Quotas are rounded at random, where the published code gives what
        is left to the smallest quotas. When small sources overflow, their rows are drawn by quotas. Each
        process chooses among its own rows, where the published code gathers them, unless the processes of `group` hold
        one batch. The activations of the choosing pass are not kept for training, which would need memory for all rows.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> def losses(model, batch):  # the mean loss of each row
        ...     logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        ...     return nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none").mean(1)
        >>> colm = CoLM(model, losses, keep=4, small={"code"}, seed=0)
        >>> tokens = torch.randint(50, (8, 6))
        >>> chosen = colm({"input_ids": tokens, "labels": tokens}, ["code", *["web"] * 7], step=0)
        >>> len(chosen.indices), int(chosen.indices[0])
        (4, 0)

    """

    def __init__(
        self,
        model: nn.Module,
        losses: Loss,
        *,
        keep: int,
        small: Set[Any] = frozenset(),
        features: str = "exact",
        method: str = "herding",
        metric: str = "l1",
        rule: str | UpdateRule = "auto",
        probes: int = 64,
        eps: float = 1e-3,
        dim: int | None = 2560,
        history: Literal["selected", "all"] = "selected",
        per_source: bool = True,
        weights: Literal["auto", "uniform", "expectation"] = "auto",
        max_weight: float = 4.0,
        token_budget: int = 4096,
        projection: str | None = None,
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        for what, value, known in (
            ("features", features, CORESET_FEATURES),
            ("method", method, CORESET_METHODS),
            ("metric", metric, METRICS),
            ("history", history, ("selected", "all")),
        ):
            if value not in known:
                raise UsageError(f"coreset: {what}={value!r} does not exist{did_you_mean(str(value), known)}")
        if keep < 1 or probes < 1 or not eps > 0:
            raise UsageError(f"coreset: keep={keep}, probes={probes}, eps={eps}; each must be above 0")
        while inner := getattr(model, "_orig_mod", None) or (model.module if isinstance(model, DDP) else None):
            model = inner  # torch.compile and DDP do not run the hooks of inner layers, which the choice needs
        self.model, self.losses, self.keep, self.small = model, losses, keep, frozenset(small)
        self.kind, self.method, self.metric = CORESET_FEATURES[features], CORESET_METHODS[method], metric
        self.probes, self.eps, self.dim, self.per_source = probes, eps, dim, per_source
        self.history_of, self.token_budget, self.seed, self.group = history, token_budget, seed, group
        if self.method.reads and not self.kind.free:
            self.kind = CORESET_FEATURES[self.method.reads]
        self.expected = weights == "expectation" or (weights == "auto" and self.kind.free)
        self.max_weight = max_weight
        self.target = LastLayer.of(model, projection)
        plain = self.kind.free or not self.kind.measures_gradients
        self.history = History(feature_rule(rule, "none" if plain else self.method.rule),
                               self.kind.shape(self.target, probes))  # fmt: skip
        if plain and not self.history.plain:
            raise UsageError(f"coreset: rule={rule!r} needs gradients that are measured at each step, and features="
                             f"{self.kind.name!r} has none; use rule='none'")  # fmt: skip
        self.overflows = 0
        self.wanted = None
        self.rate = 1.0
        self.memory = torch.zeros(0, 0)
        self.last: Chosen | None = None

    def __call__(
        self,
        batch: Batch,
        sources: Sequence[Hashable] | Tensor | None = None,
        *,
        step: int,
        lane: int = 0,
        keep: int | None = None,
        lengths: Sequence[int] | None = None,
        names: Sequence[object] | None = None,
        given: Float[Tensor, "n d"] | None = None,
        watch: bool = False,
    ) -> Selection:
        """Choose the rows of `batch` to train on.

        Args:
            batch: inputs of the model and of `losses`, with one row per example: input_ids and labels, int64 [n,
                tokens], attention_mask, ...
            sources: the source of each row [n]; None treats all rows as one source.
            step: number of the training step.
            lane: number of the choice within the step, for micro-batches and ranks.
            keep: rows to keep; None is the value given to the constructor.
            lengths: tokens of each row [n], for splitting the batch; None reads the attention mask.
            names: names of the rows [n] for error messages; None uses their positions in the batch.
            given: features of the rows, floating dtype [n, d], for kinds that cost no pass; a row with a number that is
                not finite has none, and is drawn at random.
            watch: also measure how well this choice and random ones match the gradient of the whole batch (`last`).

        Returns:
            indices (rows of small sources first) and weights, which are 1 for methods without weights of their own,
            unless they correct the expectation.

        Raises:
            UsageError: if the batch lacks inputs, has fewer than `keep` rows, or `sources`, `names` or `lengths` do not
                match.
            DataError: if rows have no supervised token, or their loss is not finite.

        """
        if missing := [key for key in ("input_ids", "labels") if key not in batch]:
            raise UsageError(f"coreset: the batch has no {missing[0]!r}, it has {sorted(batch)}; give both")
        n = len(batch["input_ids"])
        if sources is None:
            sources = [0] * n
        named: list[Hashable] = sources.tolist() if isinstance(sources, Tensor) else list(sources)
        for what, each in (("sources", named), ("names", names), ("lengths", lengths)):
            if each is not None and len(each) != n:
                raise UsageError(f"coreset: {len(each)} {what} for a batch of {n} rows; expected one per row")
        if self.kind.free and (given is None or given.ndim != 2 or len(given) != n):
            shape = None if given is None else list(given.shape)
            raise UsageError(
                f"coreset: features={self.kind.name!r} needs features of all {n} rows (given=); got {shape}"
            )
        empty = ((batch["labels"][:, 1:] != -100).sum(1) == 0).nonzero()[:, 0]
        if len(empty):
            raise DataError(
                f"coreset: {rows_called(empty, names)} have no supervised token ({len(empty)} rows); leave such rows "
                "out of the data"
            )
        made = plan(
            named,
            self.keep if keep is None else keep,
            self.small,
            per_source=self.per_source,
            generator=self._generator("plan", step, lane),
        )
        if given is not None and self.kind.free:
            chosen, grads = self._choose_given(given, made, step, lane, names), None
        else:
            chosen, grads = self._choose(batch, made, step, lane, lengths, names, everything=watch and self.kind.exact)
        if self.expected:
            parts: list[Hashable] = list(named)
            for place, rows in enumerate(made.strata()):
                for i in rows.tolist():
                    parts[i] = (CoLM, place)  # no name of a source
            chosen = correct_expectation(chosen, parts, bound=self.max_weight)
        errors: tuple[float | None, float | None] = (None, None)
        began = perf_counter()
        if watch:
            if not self.kind.exact or grads is None:
                grads = self._measure(EXACT, batch, torch.arange(n), lengths, step, lane, project=True)
            control = self._generator("monitor", step, lane)
            errors = monitor.matching_error(grads, chosen), monitor.random_error(grads, made, control)
        self.overflows += made.overflow
        self.last = Chosen(chosen, made, *errors, watch_seconds=perf_counter() - began if watch else 0.0)
        return chosen

    def _choose_given(
        self, given: Tensor, made: Plan, step: int, lane: int, names: Sequence[object] | None
    ) -> Selection:
        """Return the choice by features that the caller has."""
        generator = self._generator("choice", step, lane)
        if not self.method.features:
            return choose_rows(torch.zeros(len(given), 1), made, method=self.method.name, generator=generator)
        chosen = choose_given(
            given.float(),
            made,
            method=self.method.name,
            metric=self.metric,
            coordinates=self.dim if self.method.coordinates else None,
            generator=generator,
            **self._aims(),
        )
        self._remember(given[chosen.indices])
        return chosen

    def _aims(self) -> dict[str, Any]:
        memory = self.memory if self.method.memory and len(self.memory) else None
        return {"wanted": self.wanted, "rate": self.rate, "memory": memory}

    def _remember(self, features: Tensor) -> None:
        """Keep the features of rows that were chosen, for a method with a memory."""
        if self.method.memory:
            new = features.reshape(len(features), -1).float().cpu()
            new = new[new.isfinite().all(1)]
            self.memory = (torch.cat([self.memory, new]) if self.memory.numel() else new)[-self.method.memory :]

    def _choose(
        self,
        batch: Batch,
        made: Plan,
        step: int,
        lane: int,
        lengths: Sequence[int] | None,
        names: Sequence[object] | None,
        *,
        everything: bool,
    ) -> tuple[Selection, Tensor | None]:
        """Return the choice, and the plain gradients [n, d] of all rows if `everything` is set and any were read."""
        generator = self._generator("choice", step, lane)
        n = len(batch["input_ids"])
        read = torch.arange(n) if self.method.scope == "batch" else made.candidates()
        rows = torch.arange(n) if everything else read
        settings: dict[str, Any] = {
            "method": self.method.name, "metric": self.metric, "generator": generator, "names": names,
        }  # fmt: skip
        idle = not self.method.features or not made.free
        if (idle and self.history.plain) or len(made.candidates()) == 0:
            return choose_rows(torch.zeros(n, 1), made, **settings), None
        project = not self.method.coordinates
        raw = self._measure(
            self.kind, batch, rows, lengths, step, lane, project=self.kind.exact and self.history.plain and project
        )
        place = torch.full((n,), -1)
        place[rows] = torch.arange(len(rows))
        large = place[made.candidates()]
        spread = torch.zeros(n, 1)
        if len(read):
            features = self.history.directions(raw[place[read]])
            if project and not self.history.plain:
                features = self._project(features)
            spread = torch.zeros(n, features[0].numel(), device=features.device)
            spread[read] = features.reshape(len(features), -1)
        chosen = choose_rows(spread, made, coordinates=None if project else self.dim, **settings, **self._aims())
        self._remember(spread[chosen.indices[place[chosen.indices] >= 0]])
        if not self.history.plain and len(made.candidates()):
            taken = chosen.indices[len(made.kept) :]
            self.history.advance(raw[place[taken] if self.history_of == "selected" else large])
        return chosen, raw.reshape(len(raw), -1) if everything else None

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next choices depend on besides the model.

        Returns:
            The tensors of the history by name, the memory and the mean gradient of target rows of a method that reads
            them, and the count of overflows.

        """
        state = {} if self.history.plain else {k: v.detach().clone() for k, v in self.history.state.items()}
        state |= {"memory": self.memory} if self.method.memory else {}
        state |= {"wanted": self.wanted} if self.method.target and self.wanted is not None else {}
        return state | {"overflows": torch.tensor(self.overflows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state.

        Args:
            state: result of `state_dict`.

        Raises:
            DataError: if it was saved with other settings.

        """
        own = self.state_dict()
        if self.method.target:  # absent before the first `aim`, and in checkpoints of older versions
            own.pop("wanted", None)
            own |= {"wanted": state["wanted"]} if "wanted" in state else {}
        wrong = [k for k in sorted(own.keys() | state.keys()) if k not in own or k not in state
                 or (own[k].shape != state[k].shape and k != "memory")]  # fmt: skip
        if wrong:
            raise DataError(
                f"coreset: the saved history does not match ({', '.join(wrong)}); it was saved with other settings"
            )
        self.overflows = int(state["overflows"])
        self.memory = state.get("memory", self.memory)
        if "wanted" in state:
            self.wanted = state["wanted"].to(self.target.parameter.device)
        if not self.history.plain:
            self.history.state = {k: state[k].to(v.dtype) for k, v in self.history.state.items()}
