"""The same numbers on CUDA: each fast path there against its slow twin. Run by `make gpu`."""

from __future__ import annotations

import pytest
import torch

from modelyard.loss.cross_entropy import linear_cross_entropy
from modelyard.model.attention import attend
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from tests.model.test_attention import CASES, make
from tests.model.test_decoder import SMALL, packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_varlen_equals_the_dense_reference(case: str, groups: int, window: int | None) -> None:
    inputs, (cu_q, cu_k, max_q, max_k) = make(CASES[case], heads=4, groups=groups)
    boundaries = (cu_q.cuda(), cu_k.cuda(), max_q, max_k)
    narrow = [t.detach().cuda().bfloat16().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    out = attend(*narrow, *boundaries, window=window, backend="varlen")
    expected = attend(*exact, *boundaries, window=window, backend="dense")
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    gradients = torch.autograd.grad(out.float().square().sum(), narrow)
    for ours, reference in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=0.1, rtol=5e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_a_training_step_equals_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    gradients = {}
    for device, computed_in in (("cpu", torch.float64), ("cuda", dtype)):
        model = Decoder(SMALL)
        initialize(model, 0, InitStd.for_architecture(SMALL))
        model.to(device, computed_in)
        ids, positions, cu_seqlens = packed()
        hidden = model(ids.to(device), positions.to(device), cu_seqlens)
        labels = ids.roll(-1, 1).flatten().to(device)
        labels[::5] = -100
        loss = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, labels, z_loss=1e-3)
        (loss / len(labels)).backward()
        gradients[device] = {
            n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None
        }
    for name, expected in gradients["cpu"].items():
        error = (gradients["cuda"][name] - expected).norm() / expected.norm()
        assert error < tolerance, name
