import pytest
import torch
from torch import nn

from modelyard.train.optimizer import Optimizer


def make(parameters: dict[str, nn.Parameter]) -> Optimizer:
    return Optimizer(parameters, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)


def test_first_step_by_hand() -> None:
    """From zero moments, Adam moves by lr × sign(g); only the matrix is decayed, by lr × 0.1 × w."""
    matrix, norm = nn.Parameter(torch.full((2, 2), 2.0)), nn.Parameter(torch.full((2,), 2.0))
    optimizer = make({"m": matrix, "n": norm})
    matrix.grad, norm.grad = torch.full((2, 2), 0.5), torch.full((2,), -0.5)
    optimizer.step(0.01)
    torch.testing.assert_close(matrix.data, torch.full((2, 2), 2.0 * (1 - 0.001) - 0.01))
    torch.testing.assert_close(norm.data, torch.full((2,), 2.0 + 0.01))
    assert optimizer.steps == 1
    torch.testing.assert_close(optimizer.moments()["m.exp_avg"], torch.full((2, 2), 0.05))
    torch.testing.assert_close(optimizer.moments()["m.exp_avg_sq"], torch.full((2, 2), 0.0125))


def test_scales_are_factors_on_the_rate_and_zero_freezes() -> None:
    """Adam's first step is lr x scale x sign(g); the decay of the matrix is scaled along."""
    names = ("half", "frozen", "whole", "norm")
    values = {name: nn.Parameter(torch.full((2, 2) if name != "norm" else (2,), 2.0)) for name in names}
    optimizer = Optimizer(
        values,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        epsilon=1e-8,
        scales={"half": 0.5, "frozen": 0.0, "norm": 3.0},
    )
    for parameter in values.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step(0.01)
    after = {name: parameter.flatten()[0].item() for name, parameter in values.items()}
    assert after == pytest.approx(
        {"half": 2 * (1 - 0.0005) - 0.005, "frozen": 2.0, "whole": 2 * (1 - 0.001) - 0.01, "norm": 2 - 0.03}
    )
    moments = optimizer.moments()
    assert moments["frozen.exp_avg"].eq(0).all()
    again = Optimizer(values, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, scales={"frozen": 0.0})
    again.load_moments(moments, 1)
    assert values["frozen"] not in again.adamw.state
    assert values["half"] in again.adamw.state


def test_nothing_to_train_is_no_mistake() -> None:
    """A process of a pipeline may have nothing but frozen layers, and counts the steps like the others."""
    frozen = nn.Parameter(torch.full((2, 2), 2.0))
    optimizer = Optimizer({"w": frozen}, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, scales={"w": 0.0})
    optimizer.step(0.01)
    assert optimizer.steps == 1
    assert frozen.eq(2.0).all()
    optimizer.load_moments(optimizer.moments(), 1)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_continuing_from_moments_is_bit_equal(steps_before: int) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4) for _ in range(6)]

    def run(optimizer: Optimizer, parameter: nn.Parameter, some: list[torch.Tensor]) -> None:
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step(0.01)

    whole = nn.Parameter(torch.ones(3, 4))
    run(make({"w": whole}), whole, gradients)

    first = nn.Parameter(torch.ones(3, 4))
    before = make({"w": first})
    run(before, first, gradients[:steps_before])
    second = nn.Parameter(first.detach().clone())
    after = make({"w": second})
    after.load_moments({name: m.clone() for name, m in before.moments().items()}, before.steps)
    run(after, second, gradients[steps_before:])
    assert torch.equal(whole, second)
    assert after.steps == 6
