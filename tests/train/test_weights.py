import torch
from torch import nn

from modelyard.train.weights import Weights


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
