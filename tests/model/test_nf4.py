"""NF4 against the paper's formula, bitsandbytes, a plain loop, and itself cut in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from modelyard.model.nf4 import NF4, Quantized, dequantize, frozen_product, quantize, wide_scales

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])


def weights(rows: int = 24, columns: int = 256, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    found[rows // 2, :64] = 0
    return found.to(dtype)


def dequantize_plain(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """One value at a time."""
    codes, scales, ranges = quantized
    scale_dtype = scales.dtype if ranges is None else ranges.dtype
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    block = columns // scales.shape[1]
    result = torch.empty(rows, columns, dtype=dtype)
    for row in range(rows):
        for column in range(columns):
            byte = int(codes[row, column // 2])
            value = torch.tensor(NF4[byte & 15 if column % 2 else byte >> 4], dtype=scale_dtype)
            scale = scales[row, column // block]
            if ranges is not None:
                low, step = ranges[row]
                scale = low + step * scale.to(scale_dtype)
            result[row, column] = (value * scale).to(dtype)
    return result


def test_the_values_are_quantiles_of_the_normal_distribution() -> None:
    # Appendix E: the outermost quantile is the mean of 1 - 1/(2*15) and 1 - 1/(2*16); evenly spaced from there to 1/2.
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2

    def quantiles(number: int) -> list[float]:
        spaces = [outermost + (0.5 - outermost) * i / number for i in range(number)]
        return [NormalDist().inv_cdf(share) for share in spaces]

    largest = NormalDist().inv_cdf(outermost)
    expected = [-q / largest for q in quantiles(7)] + [0.0] + [q / largest for q in reversed(quantiles(8))]
    assert pytest.approx(expected, abs=2e-7) == list(NF4)
    assert torch.tensor(NF4, dtype=torch.float32).double().tolist() == list(NF4)  # exact in fp32


def test_a_block_by_hand() -> None:
    weight = torch.tensor([[2.0, -2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    quantized = quantize(weight, block=4)
    # 1.0 is half of the largest: between 0.4407 and 0.5626, whose middle is 0.5017.
    assert quantized.codes.tolist() == [[0xF0, 0x7C, 0x77, 0x77]]
    assert quantized.scales.tolist() == [[2.0, 0.0]]
    assert quantized.range is None
    assert dequantize(quantized, torch.float32).tolist() == [[2.0, -2.0, 0.0, 2 * NF4[12], 0, 0, 0, 0]]


def test_scales_in_eight_bits_by_hand() -> None:
    # Scales 1, 2 and 1 + 255 * 2^-6: steps of 2^-6, and 2 is the 64th.
    weight = torch.tensor([[1.0, 0, 0, 0, 2.0, 0, 0, 0, -(1 + 255 / 64), 0, 0, 0]])
    quantized = quantize(weight, block=4, double=True)
    assert quantized.scales.tolist() == [[0, 64, 255]]
    assert quantized.range is not None
    assert quantized.range.tolist() == [[1.0, 2**-6]]
    assert dequantize(quantized, torch.float32).tolist() == weight.tolist()


@DTYPES
@DOUBLE
def test_dequantize_equals_the_plain_loop(dtype: torch.dtype, double: bool) -> None:
    quantized = quantize(weights(6, 128, dtype=dtype), 32, double)
    for result in {dtype, torch.float32, torch.bfloat16}:
        assert torch.equal(dequantize(quantized, result), dequantize_plain(quantized, result))


@DTYPES
def test_each_code_is_the_nearest(dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    quantized = quantize(weight)
    wide = weight.to(quantized.scales.dtype)
    table = torch.tensor(NF4, dtype=wide.dtype)
    possible = quantized.scales.repeat_interleave(64, 1)[..., None] * table
    nearest = (possible - wide[..., None]).abs().amin(-1)
    error = (dequantize(quantized, wide.dtype) - wide).abs()
    assert torch.allclose(error, nearest, rtol=1e-5, atol=0)
    assert quantized.scales.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_bits_are_those_of_bitsandbytes(dtype: torch.dtype, block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(NF4)
    table = torch.tensor(NF4)
    halfway = torch.cat([torch.ones(1), (table[:-1] + table[1:]) / 2])
    scales = torch.rand(1024, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    # With values between two codes, as far as a product of two numbers can be.
    weight = torch.cat([weights(64, 512), (scales * halfway).view(-1, 512)]).to(dtype)
    theirs, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    ours = quantize(weight, block)
    assert torch.equal(ours.codes.flatten(), theirs.flatten())
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(dequantize(ours, dtype).flatten(), functional.dequantize_4bit(theirs, state).flatten())


def test_scales_in_eight_bits_cost_no_more_than_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)) * 0.02
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(theirs, state).view_as(weight)
    ours = dequantize(quantize(weight, double=True), torch.float32)
    assert (ours - weight).norm() <= (theirs - weight).norm()


def test_ties_go_to_the_lower_code() -> None:
    table = torch.tensor(NF4)
    halfway = (table[:-1] + table[1:]) / 2
    weight = torch.cat([torch.ones(1), halfway])[None]
    codes = quantize(weight, block=16).codes
    assert torch.stack([codes >> 4, codes & 15], -1).flatten().tolist() == [15, *range(15)]


@DOUBLE
def test_the_error_of_normal_weights(double: bool) -> None:
    """Of normal values in blocks of 64, 4-bit NF4 loses about 9.2%: the root of its mean square error."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    error = (dequantize(quantize(weight, double=double), torch.float32) - weight).norm() / weight.norm()
    assert 0.090 < error < 0.094


