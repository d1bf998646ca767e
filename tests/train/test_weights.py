import pytest
import torch
from torch import nn

from modelyard.train.weights import Weights, wide_gradient_taker


def test_fp32_has_one_set_of_tensors() -> None:
    model = nn.Linear(3, 2)
    weights = Weights(model, torch.float32)
    assert weights.master["weight"] is model.weight


def test_fp64_is_fp64_throughout() -> None:
    model = nn.Linear(3, 2)
    weights = Weights(model, torch.float64)
    assert weights.master["weight"] is model.weight
    assert model.weight.dtype == torch.float64


def test_bf16_gradients_are_summed_in_fp32() -> None:
    """256 + 1 is 256 in bf16 (8 bits of significand), 257 in fp32."""
    model = nn.Linear(1, 1, bias=False)
    weights = Weights(model, torch.bfloat16)
    for value in (256.0, 1.0):
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    (gradient,) = weights.gradients()
    assert gradient.dtype == torch.float32
    assert gradient.item() == 257.0
    assert model.weight.grad is None
    weights.zero_gradients()
    assert weights.gradients() == []


def test_a_trained_parameter_without_a_gradient_is_named() -> None:
    """It would keep its value, and neither loss nor norm would tell."""
    model = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "forgotten": nn.Linear(1, 1)})
    weights = Weights(model, torch.bfloat16)
    model["used"](torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match=r"^no gradient for forgotten\.weight \(and 1 more\)"):
        weights.finish_gradients()
    weights.freeze(["forgotten.weight", "forgotten.bias"])
    weights.finish_gradients()
    assert [g.item() for g in weights.gradients()] == [1.0]


def test_frozen_before_the_weights_are_made() -> None:
    model = nn.ModuleDict({"used": nn.Linear(1, 1, bias=False), "frozen": nn.Linear(1, 1, bias=False)})
    model["frozen"].requires_grad_(False)
    weights = Weights(model, torch.bfloat16)
    model["frozen"](model["used"](torch.ones(1, 1, dtype=torch.bfloat16))).sum().backward()
    weights.finish_gradients()
    assert [name for name, p in weights.master.items() if p.grad is not None] == ["used.weight"]


def test_publish_casts_the_master_once() -> None:
    model = nn.Linear(1, 1, bias=False)
    weights = Weights(model, torch.bfloat16)
    master = weights.master["weight"]
    with torch.no_grad():
        master.fill_(1.0 + 2**-10)  # Not a bf16 number; rounds to 1.
    weights.publish()
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.item() == 1.0
    assert master.item() == 1.0 + 2**-10


def test_wide_gradients_go_past_autograd_only_to_the_masters_of_plain_narrow_weights() -> None:
    """256 + 1 is 257 in fp32 only: the taken gradient is added as it is, and to what autograd brings."""
    model = nn.Linear(1, 2, bias=False)
    weights = Weights(model, torch.bfloat16)
    take = wide_gradient_taker(weights, model.weight)
    assert take is not None
    first = torch.full((2, 1), 256.0)
    take(first)
    assert weights.master["weight"].grad is first, "kept, not copied"
    take(torch.full((2, 1), 1.0))
    model(torch.full((1, 1), 2.0, dtype=torch.bfloat16)).sum().backward()
    assert weights.master["weight"].grad.flatten().tolist() == [259.0, 259.0]

    assert wide_gradient_taker(weights, nn.Parameter(torch.ones(2, 1))) is None, (
        "no parameter of these weights"
    )
    assert wide_gradient_taker(object(), model.weight) is None, (
        "weights that reduce their gradients themselves"
    )
    weights.freeze(["weight"])
    assert wide_gradient_taker(weights, model.weight) is None, "frozen"
    for dtype in (torch.float32, torch.float64):
        same = nn.Linear(1, 1)
        assert wide_gradient_taker(Weights(same, dtype), same.weight) is None, "one dtype: autograd's own"
