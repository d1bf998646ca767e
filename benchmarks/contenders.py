"""The programs that `train_step.py` compares, each in a process of its own.

    python benchmarks/contenders.py CASE        (started by train_step.py; CASE is JSON)

A contender builds the same network with the same weights, then answers one line of JSON for each line it reads:
`step` trains on the case's batch once, `memory` tells the most memory that the steps so far held. Separate processes,
because a contender's memory, allocator and compiled code must not be another's; they answer in turn, never at once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modelyard.config.architecture import Architecture, Rotary
from modelyard.data.batch import Batch
from modelyard.model.compile import compile_blocks
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.train.allocator import keep_freed_memory
from modelyard.train.optimizer import Optimizer
from modelyard.train.step import LossOptions, train_step
from modelyard.train.weights import DTYPES, Weights

NAMES = (
    "modelyard",
    "modelyard compiled",
    "transformers",
    "transformers compiled",
    "litgpt",
    "litgpt compiled",
)
Step = Callable[[], tuple[float, float]]
"""Trains on the batch once; returns (loss, gradient norm)."""

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Case:
    """One comparison: the network, its batch, and how it is computed."""

    contender: str
    dtype: str = "float32"
    vocabulary: int = 32_000
    rows: int = 4
    sequence: int = 512
    documents: int = 1
    """Documents in each row, of unequal lengths, isolated from each other; 1: the row is one document."""
    hidden: int = 512
    layers: int = 8
    threads: int = 2

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence

    def architecture(self) -> Architecture:
        """Llama's proportions: heads of 64, four query heads to a key head, feed-forward 8/3 of the width, untied."""
        heads = self.hidden // 64
        inner = int(self.hidden * 8 / 3 / 64 + 0.5) * 64
        return Architecture(
            self.vocabulary,
            self.hidden,
            self.layers,
            heads,
            max(heads // 4, 1),
            64,
            inner,
            False,
            rotary=Rotary(),
        )

    def lengths(self) -> list[int]:
        """Lengths of a row's documents: growing linearly, the longest about twice the mean."""
        weights = [index + 1 for index in range(self.documents)]
        ends = [
            round(self.sequence * sum(weights[: index + 1]) / sum(weights)) for index in range(self.documents)
        ]
        return [end - begin for begin, end in zip([0, *ends], ends)]

    def batch(self) -> Batch:
        tokens = torch.randint(
            self.vocabulary, (self.rows, self.sequence + 1), generator=torch.Generator().manual_seed(0)
        )
        lengths = self.lengths()
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(self.rows, -1)
        cu_seqlens = torch.tensor([[0, *lengths]], dtype=torch.int32).cumsum(-1, dtype=torch.int32)
        labels = tokens[:, 1:].clone()  # of one row, `contiguous` would be the same memory as the inputs
        if self.documents > 1:
            labels[:, cu_seqlens[0, 1:].long() - 1] = -100  # a document's last token predicts nothing
        return Batch(
            tokens[:, :-1].contiguous(), labels, positions.contiguous(), cu_seqlens.expand(self.rows, -1)
        )


def installed(contender: str) -> bool:
    """Whether the package of a contender is there."""
    return importlib.util.find_spec(contender.split()[0]) is not None


def can_run(case: Case) -> bool:
    """litgpt's model has no way to keep the documents of a row apart."""
    return case.documents == 1 or not case.contender.startswith("litgpt")


def build(case: Case) -> Step:
    """The contender's step, ready to be called."""
    shape, batch = case.architecture(), case.batch()
    model = Decoder(shape)
    initialize(model, 0, InitStd.for_architecture(shape))
    if case.contender.startswith("modelyard"):
        return _ours(model, batch, case)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    network, arguments = (_litgpt if case.contender.startswith("litgpt") else _transformers)(
        shape, weights, batch, case
    )
    del model, weights
    return _plain_loop(network, arguments, batch, case)


def _ours(model: Decoder, batch: Batch, case: Case) -> Step:
    keep_freed_memory()
    if case.contender.endswith("compiled"):
        compile_blocks(model)
    weights = Weights(model, DTYPES[case.dtype])
    optimizer = Optimizer(weights.master, weight_decay=WEIGHT_DECAY, betas=BETAS, epsilon=EPSILON)

    def step() -> tuple[float, float]:
        result = train_step(
            model,
            weights,
            optimizer,
            batch,
            learning_rate=LEARNING_RATE,
            micro_batch_size=case.rows,
            max_norm=MAX_NORM,
            loss_options=LossOptions(),
            device=torch.device("cpu"),
        )
        return result.loss, result.grad_norm

    return step


def _transformers(shape: Architecture, weights: dict[str, torch.Tensor], batch: Batch, case: Case):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.head_groups,
            head_dim=shape.head_size,
            rms_norm_eps=shape.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rotary.theta},
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    model.load_state_dict(
        {
            name if name.startswith("lm_head") else f"model.{name}": value.clone()
            for name, value in weights.items()
        }
    )
    arguments: dict[str, torch.Tensor] = {"input_ids": batch.input_ids}
    if case.documents > 1:
        # The mask of isolated documents, made once: a loop over a data set would make it for each batch.
        document = torch.repeat_interleave(torch.arange(case.documents), torch.tensor(case.lengths()))
        same = document[:, None] == document[None]
        arguments["attention_mask"] = same.tril().expand(case.rows, 1, -1, -1)
        arguments["position_ids"] = batch.positions
    return model, arguments


