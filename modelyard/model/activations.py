"""The functions between the two halves of a feed-forward, by the names that configs have for them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from modelyard.config.architecture import Activation


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": _gelu,
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "squared_relu": _squared_relu,
    "identity": _identity,
}
"""`gelu` is the tanh formula, `gelu_exact` the one with the error function (both arXiv 1606.08415); `squared_relu` is
relu(x)^2 (arXiv 2109.08668). Each [...] -> [...], in the dtype of its input."""
