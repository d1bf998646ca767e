"""The programs that `sft.py` and `finetune.py` compare, each in a process of its own.

    python benchmarks/sft_programs.py JOB        (started by those; JOB is JSON: `Job`)

A program fine-tunes the same model on the same conversations, one optimizer step for each line `step` that it reads, and
answers with a line of JSON; `memory` asks for its peak, `end` ends it. The peer's half of this file imports nothing of ours, so
that it runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
RANK, ALPHA = 16, 32
"""Of an adapter, on every matrix of the blocks; without dropout."""
QUANTIZATION_BLOCK = 64
IGNORED = -100
PATIENCE = 180
"""Seconds that one step may take, the first with everything that is made or compiled for it."""


@dataclass(frozen=True)
class Job:
    """One program, and what it trains on."""

    program: str
    """`modelyard`, or a form of the peer's: one of `FORMS`."""
    folder: str
    """With model/, tokenizer/, store/, talks.jsonl, talks.jinja and schedule.json, as `sft.py` makes them; adapter/ from
    `finetune.py`."""
    dtype: str = "float32"
    rows: int = 2
    sequence: int = 1024
    threads: int = 2
    compiled: bool = False
    method: str = "full"
    """What is trained: every weight (`full`), or the adapter in adapter/ over weights that keep their values (`lora`), or over
    such in NF4 (`qlora`)."""

    by_row: bool = False
    """Ours with micro-batches of one row, which need less memory."""

    @property
    def name(self) -> str:
        return self.program + (" compiled" if self.compiled else "") + (" by row" if self.by_row else "")


# --- how the peer may lay out the conversations of an optimizer step ------------------------------------------------


def _at_once(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    return [[talk for row in rows for talk in row]]


def _by_length(parts: int) -> Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]:
    def divide(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Longest first, into `parts` micro-batches of about as many tokens each, none empty."""
        if (count := sum(map(len, rows))) < parts:
            raise ValueError(f"{count} conversations do not make {parts} micro-batches")
        talks = sorted((talk for row in rows for talk in row), key=lambda talk: -lengths[talk])
        share, found, held = sum(lengths[talk] for talk in talks) / parts, [[]], 0  # type: ignore[var-annotated]
        for place, talk in enumerate(talks):
            left, empty = len(talks) - place, parts - len(found)
            if found[-1] and len(found) < parts and (held >= share * len(found) or left <= empty):
                found.append([])
            found[-1].append(talk)
            held += lengths[talk]
        return found

    return divide


def _rows(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    return [list(row) for row in rows]


@dataclass(frozen=True)
class Form:
    """How the peer trains on a step's conversations."""

    divide: Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]] | None
    """The step's rows of conversations → its micro-batches; None: the peer packs as it likes."""
    flat: bool = False
    """Without padding, one conversation behind the other (`padding_free`)."""
    equal: bool = True
    """Whether it computes what we do; only such a form counts in the ratio."""


FORMS = {
    "TRL padded": Form(_at_once),
    "TRL padded by length": Form(_by_length(4)),
    "TRL padded by length, 8": Form(_by_length(8)),
    "TRL padding-free": Form(_rows, flat=True),
    "TRL padding-free at once": Form(_at_once, flat=True),
    "TRL packing wrapped": Form(None, equal=False),
}
"""By name. `padded` is its default: a rectangle of one micro-batch; `by length` is what grouping by length makes of it; the
flat forms keep conversations apart by a mask that transformers makes of their positions; `wrapped` cuts a stream of
conversations into rows that see across the cuts."""


# --- the programs ---------------------------------------------------------------------------------------------------

Answer = dict[str, Any]


def ours(job: Job) -> Iterator[Answer]:
    """The steps of `modelyard train`, on its own packed rows."""
    import torch._dynamo  # noqa: F401  torch imports it for the first step, the peer with all the rest

    from modelyard.config.loader import load_config
    from modelyard.train.console import Console
    from modelyard.train.state import Run

    imports_are_done()
    sys.stdout = sys.stderr
    config = Path(job.folder) / f"{_run_name(job)}.yaml"
    config.write_text(json.dumps(train_config(job)), encoding="utf-8")
    loaded = load_config([config], kind="train")
    run = Run(loaded.train, loaded.architecture, force=False, console=Console())  # type: ignore[arg-type]
    for result, _, _ in run.steps():
        yield {"loss": result.loss, "grad_norm": result.grad_norm, "trained": result.targets}


def _run_name(job: Job) -> str:
    return f"run-{job.method}-{job.dtype}-{job.compiled}-{job.by_row}"


def train_config(job: Job) -> dict[str, Any]:
    """What a user would write for our half."""
    adapted = job.method != "full"
    peft = {
        "type": "lora",
        "rank": RANK,
        "alpha": ALPHA,
        "layers": ["all"],
        "quantization": "nf4" if job.method == "qlora" else "none",
        "quantization_block": QUANTIZATION_BLOCK,
    }
    steps = len(json.loads((Path(job.folder) / "schedule.json").read_text())["steps"])
    return {
        "training": {"train_iters": steps, "compile": job.compiled, "checkpoint": {"interval": None}},
        "batch": {
            "sequence_length": job.sequence,
            "batch_size": job.rows,
            **({"micro_batch_size": 1} if job.by_row else {}),
            "cross_document_attention": False,
            "overlong": "drop",
        },
        "data": {"datasets": {"training": {"type": "memmap", "path": f"{job.folder}/store/data"}}},
        "optimizer": {
            "weight_decay": WEIGHT_DECAY,
            "beta_1": BETAS[0],
            "beta_2": BETAS[1],
            "epsilon": EPSILON,
            "gradient_norm_clipping": MAX_NORM,
            "learning_rate": {"base": LEARNING_RATE},
        },
        "pretrained": {
            "format": "llama",
            "path": f"{job.folder}/model",
            **({"adapter": f"{job.folder}/adapter"} if adapted else {}),
        },
        "model": {
            "distributed": {"training_dtype": job.dtype},
            **({"base_model": {"transformer": {"peft": peft}}} if adapted else {}),
        },
        "run": {"experiment_dir": f"{job.folder}/{_run_name(job)}"},
    }


