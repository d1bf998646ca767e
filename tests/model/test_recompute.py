"""Activation recomputation: the same numbers to the bit, of less memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from modelyard.config.architecture import Architecture
from modelyard.config.layout import Recompute
from modelyard.model.cache import KeyValueCache
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Context, Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.model.recompute import _CheapOutputs, _keep_products, _selective, cheap, recompute_blocks
from modelyard.model.rotary import rotary_table
from tests.model.test_decoder import SMALL, packed

OTHER = {
    "layer norm, gelu": replace(
        SMALL, norm_type="layer_norm", gated=False, activation="gelu", mlp_bias=True, output_bias=True
    ),
    "gated gelu, wide residual": replace(SMALL, activation="gelu", full_precision_residual=True),
    "squared relu": replace(SMALL, activation="squared_relu", gated=False),
}


def build(architecture: Architecture, mode: Recompute, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(architecture)
    initialize(model, 0, InitStd.for_architecture(architecture))
    model.to(dtype)
    recompute_blocks(model, mode)
    return model


def loss_and_gradients(model: Decoder, times: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(*packed()).double().square().mean()
    for _ in range(times):
        loss.backward(retain_graph=times > 1)
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(
    ours: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert torch.equal(ours[0], expected[0])
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.count_nonzero() > 0, name
        assert torch.equal(ours[1][name], gradient), name


# --- the same numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
def test_losses_and_gradients_are_the_same_bits(dtype: torch.dtype, mode: Recompute) -> None:
    assert_same_bits(
        loss_and_gradients(build(SMALL, mode, dtype)), loss_and_gradients(build(SMALL, "none", dtype))
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", OTHER)
def test_so_are_those_of_other_blocks(kind: str, mode: Recompute) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wanted = loss_and_gradients(build(OTHER[kind], "none", dtype))
        assert_same_bits(loss_and_gradients(build(OTHER[kind], mode, dtype)), wanted)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_graph_that_is_kept_can_be_gone_through_again(mode: Recompute) -> None:
    wanted = loss_and_gradients(build(SMALL, "none"), times=2)
    assert_same_bits(loss_and_gradients(build(SMALL, mode), times=2), wanted)


@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_compiled_blocks_recompute_to_the_same_bits(mode: Recompute) -> None:
    found = []
    for each in ("none", mode):
        torch._dynamo.reset()
        model = build(SMALL, each)
        compile_blocks(model, backend="aot_eager")
        found.append(loss_and_gradients(model))
    assert_same_bits(found[1], found[0])


@pytest.mark.slow  # fusing takes some ten seconds of compiling
def test_fused_blocks_recompute_to_the_same_bits_or_to_rounding() -> None:
    found = {}
    for mode in get_args(Recompute):
        torch._dynamo.reset()
        model = build(SMALL, mode)
        compile_blocks(model)
        found[mode] = loss_and_gradients(model)
    assert_same_bits(found["full"], found["none"])
    assert torch.equal(found["selective"][0], found["none"][0])
    for name, gradient in found["none"][1].items():
        torch.testing.assert_close(found["selective"][1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_frozen_weights_need_no_recomputation_of_their_inputs() -> None:
    def frozen(mode: Recompute) -> Decoder:
        model = build(SMALL, mode)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("k_proj" in name or "down_proj" in name)
        return model

    for mode in ("selective", "full"):
        assert_same_bits(loss_and_gradients(frozen(mode)), loss_and_gradients(frozen("none")))


# --- of less memory ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """What the operations inside make, as long as it lives, and how often each runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._given: dict[int, Any] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._made:
                self._given[key] = tensor.untyped_storage()
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:  # else a view
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self, *known: Tensor) -> int:
        """Bytes of what the operations made and somebody has still, but for `known`."""
        excepted = {tensor.untyped_storage()._cdata for tensor in known}
        found = self._made.items()
        return sum(bytes for key, (ref, bytes) in found if key not in excepted and not ref.expired())


TOKENS = 24


