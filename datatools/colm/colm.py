"""CoLM: small mini-batches that stand for large ones, chosen inside the training loop.

Before each optimizer step a large batch is drawn; rows of small sources are all kept, and of each large source so many
rows are chosen that the batch has its small size. The choice reads each row's gradient of one matrix, the last value
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
"""What `coreset.features` can be, by name."""
_NAME = "features"


@dataclass(frozen=True)
class Chosen:
    """One choice, the plan behind it, and how well it and random ones match the batch's gradient, where watched.

    watch_seconds: what measuring that took beside the choice itself.
    """

    selection: Selection
    plan: Plan
    match_error: float | None = None
    match_error_random: float | None = None
    watch_seconds: float = 0.0


class CoLM:
    """Chooses `keep` rows of a large batch: `colm(batch, sources, step=t)` gives a `Selection` (indices, weights).

    model: any decoder of transformers, with or without LoRA. Only its outputs are read: no weight, gradient, mode or
    global generator is changed, also when an error is raised.
    losses: (model, batch) -> mean loss of each row's supervised tokens [n]; `pipelines.models.losses.row_losses`.
    keep: rows kept of each large batch; a call may say otherwise.
    small: sources whose rows are all kept (`small_sources`).
    features: "exact", each row's gradient of the last value projection (LoRA's B, or the weight), one forward pass and
    a backward pass through the last layer; "probes", `probes` derivatives along random directions, forward passes of
    the last layer only; "paper_code", one direction for the whole run times its central difference, the published
    recipe, whose features are all collinear.
    method: a name of `CORESET_METHODS`. metric: l1, l2 or cosine; facility location only.
    rule: what stands between gradients and features: "none", "adam" (betas 0.9 and 0.999, eps 1e-8, a `History` of its
    own), or any elementwise `UpdateRule`; "auto" is adam for facility location and none for the others.
    dim: facility location keeps so many coordinates (`sparsify`), the others project to so many numbers (SJLT), where
    there are more; None keeps all.
    history: "selected", only chosen rows of large sources move the rule's state, or "all" rows of large sources.
    per_source: choose within each large source by quotas; False chooses among all of them at once.
    token_budget: padded tokens a forward pass; changes features by rounding only. projection: `LastLayer.of`.
    seed: of everything random; the same seed, step and lane give the same choice, whatever happened before.
    group: processes that all hold the same batch: each makes its share of the passes, and all get the same choice, that
    of one process. None: this process alone.

    Memory: 4 bytes x rows x coordinates for features (x numel of the matrix while a rule with state reads them), and
    the activations of the last layer and the head for `token_budget` tokens.
    Source: Nguyen et al. 2025, arXiv 2407.19580. Differs: the default method is herding on exact gradients, because the
    published feature is one number a row (one direction for all rows and steps), and medoids do not aim at the mean;
    losses are means over a row's own tokens; randomness is private; when small sources overflow, they are drawn by
    quotas; each process chooses among its own rows, where the published code gathers them, unless `group` holds one
    batch; the activations of the choosing pass are not kept for training, which would take the memory of all rows.
    Raises: UsageError for settings that do not exist; DataError for a model in which `LastLayer.of` finds nothing. A
    call raises UsageError for a batch smaller than `keep`, DataError for rows without a supervised token or with a loss
    that is not finite.
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
            model = inner  # torch.compile and DDP: the choice reads layers inside, whose hooks they do not see
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
        """Rows of `batch` to train on: indices (small sources first) and weights, which are 1 but for matching pursuit.

        batch: what the model and `losses` take, tensors with one row an example: input_ids, labels, attention_mask, ...
        sources: the source of each row; None is one source for all.
        step, lane: which choice this is; lanes are micro-batches and ranks of one step.
        names: what errors call each row; None is its place in the batch.
        watch: also measure how well the choice, and random ones, match the whole batch (`last.match_error`).
        """
        if missing := [key for key in ("input_ids", "labels") if key not in batch]:
            raise UsageError(f"coreset: the batch has no {missing[0]!r}, it has {sorted(batch)}; give both")
        n = len(batch["input_ids"])
        if sources is None:
            sources = [0] * n
        named: list[Hashable] = sources.tolist() if isinstance(sources, Tensor) else list(sources)
        for what, given in (("sources", named), ("names", names), ("lengths", lengths)):
            if given is not None and len(given) != n:
                raise UsageError(f"coreset: {len(given)} {what} for a batch of {n} rows; expected one a row")
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
        """The choice, and the plain gradients [n, d] of all rows if `everything` was asked for and it read any."""
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
        """Features of `rows`, [len(rows), *shape] of the kind, or [len(rows), dim] projected piece by piece."""
        fixed = kind.one_direction or not self.history.plain  # one history needs the same directions
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
        """The parts of the batch that this process passes through the model, of all in turn, and their places."""
        some = {key: tensor[rows.to(tensor.device)] for key, tensor in batch.items()}
        found = pieces(some, None if lengths is None else [lengths[i] for i in rows.tolist()], self.token_budget)
        return found if self.group is None else islice(found, self.group.rank(), None, self.group.size())

    def _of_all(self, found: Tensor) -> Tensor:
        """Rows that this process has left at zero come from the others: the sum is exact, and the same on all."""
        if self.group is not None:
            all_reduce(found, group=self.group)
        return found

    def _project(self, grads: Tensor) -> Tensor:
        """[n, *shape] -> [n, d]: as they are, or projected where there are more than `dim` numbers."""
        if self.dim is None or grads[0].numel() <= self.dim:
            return grads.reshape(len(grads), -1)
        sketch = PROJECTORS["sjlt"].of({_NAME: grads.shape[1:]}, dim=self.dim, seed=self.seed)
        return sketch.project({_NAME: grads})

    def _generator(self, purpose: str, step: int, lane: int) -> torch.Generator:
        """A generator that is a function of the seed, the purpose, the step and the lane."""
        ticket = f"coreset\0{purpose}\0{self.seed}\0{step}\0{lane}"
        return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(ticket.encode()) >> 1)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """What the next choices depend on besides the model: the history's tensors, by name; empty without one."""
        state = {} if self.history.plain else {k: v.detach().clone() for k, v in self.history.state.items()}
        return state | {"overflows": torch.tensor(self.overflows)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state. Raises: DataError if it is of other settings."""
        own = self.state_dict()
        wrong = [k for k in sorted(own.keys() | state.keys()) if k not in own or k not in state
                 or own[k].shape != state[k].shape]  # fmt: skip
        if wrong:
            raise DataError(f"coreset: the saved history does not fit ({', '.join(wrong)}); it is of other settings")
        self.overflows = int(state["overflows"])
        if not self.history.plain:
            self.history.state = {k: state[k].to(v.dtype) for k, v in self.history.state.items()}


def kept_by_source(sources: Sequence[Hashable], selection: Selection) -> dict[str, int]:
    """Rows kept of each source, by name."""
    return by_source(sources, selection.indices)
