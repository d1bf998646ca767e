"""What must hold on a GPU before anything is timed there: functions of a device that say what they found, or raise.

Attention (flash, variable length) against the dense reference; cross-entropy fused against plain; a bf16 run against fp32;
compiled blocks against eager ones; adapters over a base in fp32 and in NF4 against the CPU; two runs from one seed; a short real
run on this interpreter's standard library, byte by byte; every kernel in Triton against its twin. torch is all they need.
"""

from __future__ import annotations

import dataclasses
import math
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Case
from modelyard.config.adapter import MODULES, Adapter, Quantization
from modelyard.config.architecture import Architecture, Rotary
from modelyard.data.batch import Batch
from modelyard.loss.cross_entropy import linear_cross_entropy
from modelyard.model.adapter import AdaptedWeights, is_quantized_part
from modelyard.model.attention import attend
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.dropout import token_numbers
from modelyard.model.init import DrawnWeights, InitStd, initialize
from modelyard.parallel.apply import parallelize
from modelyard.parallel.mesh import alone
from modelyard.train.optimizer import Optimizer
from modelyard.train.scores import Evaluation, score_sums
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import Weights

LLAMA3 = Rotary("llama3", 500_000.0)
TINY = Architecture(512, 64, 2, 4, 2, 16, 128, rotary=LLAMA3)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of the reference."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def check_attention(device: torch.device) -> str:
    """Flash attention over documents against the dense reference: output and gradients."""
    lengths = [1, 7, 64, 129, 300]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    tokens, longest = sum(lengths), max(lengths)
    worst_of_all = 0.0
    for window in (None, 48):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        inputs = [
            torch.randn(tokens, heads, 64, device=device, dtype=dtype, requires_grad=True)
            for heads in (8, 2, 2)
        ]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = attend(*inputs, cu, cu, longest, longest, window=window)
        reference = attend(*exact, cu, cu, longest, longest, window=window, backend="dense")
        direction = torch.randn_like(out)
        out.backward(direction)
        reference.backward(direction.double())
        pairs = [(out, reference), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
        worst_of_all = max(worst_of_all, *(worst(a, b) for a, b in pairs))
    limit = 2e-2 if device.type == "cuda" else 1e-5
    assert worst_of_all < limit, f"off by {worst_of_all:.1e}"
    return f"largest difference {worst_of_all:.1e} (limit {limit:.0e})"


def check_cross_entropy(device: torch.device) -> str:
    """Fused against plain in fp32, masked labels included."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 64, device=device), torch.randn(5003, 64, device=device) * 0.2
    labels = torch.randint(5003, (700,), device=device)
    labels[::3] = -100
    results = []
    for implementation in ("torch", "fused"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, labels, implementation=implementation)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    difference = max(worst(a, b) for a, b in zip(*reversed(results), strict=True))
    assert difference < 1e-4, f"off by {difference:.1e}"
    return f"largest difference {difference:.1e} (limit 1e-4)"


class Trainer:
    """A model and everything to train it on random tokens."""

    def __init__(
        self, shape: Architecture, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
    ):
        with torch.device("meta"):
            model = Decoder(shape)
        self.model = model.to_empty(device=device)
        if compiled:
            # The rehearsal must not need a C++ compiler.
            compile_blocks(self.model, backend="inductor" if device.type == "cuda" else "aot_eager")
        initialize(self.model, 0, InitStd.for_architecture(shape))
        self.weights = Weights(self.model, dtype)
        self.weights.publish()
        self.optimizer = Optimizer(self.weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
        self.shape, self.device = shape, device

    def step(self, batch: Any, micro_batch_size: int) -> tuple[float, float]:
        result = train_step(
            self.model,
            self.weights,
            self.optimizer,
            batch,
            learning_rate=1e-3,
            micro_batch_size=micro_batch_size,
            max_norm=1.0,
            loss_options=LossOptions(),
            device=self.device,
        )
        assert result.skipped is None, result.skipped
        return result.loss, result.grad_norm


def check_bf16_run(device: torch.device) -> str:
    """20 steps in bf16 follow fp32 and learn the batch."""
    batch = Case("", vocabulary=TINY.vocab_size, rows=4, sequence=128).batch()
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = Trainer(TINY, dtype, device)
        curves.append([trainer.step(batch, 2)[0] for _ in range(20)])
    gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
    assert curves[1][-1] < curves[1][0] - 0.5, f"the loss went from {curves[1][0]:.3f} to {curves[1][-1]:.3f}"
    assert gap < 0.1, f"bf16 departs from fp32 by {gap:.3f}"
    return f"loss {curves[1][0]:.3f} to {curves[1][-1]:.3f}, at most {gap:.4f} from fp32"


def check_compiled(device: torch.device) -> str:
    """Ten steps with compiled blocks follow ten eager ones."""
    batch = Case("", vocabulary=TINY.vocab_size, rows=4, sequence=128, documents=3).batch()
    curves = []
    for compiled in (False, True):
        trainer = Trainer(TINY, torch.float32, device, compiled=compiled)
        curves.append([trainer.step(batch, 2) for _ in range(10)])
    gap = max(abs(a - b) / abs(a) for eager, other in zip(*curves) for a, b in zip(eager, other))
    assert gap < 1e-3, f"loss or gradient norm off by {gap:.1e}"
    return f"loss and gradient norm at most {gap:.1e} apart (limit 1e-3)"


def check_adapters(device: torch.device) -> str:
    """LoRA, and DoRA over NF4, in ten steps from one start: the device in fp32 against the CPU; the codes of both are alike,
    and so is what the dropout leaves out."""
    shape = dataclasses.replace(TINY, hidden_size=128, head_size=32)
    batch = Case("", vocabulary=shape.vocab_size, rows=4, sequence=128, documents=3).batch()
    batch = dataclasses.replace(batch, numbers=token_numbers(1, 0, 4, 128))
    drawn = DrawnWeights(shape, InitStd.for_architecture(shape), 0, torch.device("cpu"))
    gap = 0.0
    for adapter in (
        Adapter(8, 16.0, MODULES, dropout=0.1),
        Adapter(8, 16.0, MODULES, dora=True, quantization=Quantization(64)),
    ):
        curves, held = [], []
        for where in (torch.device("cpu"), device):
            weights = AdaptedWeights(drawn, adapter, seed=0, dtype=torch.float32, device=where)
            run = parallelize(
                shape, alone(where), compute_dtype=torch.float32, recompute="none", compile=False, sequence_length=128,
                fill=weights.fill, frozen=frozenset(shape.parameter_shapes()), adapter=adapter,
            )  # fmt: skip
            optimizer = Optimizer(
                run.weights.master, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8,
                scales={n: 0.0 for n, p in run.weights.master.items() if not p.requires_grad},
            )  # fmt: skip
            held.append([p.cpu() for n, p in run.weights.master.items() if is_quantized_part(n)])
            results = [
                train_step(
                    run.model, run.weights, optimizer, batch, learning_rate=1e-2, micro_batch_size=2, max_norm=1.0,
                    loss_options=LossOptions(), device=where,
                )
                for _ in range(10)
            ]  # fmt: skip
            curves.append([number for result in results for number in (result.loss, result.grad_norm)])
        for one, other in zip(*held):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (
                "other NF4 codes on the device"
            )
        gap = max(gap, *(abs(a - b) / abs(a) for a, b in zip(*curves)))
    assert gap < 1e-2, f"loss or gradient norm off by {gap:.1e}"
    return f"loss and gradient norm at most {gap:.1e} apart (limit 1e-2); NF4 codes equal"


def check_real_text(device: torch.device) -> str:
    """A small model learns the interpreter's standard library byte by byte, in bf16; a held-out part is the measure."""
    steps, rows, sequence = (300, 16, 512) if device.type == "cuda" else (30, 2, 128)
    shape = Architecture(256, 256, 4, 4, 2, 64, 704, rotary=LLAMA3)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)[:4_000_000]), dtype=torch.uint8)
    cut = len(text) - len(text) // 20
    shares = torch.bincount(text[:cut].long(), minlength=256).float().add(1e-3)
    unigram = -(shares / shares.sum()).log()[text[cut:].long()].mean().item()

    def batch(part: torch.Tensor, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(part) - sequence - 1, (rows, 1), generator=generator)
        tokens = part[starts + torch.arange(sequence + 1)].long()
        empty = Case("", vocabulary=256, rows=rows, sequence=sequence).batch()
        return dataclasses.replace(
            empty, input_ids=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous()
        )

    trainer = Trainer(shape, torch.bfloat16, device)
    for step in range(steps):
        trainer.step(batch(text[:cut], step), rows)
    held_out = batch(text[cut:], 0).to(device)
    with torch.no_grad():
        loss = Evaluation.of(score_sums(trainer.model, held_out, LossOptions())).whole.loss
    assert math.isfinite(loss), f"the held-out loss is {loss}"
    assert loss < unigram - 0.2, f"{loss:.3f} nats a byte, {unigram:.3f} without context"
    return f"{loss:.3f} nats a byte held out after {steps} steps, {unigram:.3f} without context"


