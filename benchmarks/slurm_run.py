"""The quickstart on a Slurm of our own: prepared, trained, interrupted in each way that Slurm has, and the same in the end?

    python benchmarks/slurm_run.py [--folder DIR] [--write-docs]

Starts munged, slurmctld and two slurmd as this user (local_slurm.py; Debian: apt install slurm-wlm munge), takes the
quickstart's configs, the model made smaller, and lets `modelyard launch slurm --submit` do the rest: a preparation on two
nodes, a training that is never stopped (one node, two processes), and the same on two nodes with a process each, which is
told to save as before a time limit, preempted by another job, cancelled and submitted again. Prints what was typed and what
the jobs wrote, and compares: every logged loss has to be bit-equal. With `--write-docs` the record goes to
docs/launching.md. Exit status 1 where something differs. One to two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import put_into  # noqa: E402
from benchmarks.local_slurm import LocalSlurm, missing  # noqa: E402

QUICKSTART = ROOT / "examples" / "quickstart"
DOCS = ROOT / "docs" / "launching.md"
ITERATIONS = 160
SAVES = 1000
"""Iterations between checkpoints: more than there are, so that each one is from an interruption, or the last."""
PREPARE = [f"dataset.path={sysconfig.get_path('stdlib')}"]
TRAIN = [
    f"training.train_iters={ITERATIONS}",
    "training.logs.interval=1",
    "training.logs.tensorboard=no",
    f"training.checkpoint.interval={SAVES}",
    "training.evaluators={validation: {interval: 80, evaluator: {type: loss, iterations: 2, dataset_name: validation}}}",
    "training.export={}",
    "batch.sequence_length=64",
    "batch.micro_batch_size=4",
    "batch.batch_size=8",
    "model.base_model.vocab_size=512",
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.hidden_size=48",
    "model.base_model.transformer.ffn_hidden_size=128",
    "optimizer.learning_rate.warmup_iterations=10",
    f"optimizer.learning_rate.decay_iterations={ITERATIONS}",
]


@dataclass
class Story:
    """A project on a cluster: what was typed and what came of it, as it is told in the docs."""

    folder: Path
    slurm: LocalSlurm
    lines: list[str] = field(default_factory=list)
    hurried: set[tuple[int, str]] = field(default_factory=set)

    def type(self, *words: object) -> str:
        """A command of `modelyard` or of Slurm; returns what it wrote. Raises RuntimeError where it fails."""
        texts = [str(word) for word in words]
        self.lines.append(f"$ {shlex.join(texts)}")
        command = [sys.executable, "-m", *texts] if texts[0] == "modelyard" else texts
        environment = {**self.slurm.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(texts)}: {done.stdout}{done.stderr}")
        if texts[0] != "modelyard" or texts[1] == "launch":
            self.lines += done.stdout.splitlines()
        return done.stdout

    def submit(self, config: str, *words: object) -> int:
        """`modelyard launch slurm CONFIG WORDS --submit`; returns the job's number."""
        return int(self.type("modelyard", "launch", "slurm", config, *words, "--submit").split()[-1])

    def end(self, number: int, seconds: float = 90.0) -> dict[str, str]:
        """Wait until the job has ended, and return what Slurm says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def ended() -> dict[str, str] | None:
            self.hurry(number)
            job = self.slurm.job(number)
            return job if job["JobState"] in over else None

        found: dict[str, str] = self.slurm.wait(ended, seconds, words=f"the end of job {number}")
        log = Path(found["StdOut"])
        self.lines += [f"$ cat {log.name}", *shortened(log.read_text(errors="replace").splitlines())]
        return found

    def hurry(self, number: int) -> None:
        """A job that is queued again waits for two minutes, of which this Slurm needs two seconds: a node takes what begins
        in the second in which it was killed for what was killed."""
        job = self.slurm.job(number)
        start = (number, job["Restarts"])
        if job["Reason"] == "BeginTime" and start not in self.hurried:
            self.slurm.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")
            self.hurried.add(start)

    def reach(self, number: int, run: str, iteration: int, seconds: float = 90.0) -> None:
        """Wait until the job's run has logged this iteration."""

        def reached() -> bool:
            self.hurry(number)
            return any(record["iteration"] >= iteration for record in records(self.folder / run))

        self.slurm.wait(reached, seconds, words=f"iteration {iteration} of {run}")


def shortened(lines: list[str]) -> list[str]:
    """The lines of a log, of several iterations in a row the first and the last."""
    found: list[str] = []
    logged = [line.startswith("iteration ") for line in lines]
    for i, line in enumerate(lines):
        inside = logged[i] and 0 < i < len(lines) - 1 and logged[i - 1] and logged[i + 1]
        if not inside:
            found.append(line)
        elif found[-1] != "...":
            found.append("...")
    return found


