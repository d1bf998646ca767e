from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.loss import cross_entropy
from modelyard.loss.cross_entropy import linear_cross_entropy, token_scores

VOCABULARY, HIDDEN, TOKENS = 11, 6, 9


def inputs(dtype: torch.dtype = torch.float64, *, ignored: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (
        torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[:ignored]] = -100
    return hidden, weight, labels


@pytest.fixture(params=[1 << 24, 4 * VOCABULARY], ids=["one chunk", "chunks of four"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = request.param // VOCABULARY
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda weight: rows)


def test_by_hand() -> None:
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    weight = torch.tensor([[math.log(3), 0.0], [0.0, 0.5 * math.log(4)]])
    labels = torch.tensor([0, 0, -100])
    # logits (log 3, 0) and (0, log 4): probabilities 3/4 and 1/5 of the labels
    expected = math.log(4 / 3) + math.log(5)
    for implementation in ("fused", "torch", "auto"):
        loss = linear_cross_entropy(hidden, weight, labels, implementation=implementation)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    for implementation in ("fused", "torch", "auto"):
        scores = token_scores(hidden, weight, labels, implementation=implementation)
        assert scores.losses.tolist() == pytest.approx([math.log(4 / 3), math.log(5), 0.0], rel=1e-6)
        assert scores.hits.tolist() == [True, False, False]
    with_z = linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    assert with_z.item() == pytest.approx(expected + 0.1 * (math.log(4) ** 2 + math.log(5) ** 2), rel=1e-6)


def central_differences(function: Callable[[], Tensor], tensor: Tensor, step: float = 1e-5) -> Tensor:
    """Not gradcheck: that runs a backward twice."""
    result = torch.empty_like(tensor)
    with torch.no_grad():
        flat, out = tensor.view(-1), result.view(-1)
        for i, value in enumerate(flat.tolist()):
            flat[i] = value + step
            above = function()
            flat[i] = value - step
            out[i] = (above - function()) / (2 * step)
            flat[i] = value
    return result


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.3}, {"logits_scale": 0.7}, {"z_loss": 0.1, "logits_scale": 2.0}]
)
def test_fused_gradients_are_the_derivatives(options: dict[str, float]) -> None:
    hidden, weight, labels = inputs()

    def loss() -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, implementation="fused", **options)

    loss().backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, central_differences(loss, tensor), atol=1e-7, rtol=1e-7)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("ignored", [0, 3, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_equals_its_twin_and_torch(dtype: torch.dtype, ignored: int) -> None:
    hidden, weight, labels = inputs(dtype, ignored=ignored)
    results = {}
    for implementation in ("fused", "torch"):
        loss = linear_cross_entropy(hidden, weight, labels, implementation=implementation)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        # a factor beside the sum: the backward must scale by whatever arrives
        results[implementation] = (loss, *torch.autograd.grad(loss * 0.3, (hidden, weight)))
    logits = F.linear(hidden, weight).to(results["torch"][0].dtype)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, reference in zip(results["fused"], results["torch"], strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(results["fused"][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("chunks")
def test_gradients_of_only_one_input() -> None:
    hidden, weight, labels = inputs()
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    torch.testing.assert_close((hidden.grad, weight.grad), both)
    assert (hidden.grad[labels == -100] == 0).all()


def test_bf16_weight_gradient_is_summed_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 equal tokens one a chunk: a bf16 sum would stop growing at 256 times one token's gradient."""
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda weight: 1)
    hidden = torch.ones(4096, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64)).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("implementation", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [0, 3, TOKENS])
def test_scores_are_those_of_torch(dtype: torch.dtype, implementation: str, ignored: int) -> None:
    hidden, weight, labels = inputs(dtype, ignored=ignored)
    some = (labels != -100).nonzero().flatten()[::2]
    labels[some] = F.linear(hidden, weight).argmax(-1)[some]
    scores = token_scores(hidden, weight, labels, implementation=implementation, logits_scale=0.5, z_loss=0.1)
    logits = F.linear(hidden, weight).to(scores.losses.dtype) * 0.5
    z_loss = 0.1 * logits.logsumexp(-1).square().where(labels != -100, 0.0)
    expected = F.cross_entropy(logits, labels, reduction="none") + z_loss
    assert not scores.losses.requires_grad
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(scores.losses, expected.detach(), atol=tolerance, rtol=tolerance)
    assert scores.hits.tolist() == (logits.argmax(-1) == labels).tolist()
    assert int(scores.hits.sum()) >= len(some)


@pytest.mark.parametrize("implementation", ["fused", "torch"])
def test_of_equally_likely_words_the_first_is_the_likeliest(implementation: str) -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0], [2.0]])
    scores = token_scores(
        torch.tensor([[1.0]] * 5 + [[0.0]] * 2), weight, torch.tensor([0, 1, 2, 3, 4, 0, 1]),
        implementation=implementation,
    )  # fmt: skip
    assert scores.hits.tolist() == [False, True, False, False, False, True, False]


