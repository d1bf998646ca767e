"""The same numbers on CUDA: each fast path there against its slow twin. Run by `make gpu`."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from modelyard.loss.cross_entropy import linear_cross_entropy
from modelyard.model.attention import attend
from modelyard.model.decoder import Decoder
from modelyard.model.dropout import dropped_product, keep_mask, token_numbers, token_words
from modelyard.model.init import InitStd, initialize
from modelyard.model.offload import Offload, offload_on
from modelyard.model.recompute import recompute_blocks
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


def test_a_dropout_leaves_out_what_it_does_on_the_cpu() -> None:
    numbers = token_numbers(1, 0, 4, 256).flatten()
    words, device_words = token_words(numbers, 3), token_words(numbers.cuda(), 3)
    assert torch.equal(device_words.cpu(), words)
    mask = keep_mask(device_words, "q_proj", 7, 300, 0.1)
    assert torch.equal(mask.cpu(), keep_mask(words, "q_proj", 7, 300, 0.1))
    x, a = torch.randn(1024, 300, device="cuda"), torch.eye(300, device="cuda")
    low = dropped_product(x, a, device_words, "q_proj", 7, 0.1)
    assert torch.equal(low != 0, mask & (x != 0))


DEEP = replace(SMALL, hidden_size=256, ffn_hidden_size=512, head_size=64, num_layers=12)
"""Whose inputs take most of the memory."""


def offloading(offload: Offload | None) -> Decoder:
    model = Decoder(DEEP)
    initialize(model, 0, InitStd.for_architecture(DEEP))
    model.to("cuda", torch.bfloat16)
    recompute_blocks(model, "full", offload)
    return model


def backward_at_length(model: Decoder, length: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the most memory that a forward and backward takes beyond what was there, in bytes."""
    ids = torch.randint(61, (1, length), generator=torch.Generator().manual_seed(1)).cuda()
    positions = torch.arange(length, device="cuda")[None]
    cu_seqlens = torch.tensor([[0, length]], dtype=torch.int32)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = model(ids, positions, cu_seqlens).float().square().mean()
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, peak


def test_offloaded_inputs_change_no_bit_and_take_no_memory() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # of flash attention's backward
    try:
        length, layers = 16384, DEEP.num_layers
        kept = offloading(None)
        plain = [backward_at_length(kept, length) for _ in range(2)][
            -1
        ]  # the first makes what libraries keep
        offload = offload_on(torch.device("cuda"))
        assert offload is not None
        model = offloading(offload)
        runs = [backward_at_length(model, length) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    for loss, gradients, _ in runs:
        assert torch.equal(loss, plain[0])
        for name, gradient in plain[1].items():
            assert torch.equal(gradients[name], gradient), name
    one = 2 * length * DEEP.hidden_size
    # Without: the inputs of all blocks when the last one is recomputed; with: that one's, and the one that comes next.
    saved = plain[2] - runs[-1][2]
    assert (layers - 4) * one <= saved <= layers * one, saved / one
    # Buffers of the first step serve the others, and all are pinned.
    buffers = [buffer for free in offload._free.values() for buffer in free]
    assert len(buffers) == layers - 1
    assert all(buffer.is_pinned() for buffer in buffers)


def test_offloading_makes_the_host_wait_no_more_often() -> None:
    ids, positions, cu_seqlens = packed()
    ids, positions = ids.cuda(), positions.cuda()
    waits = []
    for offload in (None, offload_on(torch.device("cuda"))):
        model = offloading(offload)
        for step in range(2):  # the first makes the buffers
            torch.cuda.set_sync_debug_mode("warn" if step else "default")
            try:
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    model(ids, positions, cu_seqlens).float().square().mean().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(len([w for w in seen if "synchroniz" in str(w.message)]))
    assert waits[1] == waits[0]
