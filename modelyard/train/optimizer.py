"""AdamW on named parameters, with weight decay only on matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """`torch.optim.AdamW` (fused where torch has it for the device) whose state is addressed by parameter name.

    Weight decay applies to matrices (embeddings included) and not to norms and biases. All parameters share one
    count of steps, `steps`: the number of successful updates, which the bias correction uses. `scales` are factors on
    the learning rate by name (1 where none is given); a parameter whose factor is 0 is frozen.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
        scales: Mapping[str, float] | None = None,
    ):
        self.parameters = parameters
        scales = scales or {}
        self._frozen = {name for name, scale in scales.items() if scale == 0}
        members: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, p in parameters.items():
            if name not in self._frozen:
                members.setdefault((p.dim() >= 2, scales.get(name, 1.0)), []).append(p)
        groups = [
            {"params": group, "weight_decay": weight_decay if decayed else 0.0, "scale": scale}
            for (decayed, scale), group in members.items()
        ]
        # A process of a pipeline may have nothing but frozen layers; torch wants a group all the same.
        groups = groups or [{"params": [], "scale": 1.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        self.steps = 0

    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, which is left as it is."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self.adamw.step()
        self.steps += 1

    def moments(self) -> dict[str, torch.Tensor]:
        """`{"<parameter name>.exp_avg": tensor, …}`, zeros before the first step, of the parameters' full shapes."""
        state = self.adamw.state
        return {
            f"{name}.{moment}": state[p][moment] if state.get(p) else torch.zeros_like(p, requires_grad=False)
            for name, p in self.parameters.items()
            for moment in MOMENTS
        }

    def load_moments(self, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Continue from `moments` (as `moments` gives them) after `steps` updates."""
        self.steps = steps
        self.adamw.state.clear()  # a run may go back to where there was none
        if steps == 0:
            return
        for name, parameter in self.parameters.items():
            if name in self._frozen:
                continue
            self.adamw.state[parameter] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device),
                **{moment: moments[f"{name}.{moment}"] for moment in MOMENTS},
            }
