"""By-products of a training pass: features of the rows that are trained on, at almost no cost.

While a step runs forward and backward, hooks read what passes by: the input and the output gradient of the last value
projection, whose product is a row's gradient, or the logits, or the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from datatools.colm.logits import head_of, logit_numbers, supervised
from datatools.colm.target import Target
from datatools.errors import DataError, UsageError


class ByProducts:
    """Collects features of rows while they are trained on.

    Inside `watching`, call `watch` between the forward and the backward pass of each micro-batch. The gradient of a row
    is that of the mean loss of its supervised tokens, whatever its weight in the step's loss: it is divided by the
    factor with which that loss went backward. Dropout is that of training.

    Args:
        model: the model that is trained, without the wrappers of DDP and torch.compile.
        target: the matrix whose gradients are read.
        project: gradients [b, outputs, inputs] -> features [b, d].

    Attributes:
        seconds: the time that collecting has taken since `watching` began; on a GPU, that of starting it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from datatools import LastLayer
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> seen = GradientByProducts(model, LastLayer.of(model), lambda grads: grads.flatten(1))
        >>> with seen.watching():
        ...     logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, :-1]
        ...     losses = nn.functional.cross_entropy(logits, torch.tensor([2, 3]), reduction="none")
        ...     seen.watch([7], losses, torch.tensor([0, 0]))
        ...     losses.mean().backward()
        >>> numbers, features = seen.taken()
        >>> numbers, features.shape
        ([7], torch.Size([1, 256]))

    """

    name: ClassVar[str]
    kind: ClassVar[str] = ""
    """The kind of features (`CORESET_FEATURES`) that it stands for; empty for gradients."""

    def __init__(self, model: nn.Module, target: Target, project: Callable[[Tensor], Tensor]) -> None:
        self.model, self.target, self.project = model, target, project
        self.seconds = 0.0
        self._found: list[tuple[list[int], Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the hooks for the passes of one step."""
        self._found, self.seconds = [], 0.0
        with ExitStack() as hooks:
            for handle in self._hooks():
                hooks.callback(handle.remove)
            yield

    def watch(
        self,
        numbers: Sequence[int],
        losses: Float[Tensor, " n"],
        where: Int64[Tensor, " n"],
        labels: Int64[Tensor, "b s"] | None = None,
    ) -> None:
        """Collect the by-products of the micro-batch whose forward pass has just ended.

        Args:
            numbers: the row numbers of its rows [b].
            losses: the loss of each supervised token, or the mean of each row, in the graph of the step's loss.
            where: the row of each, int64 [n], counted within the micro-batch.
            labels: the labels of the micro-batch, where the head made logits at all positions.

        """
        raise NotImplementedError

    def taken(self) -> tuple[list[int], Float[Tensor, "m d"]]:
        """Return the features of the rows that were watched since `watching` began.

        Returns:
            The row numbers [m], and their features, float32 [m, d]; NaN for a row without weight in the loss.

        Raises:
            DataError: if there are none, although rows were watched.

        """
        numbers = [number for part, _ in self._found for number in part]
        features = [found for _, found in self._found]
        return numbers, torch.cat(features) if features else torch.zeros(0, 1)

    def _hooks(self) -> list[Any]:
        return []


class LossByProducts(ByProducts):
    """The mean loss of each row's supervised tokens."""

    name, kind = "loss", "row_loss"

    def watch(
        self,
        numbers: Sequence[int],
        losses: Float[Tensor, " n"],
        where: Int64[Tensor, " n"],
        labels: Int64[Tensor, "b s"] | None = None,
    ) -> None:
        """See `ByProducts.watch`.

        Args:
            numbers: the row numbers of its rows.
            losses: the loss of each supervised token.
            where: the row of each.
            labels: not used.

        """
        total = torch.zeros(len(numbers), device=losses.device).index_add(0, where, losses.detach().float())
        mean = total / torch.bincount(where, minlength=len(numbers)).clamp_min(1)
        self._found.append((list(numbers), mean[:, None]))


