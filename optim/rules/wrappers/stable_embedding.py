"""An embedding that trains well with 8-bit states, and param groups that keep its state in full precision."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StableEmbedding(nn.Embedding):
    """An embedding that trains well with 8-bit states: Xavier-uniform weights, and a LayerNorm over each vector.

    The norm is computed in torch's default dtype, and the output is cast back to the dtype of the weights. The
    embedding's optimizer state should be kept in full precision: see `stable_embedding_groups`.

    Args:
        num_embeddings: The number of vectors.
        embedding_dim: The length of a vector.
        seed: The seed of the initial weights.
        **kwargs: The remaining keywords of `torch.nn.Embedding`.

    Source:
        Dettmers et al. 2021, arXiv 2110.02861, section 2.3; bitsandbytes.nn.StableEmbedding.

    Example:
        >>> from optim import StableEmbedding
        >>> StableEmbedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, seed: int = 0, **kwargs: Any) -> None:
        self.seed = seed
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=kwargs.get("device"))

    def reset_parameters(self) -> None:
        """Draw Xavier-uniform weights from `seed`, with a zero padding vector."""
        if not self.weight.is_meta:
            generator = torch.Generator(self.weight.device).manual_seed(self.seed)
            with torch.no_grad():
                bound = (6 / sum(self.weight.shape)) ** 0.5
                self.weight.uniform_(-bound, bound, generator=generator)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """Map ids to vectors.

        Args:
            input: Ids of any shape [...], int64.

        Returns:
            Vectors [..., embedding_dim] in the dtype of the weights.
        """
        norm, dtype = self.norm, torch.get_default_dtype()
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)  # `model.bfloat16()` converts them as well
        vectors = super().forward(input).to(dtype)
        return functional.layer_norm(vectors, norm.normalized_shape, weight, bias, norm.eps).to(self.weight.dtype)


def stable_embedding_groups(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...] = StableEmbedding
) -> list[dict[str, Any]]:
    """Return param groups for a rule with 8-bit states in which embeddings keep their state in full precision.

    Args:
        model: The model. Parameters that are not trained are omitted.
        kinds: The modules whose weights keep full precision; ``torch.nn.Embedding`` for all embeddings.

    Returns:
        The param groups that have parameters.

    Example:
        >>> from optim import AdamW8bit, StableEmbedding, stable_embedding_groups
        >>> model = torch.nn.Sequential(StableEmbedding(10, 4), torch.nn.Linear(4, 4))
        >>> optimizer = AdamW8bit(stable_embedding_groups(model), lr=1e-3)
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [4, 1]
    """
    kept = {id(m.weight) for m in model.modules() if isinstance(m, kinds) and isinstance(m.weight, Tensor)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [entry for entry in named if id(entry[1]) not in kept]},
        {"params": [entry for entry in named if id(entry[1]) in kept], "min_size": 2**62},
    ]
    return [group for group in groups if group["params"]]
