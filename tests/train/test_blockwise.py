"""Eight bits a value: the numbers of the paper, the nearest of them, and what is read back stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelyard.train.blockwise import BLOCK, Blockwise, dynamic_values

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def narrowed(values: Tensor, *, signed: bool) -> Blockwise:
    found = Blockwise(values.numel(), signed=signed, dtype=values.dtype, device=values.device)
    for piece in found.pieces():
        found.write(piece, values[piece])
    return found


def wide(narrow: Blockwise) -> Tensor:
    return torch.cat([narrow.read(piece) for piece in narrow.pieces()])


def values(length: int = 10 * BLOCK, *, signed: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many sizes within a block and from block to block; with zeros."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(length, generator=generator) * 10 ** (4 * torch.rand(length, generator=generator) - 4)
    found *= 10 ** torch.linspace(-12, 3, -(-length // BLOCK)).repeat_interleave(BLOCK)[:length]
    found[5:20] = 0
    return (found if signed else found.abs()).to(dtype)


@SIGNED
def test_the_values_are_those_of_the_paper(signed: bool) -> None:
    found = dynamic_values(signed=signed)
    assert len(set(found)) == 256
    assert list(found) == sorted(found)
    assert 0.0 in found
    assert found[-1] == 1
    if signed:
        # One between 1e-7 and 1e-6; 64 between 0.1 and 1, the middles of steps of 0.9 / 64.
        assert found[128:130] == pytest.approx((5.5e-7, 3.25e-6))
        assert found[-2] == pytest.approx(1 - 0.45 / 64)
        assert found[:127] == tuple(-value for value in reversed(found[128:255]))
    else:
        assert found[:4] == pytest.approx((0, 3.25e-7, 7.75e-7, 2.125e-6))
        assert found[-2] == pytest.approx(1 - 0.45 / 128)


@SIGNED
def test_the_values_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map(signed).tolist()
    assert dynamic_values(signed=signed) == pytest.approx(theirs, rel=1e-6)


@SIGNED
@DTYPES
def test_each_value_becomes_the_nearest(signed: bool, dtype: torch.dtype) -> None:
    exact = values(signed=signed, dtype=dtype)
    found = wide(narrowed(exact, signed=signed)).unflatten(0, (-1, BLOCK))
    exact = exact.unflatten(0, (-1, BLOCK))
    at = exact.abs().argmax(1, keepdim=True)
    scale = exact.gather(1, at)
    assert torch.equal(found.gather(1, at), scale), "the largest is kept as it is, whatever its sign"
    table = torch.tensor(dynamic_values(signed=signed)[0 if signed else 1 :], dtype=torch.float64)
    relative = exact.double() / scale.double()
    nearest = (relative[..., None] - table).abs().amin(-1)
    error = (found.double() / scale.double() - relative).abs()
    # Of fp32 19 bits say which is the nearest: relative to the value, less than 2^-10.
    assert (error <= nearest + relative.abs() * 2.0**-10 + 1e-12).all()
    assert (error <= relative.abs() * 0.5 + 1e-6).all()


@SIGNED
@DTYPES
@pytest.mark.parametrize("length", [1, BLOCK - 1, 3 * BLOCK, (1 << 17) + 300], ids=str)
def test_what_was_read_and_is_narrowed_again_does_not_change(
    signed: bool, dtype: torch.dtype, length: int
) -> None:
    exact = values(length, signed=signed, dtype=dtype)
    exact[: BLOCK // 2] *= 1e-35  # fp32 has fewer bits left for these
    once = narrowed(exact, signed=signed)
    again = narrowed(wide(once), signed=signed)
    assert wide(once).shape == exact.shape
    assert torch.equal(wide(again), wide(once))
    assert torch.equal(again.scales, once.scales)
    normal = (once.scales.abs() > 1e-30).repeat_interleave(BLOCK)[:length]
    assert torch.equal(again.codes[:length][normal], once.codes[:length][normal])


def test_two_of_one_size_and_other_signs() -> None:
    exact = torch.tensor([-3.0, 3.0, 0.5] + [0.0] * 253)
    once = wide(narrowed(exact, signed=True))
    assert once[1] == 3
    assert once[0] == pytest.approx(-3, rel=0.008)
    assert torch.equal(wide(narrowed(once, signed=True)), once)
    down = wide(narrowed(torch.tensor([-4.0, 1.0]), signed=True))
    assert down.tolist() == [-4.0, pytest.approx(1.0, rel=0.02)]


def test_no_second_moment_vanishes() -> None:
    """Beside one that is a thousand million times as large."""
    exact = torch.full((BLOCK,), 1e-9)
    exact[7] = 1.0
    found = wide(narrowed(exact, signed=False))
    assert found[7] == 1
    assert found[0] == pytest.approx(3.25e-7)
    assert wide(narrowed(torch.zeros(300), signed=False)).eq(0).all()
    assert wide(Blockwise(300, signed=False, dtype=torch.float32, device=torch.device("cpu"))).eq(0).all()


def test_its_bytes() -> None:
    assert Blockwise(
        10 * BLOCK, signed=True, dtype=torch.float32, device=torch.device("cpu")
    ).nbytes == 10 * (256 + 4)
    assert (
        Blockwise(10 * BLOCK + 1, signed=True, dtype=torch.float32, device=torch.device("cpu")).nbytes
        == 11 * 260
    )