def _litgpt(shape: Architecture, weights: dict[str, torch.Tensor], batch: Batch, case: Case):
    from litgpt.config import Config
    from litgpt.model import GPT

    model = GPT(
        Config(
            block_size=case.sequence,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.num_layers,
            n_head=shape.num_attention_heads,
            n_query_groups=shape.head_groups,
            head_size=shape.head_size,
            n_embd=shape.hidden_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=shape.norm_epsilon,
            mlp_class_name="LLaMAMLP",
            intermediate_size=shape.ffn_hidden_size,
            rope_base=shape.rotary.theta,
        )
    )
    theirs = {
        "transformer.wte.weight": weights["embed_tokens.weight"],
        "transformer.ln_f.weight": weights["norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for layer in range(shape.num_layers):
        ours, block = f"layers.{layer}.", f"transformer.h.{layer}."
        attention = [weights[f"{ours}self_attn.{part}_proj.weight"] for part in "qkv"]
        theirs |= {
            f"{block}attn.qkv.weight": torch.cat(attention),
            f"{block}attn.proj.weight": weights[f"{ours}self_attn.o_proj.weight"],
            f"{block}norm_1.weight": weights[f"{ours}input_layernorm.weight"],
            f"{block}norm_2.weight": weights[f"{ours}post_attention_layernorm.weight"],
            f"{block}mlp.fc_1.weight": weights[f"{ours}mlp.gate_proj.weight"],
            f"{block}mlp.fc_2.weight": weights[f"{ours}mlp.up_proj.weight"],
            f"{block}mlp.proj.weight": weights[f"{ours}mlp.down_proj.weight"],
        }
    model.load_state_dict({name: value.clone() for name, value in theirs.items()})
    return model, {"idx": batch.input_ids}


def _plain_loop(model: torch.nn.Module, arguments: dict[str, torch.Tensor], batch: Batch, case: Case) -> Step:
    """What a careful user writes around another library's model: autocast, fused AdamW, no needless copy."""
    dtype = DTYPES[case.dtype]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=BETAS,
        eps=EPSILON,
        fused=True,
    )
    labels = batch.labels.flatten()

    def loss_of() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(**arguments)
        logits = getattr(logits, "logits", logits)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels)

    if case.contender.endswith("compiled"):
        loss_of = torch.compile(loss_of)

    def step() -> tuple[float, float]:
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    return step


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _restart_peak() -> None:
    """Let the peak of resident memory begin anew (Linux), so that compiling and building do not count."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be read as an answer
    torch.set_num_threads(case.threads)
    if case.contender.startswith("transformers"):
        import transformers  # noqa: F401  its imports are not its step's memory
    elif case.contender.startswith("litgpt"):
        import litgpt.model  # noqa: F401
    imported = _resident("VmRSS")
    step = build(case)
    for line in sys.stdin:
        if line.strip() == "memory":
            peak = _resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = {"peak_bytes": peak - imported}
        else:
            begin = time.perf_counter()
            loss, norm = step()
            answer = {"seconds": time.perf_counter() - begin, "loss": loss, "grad_norm": norm}
            if line.strip() == "warm up":
                _restart_peak()
        print(json.dumps(answer), file=answers, flush=True)


class Contender:
    """The other end of a contender's process."""

    def __init__(self, case: Case, environment: dict[str, str] | None = None):
        import subprocess

        self.case = case
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, question: str) -> dict[str, float]:
        """The answer to `warm up`, `step` or `memory`; raises RuntimeError where the contender has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{self.case.contender} ended with status {self._process.wait()}: see its message above"
            )
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


if __name__ == "__main__":
    main()
