"""How fast is full fine-tuning on conversations, and how much memory does it take, against TRL's `SFTTrainer`?

Both train the same Llama from the same weights on the same conversations in every optimizer step, with the loss on the
assistant's tokens alone, conversations kept apart, and the same AdamW, dtype and threads. Ours is the loop of `modelyard train`:
`modelyard prepare`, then rows packed with whole conversations. TRL has several ways to lay out the conversations of a step
(`FORMS` in sft_programs.py; --forms tries others than a case's own), and the fastest that computes the same counts. Programs step in turn, each in a
process of its own; loss and gradient norm of every step must agree, or the form is left out of the ratio: a step that does
not train is fast. Before that every conversation's tokens, and which of them are trained on, are compared.

Tokens are those of the conversations, on both sides: no padding. Memory is the most that was resident in the whole process
(VmHWM), imports and loading included.

    python benchmarks/sft.py --trl-python /path/to/python         where TRL is installed
    python benchmarks/sft.py --only 32k --rounds 5 --forms 'TRL padded' --forms 'TRL padding-free'

The conversations are GSM8K's and GPTeacher's from `../shared/data/instruct` where that is, else words of the same lengths.
Writes `benchmarks/results/sft.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import RESULTS, write_result
from benchmarks.sft_programs import FORMS, IGNORED, Job, Program, checksum
from modelyard.config.batch import BatchConfig
from modelyard.config.data import MemmapDataset, SamplingConfig
from modelyard.config.prepare import PrepareConfig
from modelyard.data.lanes import not_targets
from modelyard.data.prepare import prepare as run_prepare
from modelyard.data.stream import DataStream
from modelyard.data.tokenizer_training import BOS, EOS, chat_tokens, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
OURS, PEER = "modelyard", "TRL"
HEAT, FINALISTS = 1, 3
"""Measured steps of a form by which the fastest are found, and how many of them step in turn with us."""
WARM_UP = 3
"""Steps before those measured where the peer compiles; else one."""
TOLERANCE = {"float32": 5e-4, "bfloat16": 2e-2}
"""Relative, of loss and gradient norm. In bf16 the two round at other places."""


def chat_template(*, marked: bool) -> str:
    """Llama 3's format without tools, as jinja; `marked`: as TRL wants it, saying which part the model is to generate."""
    said = "{{ message['content'] | trim + '<|eot_id|>' }}"
    if marked:
        answer = "{% if message['role'] == 'assistant' %}{% generation %}" + said + "{% endgeneration %}"
        said = answer + "{% else %}" + said + "{% endif %}"
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}" + said + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: the model, its data and how it is computed."""

    tokenizer: str
    """`32k`, trained on the conversations, or `llama3`."""
    dtype: str = "float32"
    rows: int = 2
    sequence: int = 1024
    hidden: int = 512
    layers: int = 8
    threads: int = 2
    vocabulary: int = 32_000
    """At most, of a trained tokenizer."""
    talks: int = 13_000
    """Conversations prepared."""
    forms: tuple[str, ...] = ("TRL padding-free", "TRL padded by length, 8", "TRL packing wrapped")
    """Of the peer, tried where none are named."""


def cases(threads: int) -> dict[str, Case]:
    """By name: vocabulary, dtype. What is slow in the first is not tried in the others."""
    short = Case("32k", threads=threads)
    every = (*short.forms, "TRL padded", "TRL padding-free compiled")
    return {
        "32k": dataclasses.replace(short, forms=every),
        "128k": dataclasses.replace(short, tokenizer="llama3"),
        "32k-bf16": dataclasses.replace(
            short, dtype="bfloat16", forms=(*short.forms, "TRL padding-free compiled")
        ),
    }


