"""Tensors that are split among processes (DTensor, as FSDP2 makes them)."""

from collections.abc import Iterable

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them; `torch.distributed.tensor` is not imported for the question."""
    return hasattr(x, "placements")


def sharded_as(like: Tensor, x: Tensor) -> Tensor:
    """Return x with the shards of `like`; `copy_` does not make them where there are fewer rows than ranks."""
    if not is_sharded(like) or not is_sharded(x) or x.placements == like.placements:  # type: ignore[attr-defined]
        return x
    found: Tensor = x.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return found


def replicated(x: Tensor) -> Tensor:
    """Return a DTensor with all its rows on every rank, for operations that have no form for uneven shards."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    found: Tensor = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)  # type: ignore[attr-defined]
    return found


def largest(x: Tensor) -> Tensor:
    """Return max |x| of the whole tensor, 0-d; 0 for no entries, which a rank may have of a DTensor."""
    if not is_sharded(x):
        return x.abs().amax() if x.numel() else x.sum()
    from torch.distributed.tensor import DTensor, Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    own = largest(x.to_local())  # type: ignore[attr-defined]
    return replicated(DTensor.from_local(own, mesh, [Partial("max")] * mesh.ndim))


def check_whole(rule: str, tensors: Iterable[Tensor]) -> None:
    """Check that no tensor is sharded, for rules whose operations have no form for shards.

    Raises:
        TypeError: If one is.
    """
    if any(map(is_sharded, tensors)):
        raise TypeError(
            f"{rule}: a parameter is sharded (DTensor), and its step needs whole matrices; "
            "wrap the optimizer in optim.distributed.OwnerComputes"
        )
