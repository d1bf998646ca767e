"""Compiled blocks against eager ones."""

from __future__ import annotations

import pytest
import torch

from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from tests.model.test_decoder import SMALL, packed


@pytest.mark.slow  # fusing takes some ten seconds of compiling
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_blocks_compute_what_eager_ones_do(dtype: torch.dtype) -> None:
    _, eager = _loss_and_gradients(dtype, backend=None)
    loss, compiled = _loss_and_gradients(dtype, backend="inductor")
    assert torch.isfinite(loss)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_blocks_share_one_graph_a_stretch() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    loss, compiled = _loss_and_gradients(torch.float64, backend=count)
    expected_loss, expected = _loss_and_gradients(torch.float64, backend=None)
    assert len(graphs) == 2  # before and after attention, for both layers
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)


def test_without_gradients_nothing_is_compiled() -> None:
    def refuse(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        raise AssertionError("compiled")

    model = _model(torch.float32)
    expected = model(*packed())
    compile_blocks(model, backend=refuse)
    with torch.no_grad():
        torch.testing.assert_close(model(*packed()), expected, atol=0, rtol=0)


def _model(dtype: torch.dtype) -> Decoder:
    torch._dynamo.reset()
    model = Decoder(SMALL)
    initialize(model, 0, InitStd.for_architecture(SMALL))
    return model.to(dtype)


def _loss_and_gradients(dtype: torch.dtype, backend: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = _model(dtype)
    if backend is not None:
        compile_blocks(model, backend=backend)
    loss = model(*packed()).square().sum()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