# --- the conversations ----------------------------------------------------------------------------------------------


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Real ones where they are, in an order drawn once; else generated."""
    folder = SHARED / "instruct"
    found = list(_real(folder)) if folder.exists() else list(_generated(count))
    random.Random(0).shuffle(found)
    return found[:count]


def _real(folder: Path) -> Iterator[list[dict[str, str]]]:
    for name in ("gsm8k_train", "gpteacher_codegen", "gpteacher_roleplay"):
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                asked = record.get("question") or "\n\n".join(
                    filter(None, (record["instruction"], record["input"]))
                )
                yield _talk(asked, record.get("answer") or record["response"])


def _generated(count: int) -> Iterator[list[dict[str, str]]]:
    """Words that repeat as words do, as many as the real conversations have."""
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20_000)]
    frequent = list(accumulate(1 / (place + 10) for place in range(len(words))))
    for _ in range(count):
        question, answer = (int(draw.lognormvariate(mean, spread)) + 1 for mean, spread in LENGTHS)
        yield _talk(
            *(" ".join(draw.choices(words, cum_weights=frequent, k=min(n, 600))) for n in (question, answer))
        )


LENGTHS = ((3.5, 0.45), (3.75, 0.67))
"""Of questions and answers in words: mean and standard deviation of the logarithm."""


def _talk(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": answer.strip()}]


# --- what both programs read ----------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Fill `folder` as `Job.folder` says; returns the schedule."""
    talks = conversations(case.talks)
    tokenizer = make_tokenizer(case, talks, folder)
    with (folder / "source.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": talk}) + "\n" for talk in talks)
    config = {
        "output_path": str(folder / "store"),
        "dataset": {"path": str(folder / "source.jsonl"), "conversations": {"family": "template"}},
        "tokenizer": {"path": str(tokenizer)},
    }
    run_prepare(PrepareConfig.model_validate(config), report=lambda line: None, terminal=False)
    vocabulary = make_model(case, folder)
    schedule, chosen = make_schedule(case, folder, vocabulary, steps)
    with (folder / "talks.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": talks[number]}) + "\n" for number in chosen)
    (folder / "talks.jinja").write_text(chat_template(marked=True))
    (folder / "schedule.json").write_text(json.dumps(schedule), encoding="utf-8")
    return schedule


