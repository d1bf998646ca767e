"""The parameters twice: as the optimizer keeps them and as the model computes with them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
from torch import nn

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def master_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What the optimizer keeps of parameters that are computed with in `compute_dtype`."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@torch.no_grad()
def set_dtypes(model: nn.Module, compute_dtype: torch.dtype, narrow: Collection[str] = ()) -> None:
    """Give every parameter the masters' dtype, those named by `narrow` the one to compute with: frozen ones of which there is
    to be no second copy."""
    wide = master_dtype(compute_dtype)
    for name, parameter in model.named_parameters():
        cast = parameter.detach().to(compute_dtype if name in narrow else wide)
        if cast.dtype != parameter.dtype:
            if hasattr(parameter, "to_local"):
                # As modules do it: a part of a split tensor has a part's dtype inside, which `.data` would not reach.
                torch.utils.swap_tensors(parameter, nn.Parameter(cast, requires_grad=parameter.requires_grad))
            else:
                parameter.data = cast


class Weights:
    """Master weights in fp32 (fp64 in an fp64 run) beside the model's own in the compute dtype.

    Where both dtypes agree there is one set of tensors and nothing is copied. Otherwise the model's parameters are
    the compute copies, refreshed by `publish` once an optimizer step, and each micro-batch's gradient is added to
    the master's fp32 gradient as soon as it is complete, so that no second set of compute gradients is ever alive.
    Frozen parameters that come in the compute dtype have no master beside them.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype):
        self.compute: dict[str, nn.Parameter] = dict(model.named_parameters())
        single = {n for n, p in self.compute.items() if not p.requires_grad and p.dtype == compute_dtype}
        set_dtypes(model, compute_dtype, narrow=single)
        if compute_dtype == master_dtype(compute_dtype):
            self.master = self.compute
            return
        self.master = {
            name: p if name in single else nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for name, p in self.compute.items()
        }
        set_dtypes(model, compute_dtype, narrow=self.compute)
        self._doubled = [name for name in self.compute if name not in single]
        for name, parameter in self.compute.items():
            if not parameter.requires_grad:
                continue  # frozen
            parameter.register_post_accumulate_grad_hook(_accumulate_into(self.master[name]))

    def freeze(self, names: Iterable[str]) -> None:
        """No gradients for these parameters: they keep their values."""
        for name in names:
            self.compute[name].requires_grad_(False)

    def copies_of_masters(self) -> dict[str, torch.Tensor]:
        """What `publish` writes, by name."""
        if self.master is self.compute:
            return {}
        return {name: self.compute[name].detach() for name in self._doubled}

    def publish(self, *, but: Collection[str] = ()) -> None:
        """Cast the master weights to the compute dtype, `but` those that are cast already; the one cast of a step."""
        names = set(but)
        copies = {name: copy for name, copy in self.copies_of_masters().items() if name not in names}
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(list(copies.values()), [self.master[name] for name in copies])

    def before_backward(self, *, last: bool) -> None:
        """Called before each micro-batch; `last` of a step. One process has nothing to wait with."""

    def finish_backward(self, model: nn.Module) -> None:
        """Called after a backward that did not go into `model`. One process has nothing to do at its end."""

    def finish_gradients(self) -> None:
        """Called once a step, after its last backward. Raises RuntimeError where a trained parameter has no gradient."""
        require_gradients((name, self.master[name]) for name, p in self.compute.items() if p.requires_grad)

    def gradients(self) -> list[torch.Tensor]:
        """The master gradients that exist, in the order of the parameters."""
        return [p.grad for p in self.master.values() if p.grad is not None]

    def square_norm(self) -> torch.Tensor:
        """The squared L2 norm of the whole gradient, fp64."""
        return torch.stack(torch._foreach_norm(self.gradients())).double().square().sum()

    def zero_gradients(self) -> None:
        for parameter in self.master.values():
            parameter.grad = None


def require_gradients(trained: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise RuntimeError naming the parameters without a gradient: they would keep their values, and no number of the step
    would tell. A step without trained tokens has gradients all the same, of zeros."""
    missing = [name for name, parameter in trained if parameter.grad is None]
    if missing:
        names = f"{missing[0]} (and {len(missing) - 1} more)" if len(missing) > 1 else missing[0]
        raise RuntimeError(f"no gradient for {names}, although it is trained: a mistake in the program")


def wide_gradient_taker(weights: object, parameter: torch.Tensor) -> Callable[[torch.Tensor], None] | None:
    """What takes a gradient that was summed in the master's dtype already, past autograd; None where autograd must.

    Autograd gives a parameter's gradient in the parameter's dtype: the head's, the largest of all, would be narrowed
    and widened again. Only the plain tensors of `Weights` have this way; a sharded parameter's gradient has to pass
    through the hooks that reduce it, a frozen one has none, and where both dtypes agree autograd keeps it as it is.
    """
    if not isinstance(weights, Weights) or weights.master is weights.compute or not parameter.requires_grad:
        return None
    name = next((name for name, p in weights.compute.items() if p is parameter), None)
    return None if name is None else partial(_add_gradient, weights.master[name])


def _add_gradient(master: nn.Parameter, gradient: torch.Tensor) -> None:
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)


def _accumulate_into(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:  # None: all of it took the way past autograd
            _add_gradient(master, gradient)

    return add
