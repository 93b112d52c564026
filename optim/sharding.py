"""Tensors that are distributed over processes (DTensor, as FSDP2 creates them)."""

from collections.abc import Iterable

from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing `torch.distributed.tensor`.

    Args:
        x: The tensor.

    Returns:
        True for a DTensor.
    """
    return hasattr(x, "placements")


def sharded_as(like: Tensor, x: Tensor) -> Tensor:
    """Return x with the shards of `like`, which `copy_` does not create if there are fewer rows than ranks.

    Args:
        like: A tensor of the same shape, sharded or not.
        x: The tensor.

    Returns:
        x itself if nothing has to be moved.
    """
    if not is_sharded(like) or not is_sharded(x) or x.placements == like.placements:  # type: ignore[attr-defined]
        return x
    found: Tensor = x.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return found


def replicated(x: Tensor) -> Tensor:
    """Return a DTensor with all its rows on every rank, for operations that do not support uneven shards.

    Args:
        x: The tensor, sharded or not.

    Returns:
        x itself if it is not sharded.
    """
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    found: Tensor = x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)  # type: ignore[attr-defined]
    return found


def largest(x: Tensor) -> Tensor:
    """Return max |x| over the whole tensor.

    Args:
        x: The tensor, sharded or not.

    Returns:
        A 0-d tensor; 0 if there are no entries, as a rank may have none of a DTensor.
    """
    if not is_sharded(x):
        return x.abs().amax() if x.numel() else x.sum()
    from torch.distributed.tensor import DTensor, Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    own = largest(x.to_local())  # type: ignore[attr-defined]
    return replicated(DTensor.from_local(own, mesh, [Partial("max")] * mesh.ndim))


def check_whole(rule: str, tensors: Iterable[Tensor]) -> None:
    """Check that no tensor is sharded, for rules whose operations do not support shards.

    Args:
        rule: The name of the rule, for the message.
        tensors: The tensors.

    Raises:
        TypeError: If one is sharded.
    """
    if any(map(is_sharded, tensors)):
        raise TypeError(
            f"{rule}: a parameter is sharded (DTensor), but its step needs whole matrices; "
            "wrap the optimizer in optim.distributed.OwnerComputes"
        )
