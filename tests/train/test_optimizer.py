from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

from modelyard.train.optimizer import LEAST_NARROW, Optimizer


def make(parameters: dict[str, nn.Parameter], state: Literal["float32", "8bit"] = "float32") -> Optimizer:
    return Optimizer(parameters, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, state=state)


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
    assert {name.partition(".")[0] for name in moments} == {"half", "whole", "norm"}
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


@pytest.mark.parametrize("state", ["float32", "8bit"])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_continuing_from_moments_is_bit_equal(steps_before: int, state: Literal["float32", "8bit"]) -> None:
    shape = (96, 100) if state == "8bit" else (3, 4)
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for _ in range(6)]

    def run(optimizer: Optimizer, parameter: nn.Parameter, some: list[torch.Tensor]) -> None:
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step(0.01)

    whole = nn.Parameter(torch.ones(shape))
    run(make({"w": whole}, state), whole, gradients)

    first = nn.Parameter(torch.ones(shape))
    before = make({"w": first}, state)
    run(before, first, gradients[:steps_before])
    second = nn.Parameter(first.detach().clone())
    after = make({"w": second}, state)
    run(after, second, gradients[:1])  # a run that goes back forgets what it did
    second.data.copy_(first.data)
    after.load_moments({name: m.clone() for name, m in before.moments().items()}, before.steps)
    run(after, second, gradients[steps_before:])
    assert torch.equal(whole, second)
    assert after.steps == 6


# --- eight bits -------------------------------------------------------------------------------------------------


def gradients_of(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Of sizes that differ from column to column by orders of magnitude, as in a model."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 0, shape[-1])[torch.randperm(shape[-1], generator=generator)]
    return [torch.randn(shape, generator=generator) * sizes for _ in range(steps)]


@pytest.mark.parametrize("shape", [(64, 128), (97, 101), (1500, 100)], ids=str)
def test_a_narrow_step_is_torchs_step_on_the_moments_as_they_are_kept(shape: tuple[int, ...]) -> None:
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    narrow = make({"w": ours}, "8bit")
    for gradient in gradients_of(shape, 4):
        plain = make({"w": theirs})
        theirs.data.copy_(ours.data)
        plain.load_moments({name: m.clone() for name, m in narrow.moments().items()}, narrow.steps)
        for parameter, optimizer in ((ours, narrow), (theirs, plain)):
            parameter.grad = gradient.clone()
            optimizer.step(0.01)
        torch.testing.assert_close(ours.data, theirs.data, rtol=2e-6, atol=1e-9)
        for name, exact in plain.moments().items():
            found = narrow.moments()[name]
            # 0.7% near the largest of a block, more the smaller they are.
            assert (found - exact).norm() < 0.02 * exact.norm()
            assert not torch.equal(found, exact)
    assert narrow.moments()["w.exp_avg"].shape == shape


def test_only_large_parameters_are_narrow_and_frozen_ones_weigh_nothing() -> None:
    sizes = {"large": (64, 64), "small": (63, 65), "norm": (5000,), "frozen": (64, 64)}
    values = {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    options: dict[str, Any] = {"weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
    optimizer = Optimizer(values, **options, scales={"frozen": 0.0, "norm": 0.5}, state="8bit")
    assert 63 * 65 < LEAST_NARROW == 64 * 64
    for parameter in values.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step(0.01)
    assert list(optimizer.held("small")) == ["small.exp_avg", "small.exp_avg_sq"]
    assert list(optimizer.held("large")) == [
        f"large.{moment}.{part}" for moment in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")
    ]
    assert optimizer.held("frozen") == {}
    assert optimizer.nbytes == 2 * (4096 + 16 * 4) + 2 * 63 * 65 * 4 + 2 * (20 * 256 + 20 * 4)
    # All but the norm are decayed by lr * 0.1 * w; Adam's first step is lr * scale * sign(g).
    after = {name: parameter.flatten()[-1].item() for name, parameter in values.items()}
    assert after == pytest.approx(
        {"large": 1 - 0.001 - 0.01, "small": 1 - 0.001 - 0.01, "norm": 1 - 0.005, "frozen": 1.0}, rel=1e-6
    )
    assert optimizer.moments()["norm.exp_avg"].eq(optimizer.moments()["norm.exp_avg"][0]).all()


def descended(optimizer: Optimizer, parameter: nn.Parameter, steps: int = 150) -> float:
    """Least squares on ill-conditioned data, in small random batches; the loss over all of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, parameter.shape[1], generator=generator) * torch.logspace(
        -1.5, 0, parameter.shape[1]
    )
    y = x @ torch.randn(parameter.shape, generator=generator).t()
    for _ in range(steps):
        rows = torch.randint(512, (32,), generator=generator)
        parameter.grad = None
        (x[rows] @ parameter.t() - y[rows]).square().mean().backward()
        optimizer.step(0.02)
    return float((x @ parameter.detach().t() - y).square().mean())


def test_training_with_eight_bits_comes_as_far() -> None:
    found = {}
    for state in ("float32", "8bit"):
        parameter = nn.Parameter(torch.zeros(64, 80))
        start = descended(make({"w": parameter}), parameter, steps=0)
        found[state] = descended(make({"w": parameter}, state), parameter)  # type: ignore[arg-type]
    assert found["float32"] < start / 10
    assert found["8bit"] == pytest.approx(found["float32"], rel=0.1)


@pytest.mark.slow
def test_training_with_eight_bits_comes_as_far_as_torchao() -> None:
    """Its own needs a compiler, and some 20 seconds of it."""
    torchao = pytest.importorskip("torchao.optim")
    ours, theirs = nn.Parameter(torch.zeros(64, 80)), nn.Parameter(torch.zeros(64, 80))
    found = descended(make({"w": ours}, "8bit"), ours)

    class Theirs(Optimizer):
        adam = torchao.AdamW8bit(
            [theirs], lr=torch.tensor(0.02), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
        )

        def step(self, learning_rate: float) -> None:
            self.adam.step()

    expected = descended(Theirs({}, weight_decay=0.0, betas=(0.0, 0.0), epsilon=1.0), theirs)
    assert found == pytest.approx(expected, rel=0.1)