OF_THE_HOUR = (
    "time",
    "seconds",
    "tokens_per_second",
    "data_wait_share",
    "memory_bytes",
    "model_flops_per_second",
)


def records(run: Path) -> list[dict[str, Any]]:
    """What was logged of iterations and evaluations, without what depends on the hour."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half a line: it is being written
        found.append({name: value for name, value in record.items() if name not in OF_THE_HOUR})
    return found


def tell(story: Story) -> Iterator[tuple[str, str | None]]:
    """Everything, step by step: what was shown, and what was wrong with it (None: nothing)."""
    prepare, train = QUICKSTART / "prepare.yaml", QUICKSTART / "train.yaml"
    for path, overrides in ((prepare, PREPARE), (train, TRAIN)):
        _with(path, overrides, story.folder / path.name)
    story.type("modelyard", "tokenizer", "train", "prepare.yaml", "--vocab-size", 512)

    job = story.end(story.submit("prepare.yaml", "--nodes", 2))
    made = story.folder / "quickstart" / "data" / "fast_llm_config_training.yaml"
    yield "a preparation on two nodes", _wrong(job, restarts=0) or (None if made.exists() else f"no {made}")

    cpus = ["--gpus-per-node", 0]
    whole = story.submit(
        "train.yaml", *cpus, "--processes-per-node", 2, "--job-name", "whole", "run.experiment_dir=whole"
    )
    yield "a training on one node", _wrong(story.end(whole), restarts=0)

    parted = story.submit(
        "train.yaml", "--nodes", 2, *cpus, "--job-name", "parted", "run.experiment_dir=parted"
    )
    story.reach(parted, "parted", ITERATIONS // 5)
    story.type("scancel", "--batch", "--signal=USR1", parted)  # as Slurm itself does before the time limit
    story.reach(parted, "parted", 2 * ITERATIONS // 5)
    story.type(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    story.slurm.wait(lambda: story.slurm.job(parted).get("Restarts") == "2", words="a second restart")
    story.reach(parted, "parted", 3 * ITERATIONS // 5)
    story.type("scancel", parted)
    job = story.end(parted)
    yield "the same on two nodes: told, preempted, cancelled", _wrong(job, restarts=2, state="CANCELLED")

    again = story.type("sbatch", "parted.sbatch").split()[-1]
    yield "and submitted again", _wrong(story.end(int(again)), restarts=0)

    there, here = records(story.folder / "whole"), records(story.folder / "parted")
    differ = [a["iteration"] for a, b in zip(there, here) if a != b]
    wrong = f"iterations {differ[:5]} differ" if differ else None
    if len(there) != len(here) or [r["iteration"] for r in there if "grad_norm" in r] != list(
        range(1, ITERATIONS + 1)
    ):
        wrong = f"{len(there)} and {len(here)} records"
    yield "every loss of the two trainings", wrong


def _with(example: Path, overrides: list[str], path: Path) -> None:
    """An example's config with the overrides in it."""
    values = yaml.safe_load(example.read_text(encoding="utf-8"))
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _wrong(job: dict[str, str], *, restarts: int, state: str = "COMPLETED") -> str | None:
    found = (job["JobState"], job["Restarts"])
    expected = (state, str(restarts))
    return None if found == expected else f"{found} in place of {expected}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep everything there; must not exist")
    parser.add_argument("--write-docs", action="store_true", help="put the record into docs/launching.md")
    options = parser.parse_args()
    if lacking := missing():
        print(
            f"error: needs Slurm, and there is no {', '.join(lacking)} here (Debian: apt install slurm-wlm munge)"
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="modelyard-slurm-") as temporary:
        folder = options.folder or Path(temporary)
        project = folder / "project"
        project.mkdir(parents=True)
        rows = []
        with LocalSlurm(folder / "slurm") as slurm:
            version = slurm.run("sinfo", "--version").strip()
            story = Story(project, slurm)
            for what, wrong in tell(story):
                rows.append((what, wrong))
                print(f"{what}: {wrong or 'as it should be'}", flush=True)
        text = "\n".join(story.lines).replace(str(project), "/work").replace(sys.executable, "python")
        text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "node1", text)
        print(text)
        if options.write_docs:
            head = f"`python benchmarks/slurm_run.py`, {date.today().isoformat()}, {version}, two nodes on one machine:"
            table = "\n".join(f"| {what} | {wrong or 'as it should be'} |" for what, wrong in rows)
            put_into(
                DOCS, "slurm run", f"{head}\n\n| what | found |\n| --- | --- |\n{table}\n\n```\n{text}\n```"
            )
    return int(any(wrong for _, wrong in rows))


if __name__ == "__main__":
    raise SystemExit(main())
