"""Fine-tuning on a GPU: full, LoRA and QLoRA of Llama's 1B, 3B and 8B shapes, alone as fast and as long as they go.

    python benchmarks/finetune_gpu.py                       on a CUDA machine; torch >= 2.11 is all it needs, no network
    python benchmarks/finetune_gpu.py --only 8b --method qlora --task longest
    python benchmarks/finetune_gpu.py --cpu                 the same code at toy sizes on the CPU, to see that it works

Weights are random; the adapter has rank 16 on every matrix of the blocks. Speed: bf16, 8 isolated documents in each row of
4,096 tokens, blocks compiled: tokens/s, MFU, peak memory. MFU counts what the method cannot spare (frozen weights have no
gradient) and the triangle of the attention. Longest: the longest single
document that a whole step is done on where the allocator may have 24 or 80 GB, with full recomputation and its inputs in the
host's memory, to within 3%. Every figure has a process of its own.

Where TRL and PEFT are installed (`pip install trl peft bitsandbytes`) they train on the same tokens from the same weights,
padded and without padding, and loss and gradient norm must agree, or nothing is compared; with flash-attn where that is
installed. Writes `benchmarks/results/finetune_gpu.json`; `python benchmarks/tables.py --write` puts it into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, FirstAdapter, write_result
from benchmarks.contenders import Case
from modelyard.config.adapter import MODULES, Adapter, Quantization, is_adapter_parameter
from modelyard.config.architecture import Architecture, Rotary
from modelyard.model.adapter import AdaptedWeights
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.parallel.apply import parallelize
from modelyard.parallel.mesh import alone
from modelyard.train.metrics import peak_flops, peak_memory, utilization
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step

METHODS = ("full", "lora", "qlora")
OURS = "modelyard"
PEERS = ("TRL padded", "TRL padding-free")
RANK, ALPHA, SEED = 16, 32.0, 0
RATE, BETAS, EPSILON, DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
TOLERANCE = 2e-2
"""Relative, of the first step's loss and gradient norm in bf16."""
LLAMA3 = Rotary("llama3", 500_000.0)
SHAPES = {
    "1b": Architecture(128256, 2048, 16, 32, 8, 64, 8192, True, rotary=LLAMA3),
    "3b": Architecture(128256, 3072, 28, 24, 8, 128, 8192, True, rotary=LLAMA3),
    "8b": Architecture(128256, 4096, 32, 32, 8, 128, 14336, rotary=LLAMA3),
    "toy": Architecture(512, 64, 2, 4, 2, 16, 128, rotary=LLAMA3),
}
CAPS = (24, 80)
"""GB (10^9 bytes) that the allocator may have."""
PRETENDED = 200
"""Tokens that fit in a rehearsal."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process and what it measures."""

    program: str
    shape: str
    method: str
    rows: int
    sequence: int
    documents: int = 1
    """In each row, isolated; 1: the row is one document."""
    compiled: bool = False
    recompute: str = "none"
    """`full`: inputs of blocks are kept in the host's memory, too."""
    cap: int | None = None
    """GB that the allocator may have."""
    steps: int = 8
    device: str = "cuda"

    @property
    def architecture(self) -> Architecture:
        return SHAPES[self.shape]

    @property
    def adapter(self) -> Adapter | None:
        if self.method == "full":
            return None
        how = Quantization(64) if self.method == "qlora" else None
        return Adapter(RANK if self.shape != "toy" else 4, ALPHA, MODULES, quantization=how)

    @property
    def case(self) -> Case:
        return Case("", "bfloat16", self.architecture.vocab_size, self.rows, self.sequence, self.documents)


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(job: Job) -> Callable[[], tuple[float, float]]:
    """Our step, ready to be called: (loss, gradient norm)."""
    shape, adapter, device = job.architecture, job.adapter, torch.device(job.device)
    drawn = DrawnWeights(shape, InitStd.for_architecture(shape), SEED, device)
    frozen: frozenset[str] = frozenset()
    fill: Any
    if adapter is None:

        def fill(model: torch.nn.Module, write: Any) -> None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    write(parameter, drawn.load(name))
    else:
        first = FirstAdapter(adapter.shapes(shape))
        fill = AdaptedWeights(
            drawn, adapter, seed=SEED, dtype=torch.bfloat16, device=device, first=first
        ).fill
        frozen = frozenset(shape.parameter_shapes())
    parallel = parallelize(
        shape,
        alone(device),
        compute_dtype=torch.bfloat16,
        recompute="full" if job.recompute == "full" else "none",
        offload_activations=job.recompute == "full",
        compile=job.compiled,
        sequence_length=job.sequence,
        fill=fill,
        frozen=frozen,
        adapter=adapter,
    )
    weights = parallel.weights
    optimizer = Optimizer(
        weights.master,
        weight_decay=DECAY,
        betas=BETAS,
        epsilon=EPSILON,
        scales={name: 0.0 for name, p in weights.master.items() if not p.requires_grad},
    )
    weights.publish()
    batch = job.case.batch()

    def step() -> tuple[float, float]:
        result = train_step(
            parallel.model,
            weights,
            optimizer,
            batch,
            learning_rate=RATE,
            micro_batch_size=job.rows,
            max_norm=MAX_NORM,
            loss_options=LossOptions(),
            device=device,
        )
        assert result.skipped is None, result.skipped
        return result.loss, result.grad_norm

    return step


