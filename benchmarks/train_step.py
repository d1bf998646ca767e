"""How fast is one training step, against transformers' Llama in a plain, well-written PyTorch loop?

Same shape, weights' size, data, dtype, threads and optimizer, in one process, alternating; the median of the rounds
counts. Prints tokens/s, their ratio, the share of the machine's own matrix-multiply speed, and both losses and
gradient norms (a step that does not train is fast). Writes `benchmarks/results/train_step.json`.

    python benchmarks/train_step.py [--rounds 5] [--vocab 32000] [--layers 8] [--hidden 512] [--dtype float32]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_result
from modelyard.config.architecture import Architecture, Rotary
from modelyard.data.batch import Batch
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import DTYPES, Weights


def batch_of(rows: int, sequence: int, vocabulary: int) -> Batch:
    tokens = torch.randint(vocabulary, (rows, sequence + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(sequence).expand(rows, -1)
    cu_seqlens = torch.tensor([[0, sequence]], dtype=torch.int32).expand(rows, -1)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions, cu_seqlens)


def ours(shape: Architecture, batch: Batch, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    model = Decoder(shape)
    initialize(model, 0, InitStd.for_architecture(shape))
    weights = Weights(model, dtype)
    optimizer = Optimizer(weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)

    def step() -> tuple[float, float]:
        result = train_step(
            model,
            weights,
            optimizer,
            batch,
            learning_rate=1e-4,
            micro_batch_size=len(batch),
            max_norm=1.0,
            loss_options=LossOptions(),
            device=torch.device("cpu"),
        )
        return result.loss, result.grad_norm

    return step


def theirs(shape: Architecture, batch: Batch, dtype: torch.dtype) -> Callable[[], tuple[float, float]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.head_groups,
            head_dim=shape.head_size,
            tie_word_embeddings=shape.tie_word_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> tuple[float, float]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=batch.input_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def matmul_flops(dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of this machine's square matrix product, the best of five."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    a @ b
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()

    heads = options.hidden // 64
    inner = int(options.hidden * 8 / 3 / 64 + 0.5) * 64
    shape = Architecture(
        options.vocab,
        options.hidden,
        options.layers,
        heads,
        max(heads // 4, 1),
        64,
        inner,
        True,
        rotary=Rotary(),
    )
    batch, dtype = batch_of(options.rows, options.sequence, options.vocab), DTYPES[options.dtype]
    steps = {"modelyard": ours(shape, batch, dtype), "transformers": theirs(shape, batch, dtype)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    last: dict[str, tuple[float, float]] = {}
    for round_ in range(options.rounds + 1):
        for name, step in steps.items():
            begin = time.perf_counter()
            last[name] = step()
            if round_:  # The first warms up.
                seconds[name].append(time.perf_counter() - begin)

    tokens = options.rows * options.sequence
    flops = tokens * (
        shape.matmul_flops_per_token() + shape.attention_flops_per_token(options.sequence, causal=True)
    )
    peak = matmul_flops(dtype)
    rows = {}
    print(f"{shape.parameter_count():,} parameters, {options.rows} x {options.sequence} tokens, {options.dtype}, "
          f"{torch.get_num_threads()} threads, matrix multiply {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for name, times in seconds.items():
        median = statistics.median(times)
        loss, norm = last[name]
        rows[name] = {
            "tokens_per_second": tokens / median,
            "of_matmul": flops / median / peak,
            "loss": loss,
            "grad_norm": norm,
        }
        print(f"{name:<13} {tokens / median:>9,.0f} tokens/s   {flops / median / peak:>4.0%} of the matrix multiply   "
              f"loss {loss:.3f}   grad norm {norm:.3f}")  # fmt: skip
    ratio = rows["modelyard"]["tokens_per_second"] / rows["transformers"]["tokens_per_second"]
    print(f"ratio {ratio:.2f}")
    write_result("train_step", {"options": vars(options), "ratio": ratio, "results": rows})


if __name__ == "__main__":
    main()
