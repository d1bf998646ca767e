"""The training steps that `make gpu` times: ours, and those of other libraries' models in a loop that a careful user writes.

All of them begin with the same weights (drawn by name) and train on the same tokens, with the same optimizer in fp32 and bf16 to
compute with, so that the first step's loss and gradient norm have to agree.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_cells import OURS, Cell
from modelyard import kernels
from modelyard.config.architecture import Architecture
from modelyard.model import fp8
from modelyard.model.compile import compile_blocks
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.model.torch_private import scaled_mm
from modelyard.parallel.apply import parallelize
from modelyard.parallel.mesh import alone
from modelyard.train.metrics import peak_flops, peak_memory, utilization
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step

Step = Callable[[], tuple[float, float]]
"""Trains on the batch once; returns (loss, gradient norm)."""
SEED, RATE, BETAS, EPSILON, DECAY, MAX_NORM = 0, 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MOST_STEPS = 20


class NotHere(Exception):
    """A program that this machine has not; what is missing."""


def compiler(device: torch.device) -> str:
    """A rehearsal must not need a C++ compiler."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def ours(cell: Cell, layers: int, device: torch.device) -> Step:
    if cell.kernel_choice == "triton" and (problem := kernels.obstacle()):
        raise NotHere(f"the kernels in Triton need {problem}")
    if cell.fp8 and (problem := fp8.obstacle(device)):
        raise NotHere(f"products in fp8 need {problem}")
    kernels.choose(cell.kernel_choice)
    shape, batch = cell.architecture(layers), cell.case().batch()
    drawn = DrawnWeights(shape, InitStd.for_architecture(shape), SEED, device)

    def fill(model: torch.nn.Module, write: Callable[[Any, torch.Tensor], None]) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                write(parameter, drawn.load(name))

    run = parallelize(
        shape, alone(device), compute_dtype=torch.bfloat16, recompute=cell.recompute, offload_activations=cell.saving,
        compile=False, sequence_length=cell.sequence, fill=fill, fp8=cell.fp8,
    )  # fmt: skip
    if cell.is_compiled:
        compile_blocks(run.models[0], backend=compiler(device))
    optimizer = Optimizer(
        run.weights.master, weight_decay=DECAY, betas=BETAS, epsilon=EPSILON, state="8bit" if cell.saving else "float32"
    )  # fmt: skip
    run.weights.publish()

    def step() -> tuple[float, float]:
        result = train_step(
            run.model, run.weights, optimizer, batch,
            learning_rate=RATE, micro_batch_size=cell.rows, max_norm=MAX_NORM, loss_options=LossOptions(), device=device,
        )  # fmt: skip
        assert result.skipped is None, result.skipped
        return result.loss, result.grad_norm

    return step


