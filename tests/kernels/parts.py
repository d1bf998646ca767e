"""Each kernel against torch's own operations in fp64, and against its twin. Imported by `tests.kernels.cases`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelyard import kernels
from tests.kernels.checking import assert_close, assert_same, case, hold, in_each_dtype, random

# --- the parts of a block ---------------------------------------------------------------------------------------


@in_each_dtype
def swiglu(device: torch.device, dtype: torch.dtype) -> None:
    from modelyard.kernels.swiglu import BLOCK, swiglu

    draw = partial(random, dtype=dtype, device=device)
    halves = draw(3, BLOCK + 40, seed=3)
    for shapes in (
        [draw(2, 3, 24, seed=1), draw(2, 3, 24, seed=2)],
        [draw(2, BLOCK + 17, seed=1), draw(2, BLOCK + 17, seed=2)],  # more than a program's columns
        list(halves.chunk(2, 1)),  # of one product of gate and up
        [halves.chunk(2, 1)[0], draw(3, BLOCK // 2 + 20, seed=4)],
    ):
        hold(lambda g, u: (swiglu(g, u),), lambda g, u: (F.silu(g) * u,), shapes, str(shapes[0].shape))
    nothing = draw(0, 8, seed=0)
    assert swiglu(nothing, nothing).shape == (0, 8)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """By multiplying complex numbers."""
    first, second = x.chunk(2, -1)
    out = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([out.real, out.imag], -1)


@in_each_dtype
def rotary(device: torch.device, dtype: torch.dtype) -> None:
    from modelyard.kernels.rotary import rotate

    draw = partial(random, dtype=dtype, device=device)
    for heads, groups, half in ((6, 3, 4), (4, 1, 5), (3, 3, 8)):
        angle = random(5, 1, half, seed=0, dtype=torch.float32, device=device)
        cos, sin = angle.cos(), angle.sin()
        wide = angle.double()
        both = draw(5, heads + groups + groups, 2 * half, seed=1)  # queries, keys and values of one product
        for q, k in (
            (draw(5, heads, 2 * half, seed=1), draw(5, groups, 2 * half, seed=2)),
            (both[:, :heads], both[:, heads : heads + groups]),
        ):
            hold(
                lambda q, k, cos=cos, sin=sin: rotate(q, k, cos, sin),
                lambda q, k, wide=wide: (turned(q, wide), turned(k, wide)),
                [q, k],
                f"{heads} heads and {groups} groups of {2 * half}",
            )


@in_each_dtype
def norm(device: torch.device, dtype: torch.dtype) -> None:
    from modelyard.kernels import rms_norm

    programs = rms_norm.PROGRAMS
    for rms_norm.PROGRAMS in (programs, 2):  # a token for each program; three for one and two for the other
        x = random(5, 1, 24, seed=1, dtype=dtype, device=device)
        weight = random(24, seed=2, dtype=dtype, device=device)
        hold(
            lambda x, w: (rms_norm.rms_norm(x, w, 1e-5),),
            lambda x, w: (F.rms_norm(x, (24,), w, 1e-5),),
            [x, weight],
            f"{rms_norm.PROGRAMS} programs",
        )
    rms_norm.PROGRAMS = programs


@in_each_dtype
def norm_of_a_sum(device: torch.device, dtype: torch.dtype) -> None:
    from modelyard.kernels.rms_norm import rms_norm, rms_norm_of_sum

    draw = partial(random, dtype=dtype, device=device)
    x, added, weight = draw(4, 3, 24, seed=1), draw(4, 3, 24, seed=2), draw(24, seed=3)

    def exact(x: Tensor, added: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + added, F.rms_norm(x + added, (24,), weight, 1e-5)

    hold(lambda *t: rms_norm_of_sum(*t, 1e-5), exact, [x, added, weight], "the sum's norm")
    total, normal = rms_norm_of_sum(x, added, weight, 1e-5)
    # What recomputation relies on.
    assert_same(normal, rms_norm(total, weight, 1e-5), "the norm of the sum that was kept")
    # A wider residual stream.
    stream = random(4, 3, 24, seed=1, dtype=torch.float32, device=device)
    hold(lambda *t: rms_norm_of_sum(*t, 1e-5), exact, [stream, added, weight], "a wide stream")
    total, normal = rms_norm_of_sum(stream, added, weight, 1e-5)
    assert (total.dtype, normal.dtype) == (torch.float32, dtype)


@case
def norm_rounds_where_its_twin_does(device: torch.device) -> None:
    """To the stream's dtype before the weight, too: without that a quarter of the values would be others."""
    from modelyard.kernels.rms_norm import rms_norm
    from modelyard.model.elementwise import rms_norm_plain

    x = random(8, 64, seed=1, dtype=torch.float16, device=device)
    weight = random(64, seed=2, dtype=torch.float16, device=device)
    same = (rms_norm(x, weight, 1e-5) == rms_norm_plain(x, weight, 1e-5)).double().mean().item()
    assert same > 0.98, f"{same:.0%} are the same"


