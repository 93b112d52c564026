"""CoLM: small mini-batches that approximate the gradient of large ones, chosen inside the training loop.

Before each optimizer step, a large batch is drawn. All rows of small sources are kept, and rows of each large source
are chosen until the batch has its small size. The choice reads each row's gradient of one matrix, the last value
projection of the decoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce
from torch.nn.parallel import DistributedDataParallel as DDP

from datatools.colm import monitor
from datatools.colm.choice import CORESET_METHODS, choose_rows, rows_called
from datatools.colm.exact import EXACT
from datatools.colm.feature import FeatureKind
from datatools.colm.history import History, feature_rule
from datatools.colm.last_layer import LastLayer
from datatools.colm.paper_code import PAPER_CODE
from datatools.colm.probes import PROBES
from datatools.colm.quotas import Plan, by_source, plan
from datatools.colm.replay import evaluating
from datatools.errors import DataError, UsageError, did_you_mean
from datatools.gradients import Batch, Loss, pieces
from datatools.projectors import PROJECTORS
from datatools.selection.candidates import Selection
from datatools.subsets.facility_location import METRICS
from optim import UpdateRule

CORESET_FEATURES: dict[str, FeatureKind] = {
    kind.name: kind
    for kind in (
        EXACT,
        PROBES,
        PAPER_CODE,
    )
}
"""Values of `coreset.features`, by name."""
_NAME = "features"


@dataclass(frozen=True)
class Chosen:
    """One choice, its plan, and how well it matches the gradient of the large batch.

    Attributes:
        selection: the chosen rows.
        plan: which rows were kept anyway, and how many were chosen of each source.
        match_error: `matching_error` of the choice; None where it was not watched.
        match_error_random: `random_error` for the same plan; None where it was not watched.
        watch_seconds: time that measuring both errors took, apart from the choice itself.

    Example:
        >>> made = plan(["web", "web"], 1, generator=torch.Generator())
        >>> Chosen(Selection(torch.tensor([0])), made).match_error is None
        True

    """

    selection: Selection
    plan: Plan
    match_error: float | None = None
    match_error_random: float | None = None
    watch_seconds: float = 0.0


class CoLM:
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
            difference, the published method, whose features are all collinear.
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
        token_budget: tokens per forward pass, including padding; changes features by rounding only.
        projection: see `LastLayer.of`.
        seed: seed of all random draws; the same seed, step and lane give the same choice, whatever happened before.
        group: processes that hold the same batch: each runs its share of the passes, and all get the same choice. None
            means this process alone.

    Attributes:
        last: the last choice, a `Chosen`; None before the first call.
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
        tokens. Random draws use private generators. When small sources overflow, their rows are drawn by quotas. Each
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
        self.target = LastLayer.of(model, projection)
        self.history = History(feature_rule(rule, self.method.rule), self.kind.shape(self.target, probes))
        self.overflows = 0
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
            watch: also measure how well this choice and random ones match the gradient of the whole batch (`last`).

        Returns:
            indices (rows of small sources first) and weights, which are 1 for all methods but matching pursuit.

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
        for what, given in (("sources", named), ("names", names), ("lengths", lengths)):
            if given is not None and len(given) != n:
                raise UsageError(f"coreset: {len(given)} {what} for a batch of {n} rows; expected one per row")
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
        chosen, grads = self._choose(batch, made, step, lane, lengths, names, everything=watch and self.kind.exact)
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
        chosen = choose_rows(spread, made, coordinates=None if project else self.dim, **settings)
        if not self.history.plain and len(made.candidates()):
            taken = chosen.indices[len(made.kept) :]
            self.history.advance(raw[place[taken] if self.history_of == "selected" else large])
        return chosen, raw.reshape(len(raw), -1) if everything else None

    # ------------------------------------------------------------------------------------------------------- features

    def _measure(
        self,
        kind: FeatureKind,
        batch: Batch,
        rows: Tensor,
        lengths: Sequence[int] | None,
        step: int,
        lane: int,
        *,
        project: bool,
    ) -> Tensor:
        """Measure features of `rows`: [len(rows), *shape] of the kind, or [len(rows), dim] if `project` is set."""
        fixed = kind.one_direction or not self.history.plain  # a history needs the same directions at every step
        generator = self._generator("probes", 0 if fixed else step, 0 if fixed else lane)
        directions = torch.randn(kind.directions(self.probes), *self.target.shape, generator=generator)
        directions = directions.to(self.target.parameter.device)
        flat = self.target.numel if self.dim is None else min(self.dim, self.target.numel)
        shape = (flat,) if project else kind.measured(self.target, self.probes)
        found = torch.zeros(len(rows), *shape, device=directions.device)
        with evaluating(self.model):
            for places, piece in self._pieces(batch, rows, lengths):
                part = kind.measure(self.model, self.losses, piece, self.target, directions, eps=self.eps)
                found[places.to(found.device)] = self._project(part) if project else part
        found = self._of_all(found)
        return found[:, :, None] * directions if kind.one_direction else found

    def _pieces(self, batch: Batch, rows: Tensor, lengths: Sequence[int] | None) -> Any:
        """Yield the positions and the rows of each micro-batch that this process passes through the model."""
        some = {key: tensor[rows.to(tensor.device)] for key, tensor in batch.items()}
        found = pieces(some, None if lengths is None else [lengths[i] for i in rows.tolist()], self.token_budget)
        return found if self.group is None else islice(found, self.group.rank(), None, self.group.size())

    def _of_all(self, found: Tensor) -> Tensor:
        """Sum over processes: each row is zero in all processes but one, so the sum is exact and the same in all."""
        if self.group is not None:
            all_reduce(found, group=self.group)
        return found

    def _project(self, grads: Tensor) -> Tensor:
        """Flatten gradients [n, *shape] to [n, d], projected if they have more than `dim` numbers."""
        if self.dim is None or grads[0].numel() <= self.dim:
            return grads.reshape(len(grads), -1)
        sketch = PROJECTORS["sjlt"].of({_NAME: grads.shape[1:]}, dim=self.dim, seed=self.seed)
        return sketch.project({_NAME: grads})

    def _generator(self, purpose: str, step: int, lane: int) -> torch.Generator:
        """Create a generator from the seed, the purpose, the step and the lane."""
        ticket = f"coreset\0{purpose}\0{self.seed}\0{step}\0{lane}"
        return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(ticket.encode()) >> 1)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the next choices depend on besides the model.

        Returns:
            The tensors of the history by name, and the count of overflows.

        """
        state = {} if self.history.plain else {k: v.detach().clone() for k, v in self.history.state.items()}
        return state | {"overflows": torch.tensor(self.overflows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state.

        Args:
            state: result of `state_dict`.

        Raises:
            DataError: if it was saved with other settings.

        """
        own = self.state_dict()
        wrong = [k for k in sorted(own.keys() | state.keys()) if k not in own or k not in state
                 or own[k].shape != state[k].shape]  # fmt: skip
        if wrong:
            raise DataError(
                f"coreset: the saved history does not match ({', '.join(wrong)}); it was saved with other settings"
            )
        self.overflows = int(state["overflows"])
        if not self.history.plain:
            self.history.state = {k: state[k].to(v.dtype) for k, v in self.history.state.items()}


def kept_by_source(sources: Sequence[Hashable], selection: Selection) -> dict[str, int]:
    """Count the selected rows of each source.

    Args:
        sources: the source of each row of the batch.
        selection: the selected rows.

    Returns:
        Source, as text -> number of rows; sources without selected rows are omitted.

    Example:
        >>> kept_by_source(["web", "code", "web"], Selection(torch.tensor([0, 2])))
        {'web': 2}

    """
    return by_source(sources, selection.indices)