def block_inputs(model: Decoder) -> tuple[Tensor, Context]:
    """What the first block takes: hidden states of one document."""
    cu_seqlens = torch.tensor([[0, TOKENS]], dtype=torch.int32)
    weight = next(model.parameters())
    table = rotary_table(SMALL.rotary, SMALL.head_size, torch.arange(TOKENS), dtype=torch.float32)
    context = Context(model.whole_rows(cu_seqlens, TOKENS, torch.device("cpu")), table)
    x = torch.randn(TOKENS, SMALL.hidden_size, generator=torch.Generator().manual_seed(1)).to(weight)
    return x.requires_grad_(), context


def run_block(model: Decoder) -> tuple[Tensor, Tensor, Watch]:
    """Input, output and what happened in the first block."""
    x, context = block_inputs(model)
    with Watch() as watch:
        y = model.layers["0"](x, context)
    return x, y, watch


def test_what_a_block_keeps_in_bytes() -> None:
    h, f, kv, heads = SMALL.hidden_size, SMALL.ffn_hidden_size, 16, SMALL.num_attention_heads
    kept = {
        # A residual stream more beside the input, two norms, q and attention's, k, v, gate, up and product, in bf16;
        # attention's normaliser of each head and the two norms' of each token, in fp32.
        "none": 2 * (3 * h + 2 * h + 2 * kv + 3 * f) + 4 * (heads + 2),
        "selective": 2 * (1 * h + 2 * h + 2 * kv + 2 * f) + 4 * (heads + 2),
        "full": 0,
    }
    assert kept == {"none": 648, "selective": 440, "full": 0}  # bytes a token
    for mode in get_args(Recompute):
        model = build(SMALL, mode, torch.bfloat16)
        _, y, watch = run_block(model)
        assert watch.alive(y) == TOKENS * kept[mode], mode