def make_tokenizer(case: Case, talks: list[list[dict[str, str]]], folder: Path) -> Path:
    destination = folder / "tokenizer"
    if case.tokenizer == "llama3":
        destination.mkdir()
        source = SHARED / "tokenizers" / "llama3"
        (destination / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        (destination / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        texts = (message["content"] for talk in talks for message in talk)
        special = (BOS, EOS, *chat_tokens("llama3"))
        train_tokenizer(texts, destination, vocab_size=case.vocabulary, special_tokens=special)
    (destination / "chat_template.jinja").write_text(chat_template(marked=False))
    return destination


def make_model(case: Case, folder: Path) -> int:
    """A Llama of the shape that train_step.py measures, as a Hugging Face folder; returns its vocabulary."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab_size()
    vocabulary += -vocabulary % 64
    heads = case.hidden // 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=case.hidden,
            intermediate_size=int(case.hidden * 8 / 3 / 64 + 0.5) * 64,
            num_hidden_layers=case.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 4, 1),
            head_dim=64,
            rms_norm_eps=1e-5,
            max_position_embeddings=case.sequence,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder / "model")
    return vocabulary


def make_schedule(case: Case, folder: Path, vocabulary: int, steps: int) -> tuple[dict[str, Any], list[int]]:
    """Which conversations are in each row of each step, as our loop packs them; and their numbers in the store.

    Conversations are numbered in the order in which they come. `lengths`, `ids` and `labels` (checksums) are of each of them.
    """
    batch = BatchConfig(
        sequence_length=case.sequence, batch_size=case.rows, cross_document_attention=False, overlong="drop"
    )
    stream = DataStream(
        MemmapDataset(type="memmap", path=folder / "store" / "data"),
        name="training",
        sampling=SamplingConfig(),
        batch=batch,
        vocab_size=vocabulary,
    )
    chosen: list[int] = []
    found: dict[str, list[Any]] = {"steps": [], "lengths": [], "ids": [], "labels": [], "trained": []}
    for step in range(steps):
        rows = []
        for dataset, pieces in stream.pieces(step * case.rows, (step + 1) * case.rows):
            rows.append(list(range(len(chosen), len(chosen) + len(pieces))))
            for number, begin, end in pieces:
                ids = dataset.document(number).tolist()
                assert (begin, end) == (0, len(ids))
                hidden = not_targets(dataset, number, 0, end, spans=False, lane="sft")
                assert hidden is not None
                labels = [IGNORED if masked else token for token, masked in zip(ids, hidden.tolist())]
                chosen.append(number)
                found["lengths"].append(end)
                found["ids"].append(checksum(ids))
                found["labels"].append(checksum(labels))
                found["trained"].append(sum(label != IGNORED for label in labels))
        found["steps"].append(rows)
    # talks.jsonl has each of them again where an epoch has passed.
    return {**found, "vocabulary": vocabulary}, chosen


# --- the comparison -------------------------------------------------------------------------------------------------


def tokens_of(schedule: dict[str, Any], what: str) -> list[int]:
    """Tokens of each step: all of the conversations (`lengths`), or those trained on (`trained`)."""
    return [sum(schedule[what][talk] for row in rows for talk in row) for rows in schedule["steps"]]


def compare(jobs: list[Job], schedule: dict[str, Any], rounds: int, python: str) -> dict[str, dict[str, Any]]:
    """Let the programs step in turn; the first steps are not measured.

    Returns by name: tokens_per_second and trained_per_second (medians; None of trained tokens where a form has a selection of its
    own), peak_bytes and of those imports_bytes, rounds, and loss and grad_norm of every step. Raises RuntimeError where a program dies.
    """
    programs: dict[str, Program] = {}
    answers: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    try:
        for job in jobs:
            programs[job.name] = Program(job, sys.executable if job.program == OURS else python)
        # What is compiled meets other lengths in its second step, and is compiled again.
        warm_up = WARM_UP if any(job.compiled and job.program != OURS for job in jobs) else 1
        for _ in range(warm_up + rounds):
            for name, program in programs.items():
                answers[name].append(program.ask("step"))
        memory = {name: program.ask("memory") for name, program in programs.items()}
    finally:
        for program in programs.values():
            program.close()
    real, trained = (tokens_of(schedule, what)[warm_up:] for what in ("lengths", "trained"))
    found = {}
    for job in jobs:
        steps, scheduled = answers[job.name], job.program == OURS or FORMS[job.program].divide is not None
        seconds = [step["seconds"] for step in steps[warm_up:]]
        tokens = real if scheduled else [job.rows * job.sequence] * rounds
        found[job.name] = {
            "tokens_per_second": statistics.median(n / s for n, s in zip(tokens, seconds)),
            "trained_per_second": statistics.median(n / s for n, s in zip(trained, seconds))
            if scheduled
            else None,
            **memory[job.name],
            "rounds": rounds,
            "seconds": seconds,
            "loss": [step["loss"] for step in steps],
            "grad_norm": [step["grad_norm"] for step in steps],
        }
    return found


def furthest(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss or gradient norm."""
    return max(
        abs(theirs - mine) / abs(mine)
        for key in ("loss", "grad_norm")
        for mine, theirs in zip(ours[key], other[key])
    )


def measure(
    case: Case, folder: Path, forms: list[str], rounds: int, python: str, compiled: bool = True
) -> dict[str, Any]:
    """Each of the peer's forms alone for a step, where there are many, then ours and its fastest in turn."""
    schedule = prepare(case, folder, WARM_UP + max(rounds, HEAT))

    def job(name: str) -> Job:
        program = name.removesuffix(" compiled")
        return Job(program, str(folder), case.dtype, case.rows, case.sequence, case.threads, name != program)

    def is_equal(name: str) -> bool:
        return FORMS[job(name).program].equal

    rows: dict[str, dict[str, Any]] = {}
    tried = [name for name in forms if not is_equal(name) or sum(map(is_equal, forms)) > FINALISTS]
    for name in tried:
        print(f"  trying {name}", flush=True)
        try:
            rows[name] = compare([job(name)], schedule, HEAT, python)[name]
        except RuntimeError as error:
            rows[name] = {"failed": str(error)}
    equal = [name for name in forms if is_equal(name) and "failed" not in rows.get(name, {})]
    equal.sort(key=lambda name: -rows.get(name, {}).get("tokens_per_second", 0.0))
    ours = [OURS, f"{OURS} compiled"][: 1 + compiled]
    found = compare([job(name) for name in (*ours, *equal[:FINALISTS])], schedule, rounds, python)
    rows |= found
    for name, row in rows.items():
        if "failed" not in row:
            row["difference"] = furthest(found[OURS], row)
        if name in (*ours, *equal) and not row["difference"] <= TOLERANCE[case.dtype]:
            row["failed"] = f"computes something else: {row['difference']:.1e} from ours"
    equal = [name for name in equal if "failed" not in rows[name]]
    result = {"vocabulary": schedule["vocabulary"], "rows": {name: rows[name] for name in (*ours, *forms)}}
    if not any(found[OURS]["grad_norm"]) or any("failed" in rows[name] for name in ours):
        raise RuntimeError(f"{OURS} does not train: {result}")
    if equal:

        def speed(name: str) -> float:
            return rows[name]["tokens_per_second"]

        best, theirs = max(ours, key=speed), max(equal, key=speed)
        eager = [name for name in equal if not name.endswith(" compiled")]
        result |= {
            "ours": best,
            "theirs": theirs,
            "speed": speed(best) / speed(theirs),
            "speed_eager": speed(OURS) / max(map(speed, eager)) if eager else None,
            "memory": rows[best]["peak_bytes"] / min(rows[name]["peak_bytes"] for name in equal),
            "memory_of_fastest": rows[best]["peak_bytes"] / rows[theirs]["peak_bytes"],
        }
    return result


def print_result(result: dict[str, Any]) -> None:
    print(f"  {'':<34} {'tokens/s':>9} {'trained/s':>9} {'peak MiB':>9} {'steps':>5}   loss, norm of step 1")
    for name, row in result["rows"].items():
        if "failed" in row:
            print(f"  {name:<34} left out: {row['failed']}")
            continue
        trained = row["trained_per_second"]
        print(
            f"  {name:<34} {row['tokens_per_second']:>9,.0f} {f'{trained:,.0f}' if trained else '-':>9} "
            f"{row['peak_bytes'] / 2**20:>9,.0f} {row['rounds']:>5}   {row['loss'][0]:.4f}, {row['grad_norm'][0]:.3f}"
        )
    if "speed" in result:
        print(
            f"  {result['ours']} against {result['theirs']}: {result['speed']:.2f} times as fast, "
            f"{result['memory']:.2f} of the least memory that an equal form of TRL takes",
            flush=True,
        )


PEER_NEEDS = ("trl", "transformers", "accelerate", "torch")


def peer_versions(
    python: str, names: Sequence[str] = PEER_NEEDS, optional: Sequence[str] = ()
) -> dict[str, str] | None:
    """Versions of the peer and what it stands on, as another interpreter has them, and of what is `optional` where it is
    there; None where one of `names` cannot be imported."""
    program = (
        "import importlib, importlib.util as u, json\n"
        f"names = [*{list(names)!r}, *(n for n in {list(optional)!r} if u.find_spec(n))]\n"
        "print(json.dumps({n: importlib.import_module(n).__version__ for n in names}))"
    )
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", default=sys.executable, metavar="PATH",
                        help="interpreter that has TRL (default: this one)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of the fastest (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", metavar="CASE", help="may be given several times")
    parser.add_argument("--forms", action="append", metavar="FORM", help="of TRL, may be given several times")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    every = cases(options.threads)
    for given, known, what in (
        (options.only, list(every), "case"),
        (options.forms, [*FORMS, *(f"{form} compiled" for form in FORMS)], "form"),
    ):
        if unknown := [name for name in given or () if name not in known]:
            parser.error(f"no {what} {', '.join(unknown)}; there are: {', '.join(known)}")
    versions = peer_versions(options.trl_python)
    if versions is None:
        print(
            f"TRL is not there ({options.trl_python} cannot import it; pip install trl): ours alone, nothing is written"
        )
    path = RESULTS / "sft.json"
    results = {}
    if options.only and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for name in options.only or every:
        case = every[name]
        if case.tokenizer == "llama3" and not (SHARED / "tokenizers" / "llama3").exists():
            print(f"{name} needs {SHARED / 'tokenizers' / 'llama3'}: left out")
            continue
        forms = [] if versions is None else options.forms or case.forms
        print(
            f"{name}: {case.rows} x {case.sequence} tokens, {case.dtype}, {case.threads} threads", flush=True
        )
        with tempfile.TemporaryDirectory() as folder:
            result = measure(case, Path(folder), list(forms), options.rounds, options.trl_python)
        print_result(result)
        results[name] = {"case": dataclasses.asdict(case), "versions": versions, **result}
        if versions is not None:
            ordered = {name: results[name] for name in every if name in results}
            write_result("sft", {"results": ordered})
    if versions is not None:
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