def check_repeatable(device: torch.device) -> str:
    """Two runs from one seed: initial weights and first loss to the bit; later losses as close as the kernels allow."""
    batch = Case("", vocabulary=TINY.vocab_size, rows=4, sequence=128).batch()
    curves = []
    for _ in range(2):
        trainer = Trainer(TINY, torch.bfloat16, device)
        curves.append([trainer.step(batch, 2)[0] for _ in range(10)])
    assert curves[0][0] == curves[1][0]
    gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
    assert gap < 1e-2, f"two runs differ by {gap:.1e}"
    return "bit-equal" if gap == 0 else f"differ by {gap:.1e} (backward of attention sums in any order)"


def check_kernels(device: torch.device) -> str:
    """Every kernel in Triton, forward and backward, against torch in fp64, and a training step with all of them."""
    from modelyard import kernels

    if obstacle := kernels.obstacle():
        return f"not run: they need {obstacle}"
    from tests.kernels.cases import CASES, run

    wrong = {name: error for name, error in run(list(CASES), device).items() if error}
    if wrong:
        name, error = next(iter(wrong.items()))
        last = error.strip().splitlines()[-1]
        raise AssertionError(f"{len(wrong)} of {len(CASES)} cases; {name}: {last}")
    return f"{len(CASES)} cases"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    check.__name__.removeprefix("check_").replace("_", " "): check
    for check in (
        check_kernels,
        check_attention,
        check_cross_entropy,
        check_bf16_run,
        check_compiled,
        check_repeatable,
        check_adapters,
        check_real_text,
    )
}


def outcome_of(check: Callable[[torch.device], str], device: torch.device) -> str:
    """`ok` or `FAIL`, and what there is to say."""
    try:
        return f"ok    {check(device)}"
    except Exception:
        return f"FAIL  {traceback.format_exc(limit=-1).strip().splitlines()[-1]}"