@case
def norm_without_a_gradient_of_the_weight(device: torch.device) -> None:
    from modelyard.kernels.rms_norm import rms_norm

    x = random(3, 8, seed=1, dtype=torch.float32, device=device).requires_grad_()
    weight = random(8, seed=2, dtype=torch.float32, device=device)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is None
    exact = x.detach().double().requires_grad_()
    F.rms_norm(exact, (8,), weight.double(), 1e-5).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_close(x.grad, exact.grad, "gradient")


# --- loss -------------------------------------------------------------------------------------------------------


@in_each_dtype
def cross_entropy(device: torch.device, dtype: torch.dtype) -> None:
    from modelyard.kernels.cross_entropy import BLOCK, softmax_gradient_

    for words, z_loss, logits_scale, gradient_scale in (
        (37, 0.0, 1.0, 1.0),
        (BLOCK + 3, 1e-2, 0.5, 8.0),
        (64, 0.0, 3.0, 1.0),
    ):
        buffer = random(4, words + 5, seed=1, dtype=dtype, device=device).mul_(4)
        beyond = buffer[:, words:].clone()
        logits, targets = buffer[:, :words], torch.tensor([0, words - 1, 5, 5], device=device)
        exact = (logits.detach().double() * logits_scale).requires_grad_()
        expected = F.cross_entropy(exact, targets, reduction="none")
        expected = expected + z_loss * exact.logsumexp(-1).square()
        expected.sum().backward()
        losses = softmax_gradient_(
            logits, targets, logits_scale=logits_scale, gradient_scale=gradient_scale, z_loss=z_loss
        )
        assert exact.grad is not None
        assert_close(losses, expected, f"losses of {words} words", 1e-6)
        assert_close(logits, exact.grad * gradient_scale, f"gradient of {words} words")
        assert_same(buffer[:, words:], beyond, "what lies beside the logits")


@case
def cross_entropy_of_logits_far_apart(device: torch.device) -> None:
    from modelyard.kernels.cross_entropy import softmax_gradient_

    logits = torch.tensor([[3e4, -3e4, 0.0], [-1e30, -1e30, -1e30]], device=device)
    losses = softmax_gradient_(
        logits, torch.tensor([2, 0], device=device), logits_scale=1.0, gradient_scale=1.0, z_loss=0.0
    )
    assert losses[0].item() == 3e4
    assert logits[0].tolist() == [1.0, 0.0, -1.0]
    logits = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]], device=device)
    losses = softmax_gradient_(
        logits, torch.tensor([0, 1], device=device), logits_scale=1.0, gradient_scale=1.0, z_loss=0.0
    )
    assert not losses.isfinite().any(), "a step that must be skipped would not be"


@case
def the_loss_that_training_takes(device: torch.device) -> None:
    """`linear_cross_entropy`: several chunks, masked labels; loss and gradients against torch's twin."""
    from modelyard.loss.cross_entropy import linear_cross_entropy

    for dtype in (torch.float32, torch.float16):
        draw = partial(random, dtype=dtype, device=device)
        labels = torch.tensor([3, -100, 0, 28, 28], device=device)
        found = {}
        for choice in ("torch", "triton"):
            hidden, weight = draw(5, 16, seed=1).requires_grad_(), draw(29, 16, seed=2).requires_grad_()
            with kernels.chosen(choice):  # type: ignore[arg-type]
                loss = linear_cross_entropy(
                    hidden, weight, labels, z_loss=1e-3, logits_scale=0.5, gradient_scale=2.0
                )
            loss.backward()
            assert hidden.grad is not None
            assert weight.grad is not None
            found[choice] = loss, hidden.grad, weight.grad
        for ours, twin in zip(found["triton"], found["torch"], strict=True):
            assert_close(ours, twin.double(), str(dtype))


# --- optimizer --------------------------------------------------------------------------------------------------


def parameters(device: torch.device) -> dict[str, nn.Parameter]:
    """Of more than one program, of one, unaligned, of one value and of none."""
    from modelyard.kernels.adamw import CHUNK

    draw = partial(random, dtype=torch.float32, device=device)
    long = CHUNK // 16 + 2  # two chunks, the second of 32 values
    tensors = {
        "long": draw(16, long, seed=1),
        "norm": draw(40, seed=2),
        "odd": draw(3, 7, seed=3),
        "unaligned": draw(65, seed=4)[1:].view(8, 8),
        "one": draw(1, seed=5),
        "none": draw(0, 4, seed=6),
    }
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


