from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from modelyard.model import torch_private
from modelyard.model.attention import attend


def visible_left(q: Tensor, window_size: tuple[int, int]) -> int | None:
    left, right = window_size
    assert right == 0  # causal
    return None if left == -1 else left + 1


def as_in_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=None, scale=None, window_size=(-1, -1)):
    assert q.shape[1] == k.shape[1], "2.11 repeats no groups"
    window = visible_left(q, window_size)
    return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window=window, backend="dense")


def as_in_2_13(
    q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    window = visible_left(q, window_size)
    return attend(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window=window, backend="dense")


@pytest.fixture(autouse=True)
def forget_the_signature() -> Iterator[None]:
    torch_private._varlen_parameters.cache_clear()
    yield
    torch_private._varlen_parameters.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("function", [as_in_2_11, as_in_2_13])
def test_both_signatures_are_called_with_our_meaning(
    function: object, groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", function)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(7, 4, 8, generator=generator)
    k, v = torch.randn(2, 9, groups, 8, generator=generator)
    cu_q, cu_k = torch.tensor([0, 2, 7], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    out = torch_private.varlen_attention(q, k, v, cu_q, cu_k, 5, 5, window=window)
    torch.testing.assert_close(out, attend(q, k, v, cu_q, cu_k, 5, 5, window=window, backend="loop"))


def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, is_causal: q)
    q = torch.zeros(2, 1, 8)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="another varlen_attn"):
        torch_private.varlen_attention(q, q, q, cu, cu, 2, 2, window=None)