class LogitByProducts(ByProducts):
    """The nuclear norm and a projection of each row's logits (`logit_numbers`)."""

    name = kind = "logits"

    def _hooks(self) -> list[Any]:
        self._logits: list[Tensor] = []
        keep = self._logits

        def seen(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            keep[:] = [output.detach()]

        return [head_of(self.model).register_forward_hook(seen)]

    def watch(
        self,
        numbers: Sequence[int],
        losses: Float[Tensor, " n"],
        where: Int64[Tensor, " n"],
        labels: Int64[Tensor, "b s"] | None = None,
    ) -> None:
        """See `ByProducts.watch`.

        Args:
            numbers: the row numbers of its rows.
            losses: not used.
            where: the row of each supervised token.
            labels: the labels, where the head made logits at all positions.

        """
        began = perf_counter()
        output = self._logits.pop()
        logits = output if labels is None else supervised(output, labels)
        if labels is not None:
            where = (labels[:, 1:] != -100).nonzero()[:, 0]
        with torch.no_grad():
            self._found.append((list(numbers), logit_numbers(logits, where, len(numbers))))
        self.seconds += perf_counter() - began


class GradientByProducts(ByProducts):
    """The gradient of each row with respect to the target's matrix, projected.

    Args:
        model: the model that is trained.
        target: the matrix; its gradient must be a product of its inputs and output gradients.
        project: gradients [b, outputs, inputs] -> features [b, d].

    """

    name = "gradient"

    def __init__(self, model: nn.Module, target: Target, project: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model, target, project)
        if not target.product:
            raise UsageError(
                f"coreset: the gradients of {target.name} in {type(model).__name__} are no products of its inputs and "
                "output gradients, so that a training step does not show them row by row; choose by logits or losses "
                "(coreset.by_product), or measure them (coreset.features: exact)"
            )
        self._sums: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        self._now = -1

    def _hooks(self) -> list[Any]:
        self._sums, self._now = {}, 0
        self._factors = {}
        return [projection.register_forward_hook(self._forward, with_kwargs=True) for projection in self.target.sharing]

    def _forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach().clone()  # some models change it in place

        def backward(grad: Tensor) -> None:
            began = perf_counter()
            with torch.no_grad():
                part = self._now - 1  # at this time, not at that of the forward pass, which checkpointing repeats
                found = self.target.contract(x, grad)
                self._sums[part] = self._sums[part] + found if part in self._sums else found
            self.seconds += perf_counter() - began

        output.register_hook(backward)  # type: ignore[no-untyped-call]

    def watch(
        self,
        numbers: Sequence[int],
        losses: Float[Tensor, " n"],
        where: Int64[Tensor, " n"],
        labels: Int64[Tensor, "b s"] | None = None,
    ) -> None:
        """See `ByProducts.watch`.

        Args:
            numbers: the row numbers of its rows.
            losses: the loss of each supervised token, in the graph of the step's loss.
            where: the row of each.
            labels: not used.

        """
        part, rows = self._now, len(numbers)
        self._found.append((list(numbers), torch.zeros(0)))
        self._now += 1

        def factor(grad: Tensor) -> None:  # d(step's loss) / d(loss of the token): weight, scaling and all
            self._factors[part] = torch.zeros(rows, device=grad.device).index_add(0, where, grad.detach().float())

        losses.register_hook(factor)  # type: ignore[no-untyped-call]

    def taken(self) -> tuple[list[int], Float[Tensor, "m d"]]:
        """See `ByProducts.taken`.

        Returns:
            The row numbers and their features.

        Raises:
            DataError: if no gradient reached the target's matrix.

        """
        began = perf_counter()
        numbers: list[int] = []
        features: list[Tensor] = []
        for part, (rows, _) in enumerate(self._found):
            if part not in self._factors:
                continue  # this part did not go backward
            if part not in self._sums or len(self._sums[part]) != len(rows):
                raise DataError(
                    f"coreset: no gradient of {self.target.name} was seen while {type(self.model).__name__} trained; "
                    "nothing before it trains, or the model is compiled: use coreset.features=exact"
                )
            scale = self._factors[part].masked_fill(self._factors[part] == 0, torch.nan)  # no weight: not known
            numbers += rows
            features.append(self.project(self._sums.pop(part) / scale[:, None, None]))
        self._factors = {}
        self.seconds += perf_counter() - began
        return numbers, torch.cat(features) if features else torch.zeros(0, 1)


BY_PRODUCTS: Mapping[str, type[ByProducts]] = {
    made.name: made for made in (GradientByProducts, LogitByProducts, LossByProducts)
}
"""Values of `coreset.by_product`."""