# --- the peer -------------------------------------------------------------------------------------------------------


def can_run_peer(method: str) -> bool:
    needed = ["trl", "peft", "datasets", *(["bitsandbytes"] if method == "qlora" else [])]
    return all(importlib.util.find_spec(name) for name in needed)


def theirs(job: Job, folder: Path, after: Callable[[float, float], None]) -> None:
    """TRL's trainer on the documents of our batch; `after` is called with (loss, gradient norm) after each step."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Report(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in logs:
                after(float(logs["loss"]), float(logs["grad_norm"]))

    documents = []
    for row in job.case.batch().input_ids.tolist():
        begin = 0
        for length in job.case.lengths():
            documents.append(row[begin : begin + length])
            begin += length
    words = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<eos>")), pad_token="<pad>", eos_token="<eos>"
    )
    arguments = SFTConfig(
        output_dir=str(folder / "theirs"),
        use_cpu=job.device == "cpu",
        bf16=True,
        torch_compile=False,
        max_steps=job.steps,
        per_device_train_batch_size=len(documents),
        padding_free=job.program == "TRL padding-free",
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=MAX_NORM,
        gradient_checkpointing=job.recompute == "full",
        activation_offloading=job.recompute == "full" and job.device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    data = datasets.Dataset.from_list([{"input_ids": d, "labels": d} for d in documents] * job.steps)
    trainer = SFTTrainer(
        model=their_model(job, folder),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Report()],
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # see sft_programs.py
            parameter.data = parameter.data.float()
    trainer.train()


def their_model(job: Job, folder: Path) -> Any:
    """The same weights and adapter; written to `folder`/SHAPE the first time."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = folder / job.shape
    if not path.exists():
        write_their_model(job.architecture, torch.device(job.device), path)
    has_flash = job.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    options: dict[str, Any] = {
        "dtype": torch.float32 if job.method == "full" else torch.bfloat16,
        "device_map": {"": job.device},
        "attn_implementation": "flash_attention_2" if has_flash else "sdpa",
    }
    if job.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    if job.adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    rank, alpha = job.adapter.rank, int(job.adapter.alpha)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(MODULES), task_type="CAUSAL_LM")
    )
    first = FirstAdapter(job.adapter.shapes(job.architecture))
    ours = {f"base_model.model.model.{name}.default.weight": name for name in first.names()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter_parameter(ours.get(name, name)):
                parameter.copy_(first.load(ours[name]))
    return model


def write_their_model(shape: Architecture, device: torch.device, path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rotary = shape.rotary
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.head_groups,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": rotary.theta,
            "factor": rotary.scale_factor,
            "low_freq_factor": rotary.low_frequency_factor,
            "high_freq_factor": rotary.high_frequency_factor,
            "original_max_position_embeddings": rotary.original_context_length,
        },
        max_position_embeddings=131_072,
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    drawn = DrawnWeights(shape, InitStd.for_architecture(shape), SEED, device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in drawn.names():
            parameters[name if name.startswith("lm_head") else f"model.{name}"].copy_(drawn.load(name))
    model.save_pretrained(path)


# --- measuring ------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The steps that were asked for are done."""


def measure(job: Job, folder: Path) -> dict[str, Any]:
    """tokens_per_second (median of the steps but the first two), peak_bytes, loss and grad_norm of the first step, and
    MFU where the device's peak is known; or only `failed`, where memory does not suffice."""
    device = torch.device(job.device)
    if job.cap is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, job.cap * 1e9 / total))
    seconds: list[float] = []
    results: list[tuple[float, float]] = []

    def after(loss: float, norm: float) -> None:
        nonlocal begin
        now = time.perf_counter()  # reading the loss has waited for the device
        seconds.append(now - begin)
        results.append((loss, norm))
        begin = now

    begin = time.perf_counter()
    try:
        if job.program == OURS:
            step = ours(job)
            begin = time.perf_counter()
            for _ in range(job.steps):
                after(*step())
        else:
            theirs(job, folder, after)
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).splitlines()[0]}"}
    counted = seconds[2:] or seconds[-1:]
    speed = job.rows * job.sequence / statistics.median(counted)
    found: dict[str, Any] = {
        "tokens_per_second": speed,
        "peak_bytes": peak_memory(device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else 0,
        "loss": results[0][0],
        "grad_norm": results[0][1],
        "seconds": seconds,
    }
    shares = utilization(
        job.architecture,
        job.sequence // job.documents,
        speed,
        peak_flops(device, torch.bfloat16),
        adapter=job.adapter,
    )
    return found | shares


def in_process(job: Job, folder: Path) -> dict[str, Any]:
    """`measure` in a process of its own; on the CPU, in a rehearsal, in this one."""
    if job.device == "cpu":
        return measure(job, folder)
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        __file__,
        "--job",
        json.dumps(dataclasses.asdict(job)),
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"answer"')]
    if done.returncode or not answers:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"failed": f"ended with status {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(answers[-1])["answer"]
    return found


def longest(memory_at: Callable[[int], int | None], limit: int, first: int, unit: int) -> int:
    """The greatest length that fits, a multiple of `unit`, to within 3% or a unit; 0 where not even `first` fits.

    `memory_at` tells what a step at a length takes (None: it does not fit) of `limit`. Memory grows in a straight line with
    the length: two lengths foretell a third, and trials around that one find the end.
    """
    points: list[tuple[int, int]] = []
    low, high = 0, 0

    def fits(length: int) -> bool:
        nonlocal low, high
        taken = memory_at(length)
        if taken is None:
            high = length if high == 0 else min(high, length)
            return False
        low = max(low, length)
        points.append((length, taken))
        return True

    if not fits(first):
        return 0
    fits(2 * first)
    while high == 0 or high - low > max(unit, low // 33):
        (a, at_a), (b, at_b) = points[0], max(points)
        guess = a + round((limit - at_a) * (b - a) / max(at_b - at_a, 1)) if b > a else 2 * low
        # Around what is foretold the step is small; a guess that says nothing new is replaced by the middle.
        margin = max(unit, low // 50)
        if high == 0:
            guess = min(max(guess, low + margin), 8 * low)
        elif not low + margin <= guess <= high - unit:
            guess = (low + high) // 2
        guess = max(guess // unit * unit, low + unit)
        if guess >= high > 0:
            break
        fits(guess)
    return low


def find_longest(job: Job, folder: Path) -> dict[str, Any]:
    """`longest` of a job, and what the step at that length was like."""
    found: dict[int, dict[str, Any]] = {}
    is_rehearsal = job.device == "cpu"

    def memory_at(length: int) -> int | None:
        row = in_process(dataclasses.replace(job, sequence=length), folder)
        if is_rehearsal and length > PRETENDED:
            row = {"failed": "out of memory, as it were"}
        print(
            f"    {length:>9,} {row.get('failed') or format(row['tokens_per_second'], ',.0f') + ' tokens/s'}",
            flush=True,
        )
        found[length] = row
        if "failed" in row:
            if "out of memory" not in row["failed"]:
                raise RuntimeError(row["failed"])
            return None
        return length if is_rehearsal else row["reserved_bytes"]

    assert job.cap is not None
    first, unit = (32, 16) if is_rehearsal else (2048, 256)
    limit = PRETENDED if is_rehearsal else round(job.cap * 1e9)
    length = longest(memory_at, limit, first, unit)
    return {"longest": length, "trials": len(found), **(found[length] if length else {})}


def speeds(
    name: str, method: str, device: str, rows: int, sequence: int, folder: Path, peers: list[str]
) -> dict[str, dict[str, Any]]:
    """By program: `measure`. A peer whose first step is another than ours has `failed`."""
    job = Job(OURS, name, method, rows, sequence, documents=8, compiled=device == "cuda", device=device)
    if device == "cpu":
        job = dataclasses.replace(job, steps=2)
    found = {OURS: in_process(job, folder)}
    for program in peers if can_run_peer(method) else ():
        found[program] = in_process(dataclasses.replace(job, program=program, compiled=False), folder)
    reference = found[OURS]
    for row in found.values():
        if "failed" in row or "failed" in reference:
            continue
        row["difference"] = max(abs(row[k] - reference[k]) / abs(reference[k]) for k in ("loss", "grad_norm"))
        if not row["difference"] <= TOLERANCE:
            row["failed"] = f"computes something else: {row['difference']:.1e} from ours"
    if not reference.get("grad_norm", 1.0):
        reference["failed"] = "the gradient is 0: it does not train"
    return found


def say(label: str, row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{label:<44} {row['failed']}", flush=True)
        return
    used = f"{row['mfu_causal']:.1%} MFU  " if "mfu_causal" in row else ""
    print(
        f"{label:<44} {row['tokens_per_second']:>9,.0f} tokens/s  {used}{row['peak_bytes'] / 2**30:.1f} GiB  "
        f"loss {row['loss']:.3f}  grad norm {row['grad_norm']:.3f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cpu", action="store_true", help="rehearse on the CPU at toy sizes; measures nothing"
    )
    parser.add_argument("--only", action="append", choices=[name for name in SHAPES if name != "toy"])
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--task", action="append", choices=("speed", "longest"))
    parser.add_argument("--no-peers", action="store_true", help="ours alone, whatever is installed")
    parser.add_argument(
        "--folder", type=Path, help="where the peers' models are written (default: a temporary one)"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps({"answer": measure(Job(**json.loads(options.job)), options.folder)}), flush=True)
        return 0
    if not options.cpu and not torch.cuda.is_available():
        print("error: no CUDA device (--cpu rehearses the script without one)", file=sys.stderr)
        return 2
    device = "cpu" if options.cpu else "cuda"
    names = ["toy"] if options.cpu else options.only or [name for name in SHAPES if name != "toy"]
    methods, tasks = options.method or METHODS, options.task or ("speed", "longest")
    peers = [] if options.no_peers else list(PEERS)
    path, results = RESULTS / "finetune_gpu.json", {"speed": {}, "longest": {}}
    if not options.cpu and path.exists():
        results = {key: json.loads(path.read_text(encoding="utf-8"))[key] for key in results}
    folder = options.folder or Path(tempfile.mkdtemp())
    failed = 0
    try:
        for name in names:
            for method in methods:
                if "speed" in tasks:
                    rows, sequence = (1, 64) if options.cpu else (2, 4096)
                    found = speeds(name, method, device, rows, sequence, folder, peers)
                    results["speed"][f"{name} {method}"] = found
                    for program, row in found.items():
                        failed += "failed" in row and options.cpu
                        say(f"{name} {method}, {program}", row)
                if "longest" in tasks:
                    for cap in CAPS[:1] if options.cpu else CAPS:
                        for program in [OURS, *(peers[1:] if can_run_peer(method) else [])]:
                            job = Job(
                                program, name, method, 1, 0, 1, device == "cuda", "full", cap, 1, device
                            )
                            print(f"{name} {method}, {program}, longest in {cap} GB:", flush=True)
                            row = find_longest(job, folder)
                            results["longest"].setdefault(f"{name} {method} {cap} GB", {})[program] = row
                            print(f"  {row['longest']:,} tokens, {row['trials']} trials", flush=True)
                if not options.cpu:
                    write_result("finetune_gpu", {**results, "versions": versions()})
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print("rehearsed" if not failed else f"{failed} failed")
    return 1 if failed else 0


def versions() -> dict[str, str]:
    """Of the peer and what it stands on, where they are there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("trl", "peft", "transformers", "accelerate", "bitsandbytes", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
