"""An embedding that trains well beside 8-bit states, and param groups that keep its state in full precision."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class StableEmbedding(nn.Embedding):
    """An embedding that trains well beside 8-bit states: Xavier-uniform weights, and a LayerNorm over each vector.

    The norm is computed in torch's default dtype and the output cast back to the weight's. Its state should be kept
    in full precision: `stable_embedding_groups`.
    Source: Dettmers et al. 2021, arXiv 2110.02861, section 2.3; bitsandbytes.nn.StableEmbedding.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, seed: int = 0, **kwargs: Any) -> None:
        self.seed = seed
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self.norm = nn.LayerNorm(embedding_dim, device=kwargs.get("device"))

    def reset_parameters(self) -> None:
        """Xavier-uniform, drawn from `seed`; the padding vector is zero."""
        if not self.weight.is_meta:
            generator = torch.Generator(self.weight.device).manual_seed(self.seed)
            with torch.no_grad():
                bound = (6 / sum(self.weight.shape)) ** 0.5
                self.weight.uniform_(-bound, bound, generator=generator)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] -> vectors [..., embedding_dim] in the weight's dtype."""
        norm, dtype = self.norm, torch.get_default_dtype()
        weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)  # `model.bfloat16()` makes them narrow too
        vectors = super().forward(input).to(dtype)
        return functional.layer_norm(vectors, norm.normalized_shape, weight, bias, norm.eps).to(self.weight.dtype)


def stable_embedding_groups(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...] = StableEmbedding
) -> list[dict[str, Any]]:
    """Param groups for a rule with 8-bit states: the weights of such modules keep theirs in full precision.

        AdamW8bit(stable_embedding_groups(model), lr=1e-3)

    kinds: ``torch.nn.Embedding`` keeps those of all embeddings. Parameters that do not train are left out.
    """
    kept = {id(m.weight) for m in model.modules() if isinstance(m, kinds) and isinstance(m.weight, Tensor)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [entry for entry in named if id(entry[1]) not in kept]},
        {"params": [entry for entry in named if id(entry[1]) in kept], "min_size": 2**62},
    ]
    return [group for group in groups if group["params"]]
