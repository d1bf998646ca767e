from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modelyard.model.attention import _varlen_obstacle, attend, flatten_boundaries

Lengths = list[tuple[int, int]]


def make(lengths: Lengths, *, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(sum(q * 7 + k for q, k in lengths))
    cu_q, cu_k = (
        torch.tensor(
            [0, *(sum(x[i] for x in lengths[: n + 1]) for n in range(len(lengths)))], dtype=torch.int32
        )
        for i in (0, 1)
    )
    q = torch.randn(int(cu_q[-1]), heads, 8, dtype=dtype, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(int(cu_k[-1]), groups, 8, dtype=dtype, generator=generator, requires_grad=True)
        for _ in "kv"
    )
    return (q, k, v), (cu_q, cu_k, max(x[0] for x in lengths), max(x[1] for x in lengths))


CASES: dict[str, Lengths] = {
    "documents": [(5, 5), (1, 1), (11, 11)],
    "one length": [(6, 6)] * 3,
    "lower right": [(3, 9), (4, 4), (1, 7)],
    "one length, lower right": [(2, 9)] * 2,
    "empty segments": [(0, 0), (5, 5), (0, 4), (2, 3)],
    "decoding": [(1, 12)],
    "longer than a block": [(150, 170), (40, 40)],
}


@pytest.mark.parametrize(
    ("capability", "works"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_flash_attention_is_for_ampere_and_newer(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A V100 or T4, which have fp16 alone, take the loop."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, dtype=torch.float16, shape=(5, 4, 64), device=torch.device("cuda"))
    obstacle = _varlen_obstacle(q)  # type: ignore[arg-type]
    assert (obstacle is None) == works
    assert (
        works
        or obstacle == f"needs a GPU of compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    )


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=["grouped", "plain", "one group"])
@pytest.mark.parametrize("case", CASES)
def test_loop_equals_the_dense_reference(case: str, heads: tuple[int, int], window: int | None) -> None:
    inputs, boundaries = make(CASES[case], heads=heads[0], groups=heads[1])
    expected = attend(*inputs, *boundaries, window=window, backend="dense")
    out = attend(*inputs, *boundaries, window=window, backend="loop")
    torch.testing.assert_close(out, expected)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad(out, inputs, weights)
    for ours, reference in zip(gradients, torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(ours, reference)


def test_dense_reference_by_hand() -> None:
    q = torch.zeros(3, 1, 2)
    k = torch.zeros(4, 1, 2)
    v = torch.tensor([[1.0, 0], [2, 0], [6, 0], [10, 4]])[:, None]
    cu_q, cu_k = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 4], dtype=torch.int32)
    out = attend(q, k, v, cu_q, cu_k, 2, 3, backend="dense")
    # equal scores: means of the keys seen. Two queries of three keys see 2 and 3 of them; the last its own alone.
    torch.testing.assert_close(out[:, 0], torch.tensor([[1.5, 0], [3, 0], [10, 4]]))
    out = attend(q, k, v, cu_q, cu_k, 2, 3, backend="dense", window=1)
    torch.testing.assert_close(out[:, 0], torch.tensor([[2.0, 0], [6, 0], [10, 4]]))


def test_bf16_keeps_its_dtype() -> None:
    inputs, boundaries = make(CASES["documents"])
    exact = attend(*inputs, *boundaries)
    out = attend(*(t.bfloat16() for t in inputs), *boundaries)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.05)


def test_what_cannot_be_honoured_is_refused() -> None:
    (q, k, v), (cu_q, cu_k, max_q, max_k) = make([(3, 3), (2, 2)])
    with pytest.raises(ValueError, match="varlen backend needs CUDA"):
        attend(q, k, v, cu_q, cu_k, max_q, max_k, backend="varlen")
    for backend in ("loop", "dense"):
        with pytest.raises(ValueError, match="cover all tokens"):
            attend(q, k, v, cu_q[:-1], cu_k[:-1], max_q, max_k, backend=backend)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no more queries than keys"):
            attend(q, k[:-1], v[:-1], cu_q, cu_k.clamp(max=4), max_q, max_k, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one token"):
        attend(q, k, v, cu_q, cu_k, max_q, max_k, window=0)
    with pytest.raises(ValueError, match="do not fit"):
        attend(q[:, :3], k, v, cu_q, cu_k, max_q, max_k)
    with pytest.raises(ValueError, match="unknown attention backend"):
        attend(q, k, v, cu_q, cu_k, max_q, max_k, backend="flash")  # type: ignore[arg-type]


def test_rows_are_laid_end_to_end() -> None:
    rows = torch.tensor([[0, 3, 8, 8], [0, 8, 8, 8], [0, 1, 2, 8]], dtype=torch.int32)
    boundaries = flatten_boundaries(rows, 8, torch.device("cpu"))
    assert boundaries.cu_seqlens.tolist() == [0, 3, 8, 16, 17, 18, 24]
    assert boundaries.cu_seqlens.dtype == torch.int32
    assert boundaries.longest == 8
