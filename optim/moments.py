"""The tensors that states consist of: moments, scalars and step counts, with the dtypes that rules share."""

import torch
from torch import Tensor


def moment_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of running averages: float32 for parameters of 16 bits or fewer, otherwise the parameter's own.

    The increment (1 - b2) g^2 of a second moment is below the resolution of bfloat16, so that a 16-bit moment would not
    change.

    Args:
        param: The parameter.

    Returns:
        The dtype.
    """
    return torch.promote_types(param.dtype, torch.float32)


def zero_moment(param: Tensor) -> Tensor:
    """Return a zero tensor of the parameter's shape, device and layout, with the dtype `moment_dtype(param)`.

    Args:
        param: The parameter, of any shape.

    Returns:
        A new tensor of the same shape.
    """
    return torch.zeros_like(param, dtype=moment_dtype(param), requires_grad=False)


def with_l2(grad: Tensor, param: Tensor, l2: float) -> Tensor:
    """Return the gradient of the loss with the penalty l2 / 2 |p|^2, which is torch's form of weight decay.

    Args:
        grad: The gradient of the loss.
        param: The parameter, of the same shape.
        l2: The factor of the parameter.

    Returns:
        The gradient itself if the factor is 0.
    """
    return grad + l2 * param.to(grad.dtype) if l2 != 0 else grad


def scalar_moment(param: Tensor, value: float = 0.0) -> Tensor:
    """Return one number for a whole tensor; it is equal on every rank of a DTensor.

    Args:
        param: The parameter, of any shape.
        value: The number.

    Returns:
        A new 0-d tensor with the dtype `moment_dtype(param)` on the parameter's device.
    """
    return param.new_full((), value, dtype=moment_dtype(param), requires_grad=False)


def scalar_setting(param: Tensor) -> Tensor:
    """Return the entry of a state for a setting of the group that `UpdateRule.reads` names.

    Args:
        param: The parameter, of any shape.

    Returns:
        A 0-d zero tensor with the dtype `moment_dtype(param)`, on the CPU.
    """
    return torch.zeros((), dtype=moment_dtype(param), device="cpu")


def zero_step() -> Tensor:
    """Return a step count of 0.

    Returns:
        A float32 scalar on the CPU, as in torch, so that reading it never waits for a GPU.
    """
    return torch.zeros((), dtype=torch.float32, device="cpu")


def correction(beta: float | Tensor, step: Tensor) -> Tensor:
    """Return Adam's bias correction 1 - beta^step; float32 would lose digits that float64 parameters show.

    Args:
        beta: The decay rate of a running average.
        step: The number of steps, a scalar.

    Returns:
        A float64 scalar.
    """
    return 1 - beta ** step.double()