@DTYPES
def test_eight_bits_a_scale(dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    exact, narrow = quantize(weight), quantize(weight, double=True)
    assert torch.equal(exact.codes, narrow.codes)
    assert narrow.range is not None
    assert narrow.scales.dtype == torch.uint8
    spread = exact.scales.amax(1) - exact.scales.amin(1)
    error = (wide_scales(narrow) - exact.scales).abs().amax(1)
    assert (error <= spread * 0.502 / 255).all()
    assert wide_scales(narrow)[12, 0] == 0  # the block of zeros
    # The product of step and uint8 has no rounding, whichever way it is computed.
    step = narrow.range[:, 1].double()
    products = torch.outer(step, torch.arange(256, dtype=torch.float64))
    assert torch.equal(products.to(narrow.range.dtype).double(), products)


@DOUBLE
def test_a_row_of_one_scale_keeps_it(double: bool) -> None:
    weight = torch.full((3, 128), 0.3)
    assert torch.equal(dequantize(quantize(weight, 32, double), torch.float32), weight)


@DTYPES
@DOUBLE
def test_any_cut_of_the_rows_gives_the_same_bits(
    dtype: torch.dtype, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights(31, 512, dtype)
    whole = quantize(weight, 64, double)
    restored = dequantize(whole, dtype)
    for rows in (slice(0, 1), slice(5, 18), slice(18, 31)):
        piece = quantize(weight[rows], 64, double)
        for part, of_whole in zip(piece, whole, strict=True):
            assert (part is None and of_whole is None) or torch.equal(part, of_whole[rows])
        assert torch.equal(dequantize(piece, dtype), restored[rows])
    # Nor does it matter how many rows are worked on at once.
    monkeypatch.setattr("modelyard.model.nf4._rows_at_once", lambda matrix: 7)
    assert torch.equal(quantize(weight, 64, double).codes, whole.codes)
    assert torch.equal(quantize(weight, 64, double).scales, whole.scales)
    assert torch.equal(dequantize(whole, dtype), restored)


@DTYPES
@DOUBLE
def test_columns_are_cut_between_blocks(dtype: torch.dtype, double: bool) -> None:
    weight = weights(8, 512, dtype)
    whole = quantize(weight, 64, double)
    left = quantize(weight[:, :192], 64)
    assert torch.equal(left.codes, whole.codes[:, :96])
    piece = Quantized(whole.codes[:, 96:], whole.scales[:, 3:], whole.range)
    assert torch.equal(dequantize(piece, dtype), dequantize(whole, dtype)[:, 192:])
    if not double:
        assert torch.equal(left.scales, whole.scales[:, :3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = weights()
    weight[5, 100] = bad
    for double in (False, True):
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight, double=double)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for block in (0, 3, 48, -64):
        with pytest.raises(ValueError, match=f"rows of 256 values cannot be cut into blocks of {block}"):
            quantize(weights(), block)
    with pytest.raises(ValueError, match=r"not torch.float32 \[256\]"):
        quantize(weights()[0])
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        quantize(torch.zeros(4, 64, dtype=torch.int64))


def saved(function: Callable[[], Tensor]) -> tuple[Tensor, list[torch.Size]]:
    """What `function` gives, and the shapes of what autograd keeps for its backward."""
    shapes = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return function(), shapes


@DTYPES
@DOUBLE
def test_the_product_and_its_gradient(dtype: torch.dtype, double: bool) -> None:
    quantized = quantize(weights(48, 128, dtype), 32, double)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    gradient = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrix = dequantize(quantized, dtype)
    y, kept = saved(lambda: frozen_product(x, quantized))
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, matrix))
    assert sorted(kept) == sorted(part.shape for part in quantized if part is not None)
    y.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, gradient @ matrix)
    assert not frozen_product(x.detach(), quantized).requires_grad


@DOUBLE
def test_compiled_it_gives_the_same_and_keeps_no_matrix(double: bool) -> None:
    quantized = quantize(weights(48, 128, torch.bfloat16), 32, double)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).bfloat16()

    def run(function: Callable[[Tensor, Quantized], Tensor]) -> tuple[Tensor, Tensor, list[torch.Size]]:
        leaf = x.clone().requires_grad_()
        y, shapes = saved(lambda: function(leaf, quantized))
        y.sum().backward()
        assert leaf.grad is not None
        return y.detach(), leaf.grad, shapes

    def between(x: Tensor, quantized: Quantized) -> Tensor:
        return frozen_product(x * 2, quantized).relu()

    torch.compiler.reset()
    eager_y, eager_gradient, _ = run(between)
    y, gradient, shapes = run(
        torch.compile(between, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    )
    assert torch.equal(y, eager_y)
    assert torch.equal(gradient, eager_gradient)
    assert torch.Size([48, 128]) not in shapes
    torch.compiler.reset()