def theirs(job: Job, take: Callable[[Answer], None]) -> None:
    """TRL's `SFTTrainer`, which calls `take` after each step; how conversations come together is `FORMS[job.program]`."""
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if job.method != "full":
        import peft  # noqa: F401
    if job.method == "qlora":
        import bitsandbytes  # noqa: F401
    imports_are_done()
    folder, form = Path(job.folder), FORMS[job.program]
    schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
    divide = form.divide
    micro_batches: list[list[list[int]]] = []
    if divide is not None:
        micro_batches = [divide(rows, schedule["lengths"]) for rows in schedule["steps"]]
        assert len({len(step) for step in micro_batches}) == 1, [len(step) for step in micro_batches]

    class Trainer(SFTTrainer):
        def get_train_dataloader(self) -> Any:
            if divide is None:
                return super().get_train_dataloader()
            data = self._remove_unused_columns(self.train_dataset, description="training")
            batches = [part for step in micro_batches for part in step]
            loader = torch.utils.data.DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    class Report(TrainerCallback):
        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "grad_norm" in logs:
                take({"loss": logs["loss"], "grad_norm": float(logs["grad_norm"])})

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = (folder / "talks.jinja").read_text(encoding="utf-8")
    tokenizer.pad_token = tokenizer.eos_token
    model = their_model(job)
    records = [json.loads(line) for line in (folder / "talks.jsonl").open(encoding="utf-8")]
    arguments = SFTConfig(
        output_dir=str(folder / "theirs"),
        use_cpu=True,
        bf16=job.dtype == "bfloat16",
        torch_compile=job.compiled,
        max_steps=len(schedule["steps"]),
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=len(micro_batches[0]) if divide is not None else 1,
        assistant_only_loss=True,
        padding_free=form.flat,
        packing=divide is None,
        packing_strategy="wrapped" if divide is None else "bfd",
        max_length=job.sequence if divide is None else None,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=MAX_NORM,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=tokenizer,
        callbacks=[Report()],
    )
    if divide is not None:
        refuse_other_tokens(trainer.train_dataset, schedule)
    for parameter in trainer.model.parameters():
        if (
            parameter.requires_grad
        ):  # over a quantized base TRL narrows the adapter to bf16, and nothing keeps it wide
            parameter.data = parameter.data.float()
    trainer.train()


def their_model(job: Job) -> Any:
    """What the peer's users would train: with an adapter the base in the dtype that is computed in, the adapter in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if job.method == "full":
        return AutoModelForCausalLM.from_pretrained(Path(job.folder) / "model", dtype=torch.float32)
    from peft import PeftModel

    dtype = getattr(torch, job.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if job.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(Path(job.folder) / "model", **options)
    return PeftModel.from_pretrained(base, Path(job.folder) / "adapter", is_trainable=True)


def refuse_other_tokens(prepared: Any, schedule: dict[str, Any]) -> None:
    """Raise where the peer's tokens of a conversation, or which of them it trains on, are not ours."""
    for number, (example, ids, labels) in enumerate(zip(prepared, schedule["ids"], schedule["labels"])):
        found = (checksum(example["input_ids"]), checksum(example["labels"]))
        if found != (ids, labels):
            raise RuntimeError(f"conversation {number}: TRL has other tokens, or trains on others: {example}")


def checksum(numbers: Sequence[int]) -> int:
    return zlib.crc32(" ".join(map(str, numbers)).encode())


def resident(field: str) -> int:
    """A size of /proc/self/status in bytes (VmHWM: the most that was resident so far); 0 where there is none."""
    with Path("/proc/self/status").open() as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


_imports = [0]


def imports_are_done() -> None:
    """Take what is resident now for what the imports hold."""
    _imports[0] = resident("VmRSS")


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be read as an answer
    import torch

    torch.set_num_threads(job.threads)
    begin = [0.0]

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "memory":
                print(
                    json.dumps({"peak_bytes": resident("VmHWM"), "imports_bytes": _imports[0]}),
                    file=answers,
                    flush=True,
                )
            elif line.strip() == "step":
                begin[0] = time.perf_counter()
                return
            else:
                break
        os._exit(0)

    def take(answer: Answer) -> None:
        seconds = time.perf_counter() - begin[0]
        print(json.dumps({"seconds": seconds, **answer}), file=answers, flush=True)
        listen()

    listen()
    if job.program == "modelyard":
        for answer in ours(job):
            take(answer)
    else:
        theirs(job, take)
    listen()


class Program:
    """The other end of a program's process."""

    def __init__(self, job: Job, python: str = sys.executable):
        self.job = job
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(job.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        root = Path(__file__).resolve().parent.parent
        environment["PYTHONPATH"] = str(root) if job.program == "modelyard" else ""
        self._process = subprocess.Popen(
            [python, __file__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, question: str) -> Answer:
        """The answer to `step` or `memory`; raises RuntimeError where the program has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            raise RuntimeError(f"{self.job.name} needs more than {PATIENCE} seconds for a step")
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"{self.job.name} ended with status {self._process.wait()}: see its message above"
            )
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have names that others may have
    main()
