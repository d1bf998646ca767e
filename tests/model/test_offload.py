"""Inputs of blocks in the host's memory: the same numbers to the bit, and of the device's memory no more than is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modelyard.config.architecture import Architecture
from modelyard.model.cache import KeyValueCache
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.model.offload import Copies, Offload, offload_on
from modelyard.model.recompute import recompute_blocks
from tests.model.copies import AtOnce, Late
from tests.model.test_decoder import SMALL, packed
from tests.model.test_recompute import Watch, assert_same_bits, loss_and_gradients

FOUR = replace(SMALL, num_layers=4)


def build(
    copies: Copies | None,
    architecture: Architecture = FOUR,
    dtype: torch.dtype = torch.float32,
    layers: range | None = None,
) -> Decoder:
    """Recomputed whole; with `copies` offloaded too."""
    model = Decoder(architecture, layers=layers)
    initialize(model, 0, InitStd.for_architecture(architecture))
    model.to(dtype)
    recompute_blocks(model, "full", None if copies is None else Offload(copies))
    return model


# --- the same numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["64", "32", "16"])
def test_losses_and_gradients_are_the_same_bits(dtype: torch.dtype) -> None:
    wanted = loss_and_gradients(build(None, dtype=dtype))
    for copies in (AtOnce(), Late()):
        assert_same_bits(loss_and_gradients(build(copies, dtype=dtype)), wanted)


def test_so_are_those_of_a_wide_residual_stream() -> None:
    shape = replace(FOUR, full_precision_residual=True)
    wanted = loss_and_gradients(build(None, shape, torch.bfloat16))
    assert_same_bits(loss_and_gradients(build(Late(), shape, torch.bfloat16)), wanted)


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    wanted = loss_and_gradients(build(None), times=2)
    assert_same_bits(loss_and_gradients(build(Late()), times=2), wanted)


def test_compiled_blocks_too() -> None:
    found = []
    for copies in (None, Late()):
        torch._dynamo.reset()
        model = build(copies)
        compile_blocks(model, backend="aot_eager")
        found.append(loss_and_gradients(model))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_may_stand_between_a_forward_and_its_backward(order: tuple[int, int]) -> None:
    """As the micro-batches of a pipeline do."""

    def losses(model: Decoder) -> Iterator[Tensor]:
        ids, positions, cu_seqlens = packed()
        for row in range(2):
            yield model(ids[[row]], positions[[row]], cu_seqlens[[row]]).double().square().mean()

    plain, late = build(None, dtype=torch.float64), Late()
    for loss in losses(plain):
        loss.backward()
    model = build(late, dtype=torch.float64)
    held = list(losses(model))
    came = []
    for number in order:
        late.log.clear()
        held[number].backward()
        came.append([line for line in late.log if not line.endswith("done")])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.named_parameters())) - 1  # but for the head
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain.get_parameter(name).grad), name  # a sum of two, in either order
    # Each backward has its own inputs come, whichever is first.
    wanted_log = (["back 2", "back 1", "back 0"], ["back 5", "back 4", "back 3"])
    assert came == [wanted_log[number] for number in order]
    assert len(late.hosts) == 6


def test_a_backward_in_parts_has_nothing_come_that_is_not_asked_for() -> None:
    """As that of the weights, after that of the inputs, under some schedules of pipelines."""
    late = Late()
    model = build(late)
    loss = model(*packed()).double().square().mean()
    loss.backward(retain_graph=True)
    late.log.clear()
    torch.autograd.grad(loss, model.layers["2"].input_layernorm.weight)
    assert late.log == ["back 2", "back 2 done"]


# --- of less memory ---------------------------------------------------------------------------------------------


def test_of_all_inputs_the_device_keeps_the_last() -> None:
    tokens, late = 64, Late()
    model = build(late, dtype=torch.bfloat16)
    one = 2 * tokens * FOUR.hidden_size
    ids, positions, cu_seqlens = packed()
    with Watch() as watch:
        hidden = model(ids, positions, cu_seqlens)
        kept = watch.alive(hidden, *late.hosts.values())
    plain = build(None, dtype=torch.bfloat16)
    with Watch() as other:
        expected = plain(ids, positions, cu_seqlens)
        all_kept = other.alive(expected)
    assert torch.equal(hidden, expected)
    assert all_kept - kept == 3 * one
    assert sum(host.nbytes for host in late.hosts.values()) == 3 * one
    hidden.float().sum().backward()
    assert late.most == 2  # the one in use, and the one that comes next


def test_the_next_input_comes_while_a_block_is_recomputed() -> None:
    late = Late()
    model = build(late)
    for number, block in enumerate(model.layers.values()):
        block.before_attention = _logged(block.before_attention, late.log, number)
    hidden = model(*packed())
    assert late.log == [
        *("out 0", "block 0", "out 0 done"),
        *("out 1", "block 1", "out 1 done"),
        *("out 2", "block 2", "out 2 done"),
        "block 3",
    ]
    late.log.clear()
    hidden.square().sum().backward()
    assert late.log == [
        "block 3",
        *("back 2", "back 2 done", "back 1", "block 2"),
        *("back 1 done", "back 0", "block 1"),
        *("back 0 done", "block 0"),
    ]


def _logged(function: object, log: list[str], number: int) -> object:
    def call(*arguments: object) -> object:
        log.append(f"block {number}")
        return function(*arguments)  # type: ignore[operator]

    return call


def test_buffers_are_used_again_from_step_to_step() -> None:
    late = Late()
    model = build(late)
    for _ in range(3):
        loss_and_gradients(model)
    assert len(late.hosts) == 3
    assert late.log.count("out 0") == late.log.count("back 8") == 1


def test_a_part_without_the_head_keeps_no_input() -> None:
    late = Late()
    model = build(late, layers=range(2))
    ids, positions, cu_seqlens = packed()
    with Watch() as watch:
        y = model(ids, positions, cu_seqlens)
        table = 2 * 4 * positions.numel() * FOUR.head_size // 2  # rotary, fp32
        assert watch.alive(y, *late.hosts.values()) <= table + 64
    assert late.log == ["out 0", "out 0 done", "out 1", "out 1 done"]
    y.sum().backward()
    assert late.log[4:] == ["back 1", "back 1 done", "back 0", "back 0 done"]


def test_nothing_leaks_where_no_backward_follows() -> None:
    late = Late()
    offload = Offload(late)
    model = Decoder(FOUR)
    initialize(model, 0, InitStd.for_architecture(FOUR))
    recompute_blocks(model, "full", offload)
    hidden = model(*packed())
    del hidden
    assert sum(map(len, offload._free.values())) == 3
    # One that ends before the second block, when that block's input is on its way.
    hidden = model(*packed())
    late.log.clear()
    torch.autograd.grad(hidden.sum(), model.layers["2"].input_layernorm.weight)
    assert late.log == ["back 5", "back 5 done", "back 4"]
    del hidden
    assert late.log[3:] == ["back 4 done"]
    assert sum(map(len, offload._free.values())) == 3


def test_blocks_without_a_backward_send_nothing() -> None:
    def half_frozen(copies: Copies | None) -> Decoder:
        model = build(copies)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("embed", "layers.0.", "layers.1.")))
        return model

    late = Late()
    assert_same_bits(loss_and_gradients(half_frozen(late)), loss_and_gradients(half_frozen(None)))
    assert late.log == ["out 0", "out 0 done", "back 0", "back 0 done"]


def test_frozen_matrices_of_blocks_whose_input_has_a_gradient() -> None:
    def frozen(copies: Copies | None) -> Decoder:
        model = build(copies)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj" in name)
        return model

    assert_same_bits(loss_and_gradients(frozen(Late())), loss_and_gradients(frozen(None)))


# --- where it keeps out -----------------------------------------------------------------------------------------


def test_without_gradients_and_with_a_cache_nothing_is_sent() -> None:
    late = Late()
    model, plain = build(late), build(None)
    with torch.no_grad():
        assert torch.equal(model(*packed()), plain(*packed()))
    ids, positions = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]
    cu_seqlens = torch.tensor([[0, 3]], dtype=torch.int32)
    model(ids, positions, cu_seqlens, KeyValueCache(FOUR))
    assert late.log == []


def test_there_is_nothing_to_offload_from_a_cpu() -> None:
    assert offload_on(torch.device("cpu")) is None


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_only_whole_blocks_are_offloaded(mode: str) -> None:
    with pytest.raises(
        ValueError, match=f"with recomputation '{mode}' more than the inputs of blocks is kept"
    ):
        recompute_blocks(Decoder(FOUR), mode, Offload(AtOnce()))  # type: ignore[arg-type]