@pytest.mark.parametrize("kind", OTHER)
def test_other_blocks_keep_less_too(kind: str) -> None:
    h, f = SMALL.hidden_size, SMALL.ffn_hidden_size
    kept = {}
    for mode in get_args(Recompute):
        model = build(OTHER[kind], mode)
        _, y, watch = run_block(model)
        kept[mode] = watch.alive(y)
    # Both norms and the feed-forward's product; gated, its activation as well. (A squared relu keeps relu's result, and
    # here relu's input instead.)
    forgotten = 2 * h + f * (2 if OTHER[kind].gated else 1)
    assert kept["none"] - kept["selective"] == 4 * TOKENS * forgotten
    assert kept["full"] == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_keep_less_too(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    h, f, kv, heads = SMALL.hidden_size, SMALL.ffn_hidden_size, 16, SMALL.num_attention_heads
    model = build(SMALL, "selective", torch.bfloat16)
    compile_blocks(model, backend=backend)
    x, context = block_inputs(model)
    model.layers["0"](x, context)
    given = {id(x), *map(id, model.parameters()), *map(id, context.rotary or ())}
    kept: dict[int, Tensor] = {}
    pack = _CheapOutputs.pack

    def count(self: _CheapOutputs, tensor: Tensor) -> Any:
        if id(tensor) not in given:
            kept[tensor.untyped_storage()._cdata] = tensor
        return pack(self, tensor)

    monkeypatch.setattr(_CheapOutputs, "pack", count)
    model.layers["0"](x, context)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # As eager ones, without the norms' number of each token.
    assert found == TOKENS * (2 * (1 * h + 2 * h + 2 * kv + 2 * f) + 4 * heads)


def test_what_is_computed_again() -> None:
    calls = {}
    for mode in get_args(Recompute):
        x, y, forward = run_block(build(SMALL, mode))
        with Watch() as backward:
            y.sum().backward()
        assert x.grad is not None
        calls[mode] = forward.calls, backward.calls
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for mode in calls:
        assert calls[mode][0]["mm"] == 7  # q, k, v, o, gate, up, down
        assert calls[mode][0][attention] == 1
    # In the backward two a product; `full` computes six again: what down gave, nobody needs.
    assert {mode: found[1]["mm"] for mode, found in calls.items()} == {
        "none": 14,
        "selective": 14,
        "full": 20,
    }
    assert {mode: found[1][attention] for mode, found in calls.items()} == {
        "none": 0,
        "selective": 0,
        "full": 1,
    }
    # Norms: two again. The product of the gate: once again, beside its backward's own silu.
    assert {mode: found[1]["rsqrt_"] for mode, found in calls.items()} == {
        "none": 0,
        "selective": 2,
        "full": 2,
    }
    assert {mode: found[1]["silu"] for mode, found in calls.items()} == {"none": 1, "selective": 2, "full": 2}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_the_backward_leaves_no_more_than_the_forward_did(mode: Recompute) -> None:
    model = build(SMALL, mode)
    x, context = block_inputs(model)
    with Watch() as watch:
        y = model.layers["0"](x, context)
        before = watch.alive(y)
        y.sum().backward(retain_graph=True)
    assert x.grad is not None
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    # Though the graph is there still, and could be gone through again.
    assert watch.alive(y, *gradients) == before
    del y
    assert watch.alive(*gradients) == 0


def test_what_was_written_to_is_not_computed_again() -> None:
    def forward(x: Tensor, _context: object, _cache: object = None) -> Tensor:
        doubled = cheap(torch.neg, x).mul_(2)
        return (doubled * x).sum()  # -2 x^2

    x = torch.tensor([1.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(_selective(forward)(x, None), x)
    assert gradient.tolist() == [-4, -12]


def test_what_is_kept_must_not_be_written_to() -> None:
    def forward(x: Tensor, _context: object, _cache: object = None) -> Tensor:
        result = x.exp()  # which its gradient needs
        return result.mul_(2).sum()

    x = torch.tensor([1.0, 3.0], requires_grad=True)
    with pytest.raises(RuntimeError, match=r"a tensor \[2\] kept for the backward was written to"):
        _selective(forward)(x, None).backward()


# --- where it keeps out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_without_gradients_and_with_a_cache_nothing_changes(
    mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = build(SMALL, "none"), build(SMALL, mode)
    expected = plain(*packed())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("recomputes")

    monkeypatch.setattr("modelyard.model.recompute.checkpoint", refuse)
    monkeypatch.setattr("torch.autograd.graph.saved_tensors_hooks", refuse)
    with torch.no_grad():
        assert torch.equal(model(*packed()), expected)
    ids, positions = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]
    cu_seqlens = torch.tensor([[0, 3]], dtype=torch.int32)
    cached = model(ids, positions, cu_seqlens, KeyValueCache(SMALL))
    assert torch.equal(cached, plain(ids, positions, cu_seqlens))


def test_parameters_keep_their_names() -> None:
    names = [name for name, _ in build(SMALL, "none").named_parameters()]
    for mode in ("selective", "full"):
        assert [name for name, _ in build(SMALL, mode).named_parameters()] == names


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown recomputation 'some' \(there are: none, selective, full\)"
    ):
        build(SMALL, "some")  # type: ignore[arg-type]


def test_a_compiler_keeps_products_and_their_sums_over_processes() -> None:
    import modelyard.parallel.collectives  # noqa: F401 - defines the operators

    kept = {
        name: _keep_products(None, operation) == CheckpointPolicy.MUST_SAVE
        for name, operation in (
            ("mm", torch.ops.aten.mm.default),
            ("addmm", torch.ops.aten.addmm.default),
            ("reduce_scatter", torch.ops.modelyard.reduce_scatter.default),
            ("all_reduce", torch.ops.modelyard.all_reduce.default),
            ("all_gather", torch.ops.modelyard.all_gather.default),
            ("mul", torch.ops.aten.mul.Tensor),
        )
    }
    assert kept == {
        "mm": True,
        "addmm": True,
        "reduce_scatter": True,
        "all_reduce": True,
        "all_gather": False,
        "mul": False,
    }