@case
def adamw(device: torch.device) -> None:
    """Three steps of `Optimizer` with the kernel against torch.optim.AdamW in fp64."""
    from modelyard.train.optimizer import Optimizer

    ours = parameters(device)
    exact = {name: nn.Parameter(p.detach().double()) for name, p in ours.items()}
    copies = {
        "long": torch.zeros_like(ours["long"], dtype=torch.bfloat16, requires_grad=False),
        "odd": torch.zeros_like(ours["odd"], dtype=torch.float16, requires_grad=False),
    }
    scales = {"odd": 0.5}
    optimizer = Optimizer(ours, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8, scales=scales)
    reference = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0, "lr": 0.01 * scales.get(name, 1.0)}
            for name, p in exact.items()
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(3):
        for seed, (name, p) in enumerate(ours.items()):
            gradient = random(*p.shape[::-1], seed=10 * step + seed, dtype=torch.float32, device=device)
            p.grad = gradient.permute(*range(p.dim())[::-1])  # in another order than the parameter
            exact[name].grad = p.grad.double() * 0.25
        before = {name: p.grad.clone() for name, p in ours.items() if p.grad is not None}
        with kernels.chosen("triton"):
            optimizer.step(0.01, factor=0.25, copies=copies)
        reference.step()
        assert sorted(optimizer.published) == ["long", "odd"]
        for name, p in ours.items():
            if p.numel():
                assert p.grad is not None
                assert_same(p.grad, before[name], f"gradient of {name}")
                assert_close(p, exact[name], f"{name} after step {step + 1}")
                for moment in ("exp_avg", "exp_avg_sq"):
                    expected = reference.state[exact[name]][moment]
                    assert_close(optimizer.moments()[f"{name}.{moment}"], expected, f"{name}.{moment}")
        assert_close(copies["long"], exact["long"], "the copy in bf16")
        assert_close(copies["odd"], exact["odd"], "the copy in fp16")
    # torch goes on where the kernel was; its own wants gradients in the order of their parameters.
    for p in ours.values():
        assert p.grad is not None
        p.grad = p.grad.contiguous()
    optimizer.step(0.01, factor=0.25)
    reference.step()
    assert_close(ours["long"], exact["long"], "after a step of torch's")
    assert optimizer.published == ()


@case
def adamw_beside_moments_of_eight_bits(device: torch.device) -> None:
    """The kernel takes the wide ones, and the factor counts for the others, too."""
    from modelyard.train.optimizer import LEAST_NARROW, Optimizer

    found = {}
    for choice in ("torch", "triton"):
        values = {"wide": torch.ones(16, device=device), "narrow": torch.ones(2, LEAST_NARROW, device=device)}
        named = {name: nn.Parameter(tensor) for name, tensor in values.items()}
        optimizer = Optimizer(named, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-2, state="8bit")
        for seed, p in enumerate(named.values()):
            p.grad = random(*p.shape, seed=seed, dtype=torch.float32, device=device).mul_(1e-2)
        with kernels.chosen(choice):  # type: ignore[arg-type]
            optimizer.step(0.1, factor=0.5)
        found[choice] = named
    for name, p in found["torch"].items():
        assert_close(found["triton"][name], p.double(), name)
        assert (p - 1).abs().max().item() > 0.01, "the step is to be seen"


@case
def adamw_knows_what_is_aligned(device: torch.device) -> None:
    """An access of 16 bytes that begins elsewhere fails, and one that goes on beyond the end writes into the next tensor."""
    from modelyard.kernels.adamw import Update, is_aligned

    def aligned(tensor: Tensor, **changes: Tensor) -> bool:
        others = {name: torch.zeros_like(tensor) for name in ("gradient", "mean", "square")} | changes
        return is_aligned(Update(tensor, **others, copy=None, scale=1.0, decay=0.0))

    whole = {name: aligned(p.detach()) for name, p in parameters(device).items() if p.numel()}
    assert whole == {"long": True, "norm": False, "odd": False, "unaligned": False, "one": False}, whole
    tensor, moved = torch.zeros(32, device=device), torch.zeros(36, device=device)[1:33]
    for name in ("gradient", "mean", "square"):
        assert not aligned(tensor, **{name: moved}), name


@case
def adamw_refuses_another_order(device: torch.device) -> None:
    from modelyard.kernels.adamw import Update, adamw_

    def update(**changes: Tensor) -> None:
        tensors = {name: torch.ones(4, 2, device=device) for name in ("master", "gradient", "mean", "square")}
        one = Update(**(tensors | changes), copy=None, scale=1.0, decay=0.0)
        adamw_([one], rate=0.1, factor=1.0, betas=(0.9, 0.95), epsilon=1e-8, steps=1)

    for changes, problem in (
        ({"mean": torch.ones(2, 4, device=device).t()}, "order"),
        ({"square": torch.ones(2, 4, device=device)}, "order"),
        ({"gradient": torch.ones(4, 2, device=device, dtype=torch.bfloat16)}, "fp32"),
    ):
        said = "nothing"
        try:
            update(**changes)
        except ValueError as error:
            said = str(error)
        assert problem in said, f"{list(changes)}: {said}"