def test_without_gradients_none_are_made() -> None:
    hidden, weight, labels = inputs(torch.float32)
    trained = linear_cross_entropy(hidden, weight, labels)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, labels)
    assert not evaluated.requires_grad
    assert evaluated.item() == pytest.approx(trained.item(), rel=1e-6)
    detached = linear_cross_entropy(hidden.detach(), weight.detach(), labels)
    assert not detached.requires_grad


def test_backward_runs_once() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(2.0)


def test_unknown_implementation() -> None:
    for function in (linear_cross_entropy, token_scores):
        with pytest.raises(ValueError, match="'triton'"):
            function(*inputs(), implementation="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_taken_weight_gradient_is_what_autograd_gets_before_it_is_narrowed(
    dtype: torch.dtype, chunks: None
) -> None:
    """The scale and the factor of the backward included; the hidden states' gradient is autograd's as ever."""
    hidden, weight, labels = inputs(dtype)
    (3 * linear_cross_entropy(hidden, weight, labels, logits_scale=0.5)).backward()
    plain_hidden, plain_weight, _ = inputs(dtype)
    taken: list[Tensor] = []
    loss = linear_cross_entropy(
        plain_hidden, plain_weight, labels, logits_scale=0.5, weight_gradient_to=taken.append
    )
    assert taken == []
    (3 * loss).backward()
    assert plain_weight.grad is None
    assert len(taken) == 1
    assert taken[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weight.grad is not None
    assert torch.equal(taken[0].to(dtype), weight.grad)
    assert hidden.grad is not None
    assert plain_hidden.grad is not None
    assert torch.equal(hidden.grad, plain_hidden.grad)


def test_narrow_products_are_added_wide_in_stretches() -> None:
    """600 rows of 4,096 are two whole stretches and a rest; 256 + 1 is 257 in fp32 only."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-3, 4, (600, 2), generator=generator).bfloat16()
    b = torch.randint(-3, 4, (2, 4096), generator=generator).bfloat16()
    total = torch.full((600, 4096), float("nan"))
    cross_entropy._add_narrow_product(total, a, b, first=True)
    assert torch.equal(total, a.float() @ b.float())
    total.fill_(256.0)
    cross_entropy._add_narrow_product(total, a, b, first=False)
    assert torch.equal(total, 256 + a.float() @ b.float())


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("implementation", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "logits_scale": 2.0}])
def test_a_scale_on_the_gradients_leaves_the_loss(
    implementation: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    """A power of two: gradients are its multiples to the bit, but where fp16 is too coarse for the smaller ones."""
    plain, scaled = [], []
    for scale, found in ((1.0, plain), (64.0, scaled)):
        hidden, weight, labels = inputs(dtype)
        loss = linear_cross_entropy(
            hidden, weight, labels, implementation=implementation, gradient_scale=scale, **options
        )
        loss.backward()
        found += [loss.detach(), hidden.grad, weight.grad]
    assert torch.equal(plain[0], scaled[0])
    for a, b in zip(plain[1:], scaled[1:]):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(
            b, 64 * a, rtol=0 if dtype != torch.float16 else 1e-2, atol=0.05 * (dtype == torch.float16)
        )


def test_in_fp16_a_scale_keeps_small_gradients() -> None:
    """Of 30,000 unlikely words: each one's is less than fp16's smallest number, 6e-8."""
    words, scale = 30_000, 2.0**12
    hidden = torch.zeros(4, 8, dtype=torch.float16)
    hidden[:, 0] = 1
    weight = torch.zeros(words, 8, dtype=torch.float16)
    weight[0, 0] = 8  # the label; each other word has the probability e^-18, 1.5e-8
    weight[1:, 0] = -10
    weight[1:, 1] = 1
    labels = torch.zeros(4, dtype=torch.int64)
    exact = weight.double().requires_grad_()
    linear_cross_entropy(hidden.double(), exact, labels).backward()
    assert exact.grad is not None
    errors = []
    for gradient_scale in (1.0, scale):
        narrow = weight.clone().requires_grad_()
        loss = linear_cross_entropy(hidden, narrow, labels, gradient_scale=gradient_scale)
        loss.backward()
        assert narrow.grad is not None
        others, expected = narrow.grad[1:, 0].double() / gradient_scale, exact.grad[1:, 0]
        errors.append(float((others - expected).norm() / expected.norm()))
    assert errors[0] == pytest.approx(1)  # there is nothing of them
    assert errors[1] < 2e-3