def theirs(cell: Cell, layers: int, device: torch.device) -> Step:
    """transformers' model, with Liger's kernels where the cell says so: bf16 by autocast over weights in fp32, torch's attention,
    fused AdamW, compiled whole."""
    with_liger = cell.program.startswith("liger")
    for package in ("transformers", *(["liger_kernel"] if with_liger else [])):
        if importlib.util.find_spec(package) is None:
            raise NotHere(f"{package} is not installed")
    shape, batch = cell.architecture(layers), cell.case().batch().to(device)
    model = _their_model(shape, device, with_liger)
    if cell.saving:
        model.gradient_checkpointing_enable()
    model.train()
    arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if cell.documents > 1:
        lengths = torch.tensor(cell.case().lengths(), device=device)
        document = torch.repeat_interleave(torch.arange(cell.documents, device=device), lengths)
        same = document[:, None] == document[None]
        arguments["attention_mask"] = same.tril().expand(cell.rows, 1, -1, -1)
        arguments["position_ids"] = batch.positions
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=RATE, betas=BETAS, eps=EPSILON, fused=True,
    )  # fmt: skip
    labels = batch.labels.flatten()
    # Liger's head and loss shift the labels themselves: a row's last token has none.
    own_labels = batch.input_ids.masked_fill(batch.positions == 0, -100) if with_liger else None

    def loss_of() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            if with_liger:
                loss: torch.Tensor = model(**arguments, labels=own_labels).loss
                return loss
            logits = model(**arguments).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels)

    if cell.is_compiled:
        loss_of = torch.compile(loss_of, backend=compiler(device))

    def step() -> tuple[float, float]:
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def _their_model(shape: Architecture, device: torch.device, with_liger: bool) -> Any:
    if with_liger:
        from liger_kernel import transformers as liger

        patch = liger.apply_liger_kernel_to_qwen2 if shape.qkv_bias else liger.apply_liger_kernel_to_llama
        patch()
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    rotary = shape.rotary
    rope: dict[str, Any] = {"rope_type": rotary.type, "rope_theta": rotary.theta}
    if rotary.type == "llama3":
        rope |= {
            "factor": rotary.scale_factor,
            "low_freq_factor": rotary.low_frequency_factor,
            "high_freq_factor": rotary.high_frequency_factor,
            "original_max_position_embeddings": rotary.original_context_length,
        }
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.head_groups,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": rope,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "attn_implementation": "sdpa",
    }
    with torch.device(device):
        if shape.qkv_bias:
            model: Any = Qwen2ForCausalLM(Qwen2Config(**fields))
        else:
            model = LlamaForCausalLM(LlamaConfig(**fields, head_dim=shape.head_size))
    drawn = DrawnWeights(shape, InitStd.for_architecture(shape), SEED, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in drawn.names():
            parameters[name if name.startswith("lm_head") else f"model.{name}"].copy_(drawn.load(name))
    return model


def measure(cell: Cell, layers: int, device: torch.device, end: float) -> dict[str, Any]:
    """What is measured of a cell until `end` (of time.monotonic); `failed` alone where it could not be."""
    try:
        step = (ours if cell.program in OURS else theirs)(cell, layers, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first, norm = step()  # compiles
        step()
        seconds: list[float] = []
        last = 0.0
        while len(seconds) < 3 or (len(seconds) < MOST_STEPS and time.monotonic() + 2 * seconds[-1] < end):
            begin = time.perf_counter()
            last, _ = step()  # the loss is read: the device is done
            seconds.append(time.perf_counter() - begin)
            if device.type == "cpu" and len(seconds) == 2:
                break
    except NotHere as error:
        return {"failed": str(error)}
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # a cell that fails is a row that says why
        said = (str(error).strip() or "nothing said").splitlines()[0]
        return {"failed": f"{type(error).__name__}: {said[:300]}"}
    finally:
        kernels.choose("torch")
    speed = cell.rows * cell.sequence / statistics.median(seconds)
    shares = utilization(
        cell.architecture(layers), cell.sequence // cell.documents, speed, peak_flops(device, torch.bfloat16)
    )
    return {
        "tokens_per_second": speed,
        "step_ms": [round(1e3 * s, 2) for s in seconds],
        "peak_bytes": peak_memory(device),
        "loss": first,
        "grad_norm": norm,
        "last_loss": last,
        **shares,
    }


def chip_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of the device's own products in bf16 and, where it has them, in fp8; bytes/s of its copies."""
    from benchmarks.floor import best, matmul_peak

    on_gpu = device.type == "cuda"
    found = {"matmul_bf16": matmul_peak(torch.bfloat16, 8192 if on_gpu else 256, device)}
    x = torch.empty(1 << 30 if on_gpu else 1 << 20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    found["copy"] = 2 * x.nbytes / best(lambda: y.copy_(x))
    if on_gpu and fp8.obstacle(device) is None:
        a = torch.randn(8192, 8192, device=device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        seconds = best(lambda: scaled_mm(a, a.t(), one, one, torch.bfloat16, fast=True))
        found["matmul_fp8"] = 2 * 8192**3 / seconds
    return found
