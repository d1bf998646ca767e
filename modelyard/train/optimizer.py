"""AdamW on named parameters, with weight decay only on matrices."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from modelyard import kernels
from modelyard.train.blockwise import Blockwise

MOMENTS = ("exp_avg", "exp_avg_sq")
LEAST_NARROW = 4096
"""Parameters with fewer values keep their moments in fp32 whatever is asked: norms and biases, which weigh nothing."""


class Optimizer:
    """AdamW (arXiv 1711.05101) whose state is addressed by parameter name.

    Weight decay applies to matrices (embeddings included) and not to norms and biases. All parameters share one
    count of steps, `steps`: the number of successful updates, which the bias correction uses. `scales` are factors on
    the learning rate by name (1 where none is given); a parameter whose factor is 0 is frozen, and has no moments.
    `state` is how moments are kept: `float32` is `torch.optim.AdamW`, fused where torch has it for the device; `8bit`
    narrows them between steps, and the step itself is computed as wide. Where `modelyard.kernels.available` says so, a
    kernel takes the place of `torch.optim.AdamW`, whose state stays as that has it.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
        scales: Mapping[str, float] | None = None,
        state: Literal["float32", "8bit"] = "float32",
    ):
        scales = scales or {}
        self._betas, self._epsilon = betas, epsilon
        self.published: Collection[str] = ()
        """The parameters whose copies the last step wrote along with them."""
        self.trained = {name: p for name, p in parameters.items() if scales.get(name, 1.0) != 0}
        """The parameters that have moments."""
        self._narrow: dict[str, _NarrowAdamW] = {}
        self._factors: dict[str, tuple[float, float]] = {}
        """Of what has wide moments: the factor on the learning rate, and the weight decay."""
        members: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, p in self.trained.items():
            scale, decay = scales.get(name, 1.0), weight_decay if p.dim() >= 2 else 0.0
            if state == "8bit" and p.numel() >= LEAST_NARROW:
                self._narrow[name] = _NarrowAdamW(p, scale=scale, decay=decay, betas=betas, epsilon=epsilon)
            else:
                members.setdefault((p.dim() >= 2, scale), []).append(p)
                self._factors[name] = scale, decay
        groups = [
            {"params": group, "weight_decay": weight_decay if decayed else 0.0, "scale": scale}
            for (decayed, scale), group in members.items()
        ]
        # A process of a pipeline may have nothing but frozen layers; torch wants a group all the same.
        groups = groups or [{"params": [], "scale": 1.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        self.steps = 0

    def step(
        self,
        learning_rate: float,
        *,
        factor: float = 1.0,
        copies: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Update every parameter from `factor` times its `.grad`, which may be multiplied in place.

        `copies`, by name, are in another dtype; a kernel writes them, too, and `published` says which have been.
        """
        self.steps += 1
        wide = [name for name in self._factors if self.trained[name].grad is not None]
        by_kernel = bool(wide) and kernels.available(*self._pairs(wide))
        if factor != 1.0 and (left := self._gradients(self._narrow if by_kernel else self.trained)):
            torch._foreach_mul_(left, factor)
        self.published = ()
        if by_kernel:
            self._step_by_kernel(wide, learning_rate, factor, copies or {})
        else:
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate * group["scale"]
            self.adamw.step()
        for narrow in self._narrow.values():
            narrow.step(learning_rate, self.steps)

    def _gradients(self, names: Collection[str]) -> list[Tensor]:
        return [g for name in names if (g := self.trained[name].grad) is not None]

    def _pairs(self, names: Collection[str]) -> list[Tensor]:
        """Parameters and their gradients."""
        return [self.trained[name] for name in names] + self._gradients(names)

    def _step_by_kernel(
        self, names: list[str], learning_rate: float, factor: float, copies: Mapping[str, Tensor]
    ) -> None:
        from modelyard.kernels.adamw import Update, adamw_

        updates, counts = [], []
        for name in names:
            parameter = self.trained[name]
            assert parameter.grad is not None
            state = self.adamw.state[parameter]
            if not state:  # the first step; as torch.optim.AdamW has it
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS}
            counts.append(state["step"])
            mean, square = (state[moment] for moment in MOMENTS)
            factors, copy = self._factors[name], copies.get(name)
            updates.append(Update(parameter.detach(), parameter.grad, mean, square, copy, *factors))
        adamw_(
            updates,
            rate=learning_rate,
            factor=factor,
            betas=self._betas,
            epsilon=self._epsilon,
            steps=self.steps,
        )
        torch._foreach_add_(counts, 1.0)
        self.published = [name for name in names if name in copies]

    def moments(self) -> dict[str, Tensor]:
        """`{"<parameter name>.exp_avg": tensor, …}` of what is trained, zeros before the first step, of the parameters' full
        shapes and dtype. What is kept narrow is made wide for it, and of a GPU's in the host's memory."""
        found: dict[str, Tensor] = {}
        for name, p in self.trained.items():
            if name in self._narrow:
                moments = self._narrow[name].moments()
            else:
                state = self.adamw.state.get(p) or {
                    m: torch.zeros_like(p, requires_grad=False) for m in MOMENTS
                }
                moments = tuple(state[moment] for moment in MOMENTS)
            found |= {f"{name}.{moment}": tensor for moment, tensor in zip(MOMENTS, moments, strict=True)}
        return found

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Continue from `moments` (as `moments` gives them) after `steps` updates."""
        self.steps = steps
        self.adamw.state.clear()  # a run may go back to where there was none
        for name, parameter in self.trained.items():
            loaded = [moments[f"{name}.{moment}"] for moment in MOMENTS]
            if name in self._narrow:
                self._narrow[name].load(*loaded)
            elif steps:
                self.adamw.state[parameter] = {
                    "step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device),
                    **dict(zip(MOMENTS, loaded, strict=True)),
                }

    def held(self, name: str) -> dict[str, Tensor]:
        """What is in memory for this parameter, as it lies there; nothing while it is frozen, or before its first step."""
        if name in self._narrow:
            return {f"{name}.{part}": tensor for part, tensor in self._narrow[name].held().items()}
        state = self.adamw.state.get(self.trained[name]) if name in self.trained else None
        return {f"{name}.{moment}": state[moment] for moment in MOMENTS} if state else {}

    @property
    def nbytes(self) -> int:
        """Of memory that the moments take."""
        return sum(tensor.nbytes for name in self.trained for tensor in self.held(name).values())


class _NarrowAdamW:
    """The update of one parameter whose moments have eight bits each.

    A stretch of the parameter after the other: its moments are made wide, updated, used, and narrowed again. So nothing
    that is wide is larger than a stretch, and the update sees this step's gradient unrounded.
    """

    def __init__(
        self,
        parameter: nn.Parameter,
        *,
        scale: float,
        decay: float,
        betas: tuple[float, float],
        epsilon: float,
    ):
        self._parameter, self._scale, self._decay = parameter, scale, decay
        self._betas, self._epsilon = betas, epsilon
        count, dtype, device = parameter.numel(), parameter.dtype, parameter.device
        self._mean = Blockwise(count, signed=True, dtype=dtype, device=device)
        self._square = Blockwise(count, signed=False, dtype=dtype, device=device)

    @torch.no_grad()
    def step(self, learning_rate: float, steps: int) -> None:
        """One update, the `steps`th, counted from 1."""
        if self._parameter.grad is None:
            return
        values, gradients = self._parameter.view(-1), self._parameter.grad.reshape(-1)
        rate = learning_rate * self._scale
        beta_1, beta_2 = self._betas
        correction_1, correction_2 = 1 - beta_1**steps, 1 - beta_2**steps
        for piece in self._mean.pieces():
            value, gradient = values[piece], gradients[piece]
            mean = self._mean.read(piece).lerp_(gradient, 1 - beta_1)
            square = self._square.read(piece).mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
            root = square.sqrt().div_(math.sqrt(correction_2)).add_(self._epsilon)
            if self._decay:
                value.mul_(1 - rate * self._decay)
            value.addcdiv_(mean, root, value=-rate / correction_1)
            self._mean.write(piece, mean)
            self._square.write(piece, square)

    def moments(self) -> tuple[Tensor, ...]:
        """Both, wide."""
        whole = []
        for moment in (self._mean, self._square):
            wide = torch.empty(self._parameter.shape, dtype=self._parameter.dtype)
            for piece in moment.pieces():
                wide.view(-1)[piece] = moment.read(piece)
            whole.append(wide)
        return tuple(whole)

    def load(self, mean: Tensor, square: Tensor) -> None:
        """Narrow both; what `moments` gave comes back as it was."""
        for moment, wide in ((self._mean, mean), (self._square, square)):
            for piece in moment.pieces():
                moment.write(piece, wide.reshape(-1)[piece].to(self._parameter.device))

    def held(self) -> dict[str, Tensor]:
        """Codes and scales."""
        both = {"exp_avg": self._mean, "exp_avg_sq": self._square}
        return {
            f"{name}.{part}": getattr(moment, part)
            for name, moment in both.items()
            for part in ("codes", "scales")
        }
