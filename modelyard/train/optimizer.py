"""AdamW on named parameters, with weight decay only on matrices."""

from __future__ import annotations

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """`torch.optim.AdamW` (fused where torch has it for the device) whose state is addressed by parameter name.

    Weight decay applies to matrices (embeddings included) and not to norms and biases. All parameters share one
    count of steps, `steps`: the number of successful updates, which the bias correction uses.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
    ):
        self.parameters = parameters
        decayed = [p for p in parameters.values() if p.dim() >= 2]
        exempt = [p for p in parameters.values() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=epsilon, fused=True
        )
        self.steps = 0

    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, which is left as it is."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
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
        if steps == 0:
            return
        for name, parameter in self.parameters.items():
            self.adamw.state[parameter] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=parameter.device),
                **{moment: moments[f"{name}.{moment}"] for moment in MOMENTS},
            }
