"""Whole training steps through the kernels against steps through torch. Imported by `tests.kernels.cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from modelyard import kernels
from tests.kernels.checking import assert_close, assert_same, case


class Trained:
    """A tiny model after steps of the train loop: what they said, and the masters."""

    def __init__(
        self,
        choice: kernels.Choice,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        steps: int = 1,
        layers: int = 1,
        recompute: Any = "none",
        compile: bool = False,
        **shape: Any,
    ):
        from modelyard.config.architecture import Architecture, Rotary
        from modelyard.data.batch import Batch
        from modelyard.model.compile import compile_blocks
        from modelyard.model.decoder import Decoder
        from modelyard.model.init import InitStd, initialize
        from modelyard.model.recompute import recompute_blocks
        from modelyard.train.optimizer import Optimizer
        from modelyard.train.step import LossOptions, train_step
        from modelyard.train.weights import Weights

        architecture = Architecture(
            29, 16, layers, 4, 2, 4, 24, rotary=Rotary("default", 10_000.0), norm_epsilon=1e-5, **shape
        )
        model = Decoder(architecture)
        initialize(model, 0, InitStd.for_architecture(architecture))
        model.to(device)
        recompute_blocks(model, recompute)
        if compile:
            compile_blocks(model, backend="aot_eager")
        weights = Weights(model, dtype)
        weights.publish()
        optimizer = Optimizer(weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
        ids = torch.randint(29, (2, 7), generator=torch.Generator().manual_seed(1))
        labels = ids[:, 1:].clone()
        labels[0, 2] = -100
        cu_seqlens = torch.tensor([[0, 4, 6], [0, 6, 6]], dtype=torch.int32)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
        batch = Batch(ids[:, :-1].contiguous(), labels, positions, cu_seqlens)
        self.losses, self.norms = [], []
        with kernels.chosen(choice):
            for _ in range(steps):
                result = train_step(
                    model,
                    weights,
                    optimizer,
                    batch,
                    learning_rate=0.01,
                    micro_batch_size=2,
                    max_norm=1.0,
                    loss_options=LossOptions(z_loss=1e-3),
                    device=device,
                )
                assert result.skipped is None
                self.losses.append(result.loss)
                self.norms.append(result.grad_norm)
        self.masters = {name: p.detach() for name, p in weights.master.items()}
        self.moments = optimizer.moments()
        self.published = set(optimizer.published)
        self.copies = {name: p.detach() for name, p in weights.compute.items()}


def assert_trained_alike(ours: Trained, twin: Trained, tolerance: float) -> None:
    for values, expected in ((ours.losses, twin.losses), (ours.norms, twin.norms)):
        for a, b in zip(values, expected, strict=True):
            assert abs(a - b) <= tolerance * abs(b), f"{values}, not {expected}"
    # The first moments are the gradients that came: parameter for parameter, not only their norm.
    for name, moment in twin.moments.items():
        squared = name.endswith("_sq")
        assert_close(ours.moments[name], moment.double(), name, (6 if squared else 3) * tolerance)


def launches(step: Callable[[], Trained]) -> tuple[Trained, set[str]]:
    """What a step launched, by the modules of the kernels."""
    from triton.runtime import interpreter, jit

    kind: Any = interpreter.InterpretedFunction if kernels.INTERPRETED else jit.JITFunction
    found, original = set(), kind.__getitem__

    def noted(self: Any, grid: Any) -> Any:
        function = self.fn
        found.add(f"{function.__module__.rpartition('.')[2]}.{function.__name__}")
        return original(self, grid)

    kind.__getitem__ = noted
    try:
        return step(), found
    finally:
        kind.__getitem__ = original


ALL = {
    "rms_norm.forward_kernel",
    "rms_norm.backward_kernel",
    "rotary.rotate_kernel",
    "swiglu.forward_kernel",
    "swiglu.backward_kernel",
    "cross_entropy.gradient_kernel",
    "adamw.adamw_kernel",
}


@case
def a_training_step(device: torch.device) -> None:
    """The whole step through the kernels, all of them, and through torch: losses, gradients, weights after two steps."""
    ours, used = launches(lambda: Trained("triton", device, steps=2, layers=2))
    assert used == ALL, used
    twin, used = launches(lambda: Trained("torch", device, steps=2, layers=2))
    assert used == set(), used
    assert_trained_alike(ours, twin, 1e-6)
    for name, master in twin.masters.items():
        assert_close(ours.masters[name], master.double(), name, 1e-5)


@case
def a_training_step_in_fp16(device: torch.device) -> None:
    """Masters beside the weights: the optimizer's kernel writes both, and every copy is its master's rounding."""
    ours, twin = Trained("triton", device, torch.float16), Trained("torch", device, torch.float16)
    assert_trained_alike(ours, twin, 1e-3)
    assert ours.published == set(ours.masters)
    assert twin.published == set()
    for name, copy in ours.copies.items():
        assert_same(copy, ours.masters[name].to(torch.float16), name)


@case
def a_training_step_with_a_wide_stream(device: torch.device) -> None:
    ours, twin = (
        Trained(choice, device, torch.float16, full_precision_residual=True)  # type: ignore[arg-type]
        for choice in ("triton", "torch")
    )
    assert_trained_alike(ours, twin, 1e-3)


@case
def recomputation_gives_the_same_bits(device: torch.device) -> None:
    plain = Trained("triton", device, torch.float16)
    for mode in ("selective", "full"):
        again = Trained("triton", device, torch.float16, recompute=mode)
        assert (again.losses, again.norms) == (plain.losses, plain.norms), mode
        for name, moment in plain.moments.items():
            assert_same(again.moments[name], moment, f"{name}, {mode}")


@case
def compiled_blocks_take_the_kernels_as_operators(device: torch.device) -> None:
    """`fullgraph`: a graph that breaks raises."""
    ours, used = launches(lambda: Trained("triton", device, compile=True))
    assert used == ALL, used
    assert_trained_alike(ours, Trained("triton", device), 1e-6)


@case
def compiled_blocks_that_recompute_take_them_too(device: torch.device) -> None:
    ours, used = launches(lambda: Trained("triton", device, compile=True, recompute="selective"))
    assert used == ALL, used
    assert_trained_alike(ours, Trained("triton", device), 1e-6)
