"""The script that `modelyard launch slurm` writes: its words, and what it does with stand-ins for Slurm's programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.cli import main
from modelyard.launch.cluster import seconds
from modelyard.launch.slurm import quoted
from tests.launch.clusters import WAIT, StandIns, launched, project, refused

Screen = pytest.CaptureFixture[str]
CPUS = ["--gpus-per-node", "0"]
JOB = {"SLURM_JOB_ID": "40007", "SLURM_CPUS_PER_TASK": "4"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project(tmp_path / "a project")
    monkeypatch.chdir(folder)
    return folder


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")]


def test_what_slurm_is_told(here: Path, capsys: Screen) -> None:
    script = launched(
        capsys, "slurm", "train.yaml", "--nodes", "2", "--gpus-per-node", "4", "--cpus", "32", "--mem", "64G",
        "--time", "1-02:00:00", "--grace", "600", "--partition", "gpu", "--account", "me", "--qos", "low",
        "--job-name", "first.run", "--log", "logs/a-%j.txt", "--sbatch", "constraint=h100", "--sbatch=--exclusive",
    )  # fmt: skip
    assert options(script) == [
        "job-name=first.run", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=32", "mem=64G",
        "time=1-02:00:00", "partition=gpu", "account=me", "qos=low", f"chdir='{here}'", f"output='{here}/logs/a-%j.txt'",
        "open-mode=append", "requeue", "signal=B:USR1@600", "constraint=h100", "exclusive",
    ]  # fmt: skip
    bare = options(launched(capsys, "slurm", "train.yaml", "--nodes", "1:2", *CPUS))
    assert bare == [
        "job-name=train", "nodes=1-2", f"chdir='{here}'", f"output='{here}/train-%j.out'",
        "open-mode=append", "requeue", "signal=B:USR1@300", "no-kill",
    ]  # fmt: skip
    several = options(
        launched(capsys, "slurm", "prepare.yaml", "--nodes", "2", "--processes-per-node", "4", "--cpus", "32")
    )
    assert several[:4] == ["job-name=prepare", "nodes=2", "ntasks-per-node=4", "cpus-per-task=8"]


def step(script: str, folder: Path, **more: str) -> list[str]:
    """The words of the one srun of a script."""
    stand_ins = StandIns(folder)
    stand_ins.program("srun", "exit 0\n")
    stand_ins.program("hostname", "echo node7\n")
    status, said = stand_ins.run(script, folder, **JOB, **more)
    assert (status, said) == (0, "")
    (words,) = stand_ins.words("srun")
    return words


HERE = [sys.executable, "-m", "modelyard"]
PLAIN = ["--export=ALL", "--cpu-bind=none"]
TRAINING = ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.yaml", "--gpus-per-node", "2"], [*TRAINING, *HERE, "train", "train.yaml", "--nproc", "2", "--max-restarts", "3"]),
        (
            ["train.yaml", "--nodes", "2", *CPUS, "--processes-per-node", "4", "--max-restarts", "0", "--setup", ":", "--cpus", "4"],
            ["--cpus-per-task=4", *TRAINING, "modelyard", "train", "train.yaml", "--nproc", "4", "--nnodes", "2", "--rdzv-endpoint", "node7:25007", "--rdzv-id", "40007"],
        ),
        (
            ["train.yaml", "--nodes", "2:4", "--gpus-per-node", "1", "--program", "'my python' -m modelyard"],
            [*TRAINING, "--no-kill", "my python", "-m", "modelyard", "train", "train.yaml", "--nproc", "1", "--max-restarts", "3", "--nnodes", "2:4", "--rdzv-endpoint", "node7:25007", "--rdzv-id", "40007"],
        ),
        (["prepare.yaml"], ["--kill-on-bad-exit=1", *HERE, "prepare", "prepare.yaml"]),
        (
            ["train.yaml", *CPUS, "--image", "nvcr.io#nvidia/pytorch:25.01-py3", "--volume", "/data:/in"],
            [*TRAINING, "--container-image=nvcr.io#nvidia/pytorch:25.01-py3", "--container-mounts=HERE:HERE,/data:/in", "--container-workdir=HERE", "modelyard", "train", "train.yaml", "--nproc", "1", "--max-restarts", "3"],
        ),
        (
            ["train.yaml", "--gpus-per-node", "1", "--image", "yard.sif"],
            [*TRAINING, "apptainer", "exec", "--nv", "--bind", "HERE:HERE", "--pwd", "HERE", "yard.sif", "modelyard", "train", "train.yaml", "--nproc", "1", "--max-restarts", "3"],
        ),
        (
            ["train.yaml", *CPUS, "--image", "yard.sif", "--container-runtime", "pyxis"],
            [*TRAINING, "--container-image=yard.sif", "--container-mounts=HERE:HERE", "--container-workdir=HERE", "modelyard", "train", "train.yaml", "--nproc", "1", "--max-restarts", "3"],
        ),
    ],
)  # fmt: skip
def test_what_runs(here: Path, capsys: Screen, words: list[str], expected: list[str]) -> None:
    config = words[0]
    expected = [str(here / word) if word == config else word.replace("HERE", str(here)) for word in expected]
    plain = PLAIN[:1] if "--cpus" in words else PLAIN
    assert step(launched(capsys, "slurm", *words), here) == [*plain, *expected]


def test_processes_of_a_preparation_have_numbers(here: Path, capsys: Screen) -> None:
    script = launched(capsys, "slurm", "prepare.yaml", "--nodes", "2", "--program", "env")
    words = step(script, here)
    assert words[:3] == [*PLAIN, "--kill-on-bad-exit=1"]
    # `env` in place of the program would take `prepare` for a command.
    inside = [word for word in words[3:] if word != str(here / "prepare.yaml")]
    assert inside[-2:] == ["env", "prepare"]
    done = subprocess.run(
        inside[:-1], env={"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {"RANK=5", "WORLD_SIZE=8"} <= set(done.stdout.splitlines())


def test_anything_may_be_in_a_word(here: Path, capsys: Screen) -> None:
    odd = """it's a "$HOME" `x` \\ (*) #1"""
    script = launched(
        capsys, "slurm", "train.yaml", *CPUS, f"run.experiment_dir={odd}", "--env", f"ODD={odd}", "--program", "python3",
    )  # fmt: skip
    Path(odd).mkdir()
    words = step(script, here, HOME="/home/me")
    assert words[-5] == f"run.experiment_dir={odd}"
    # The environment is there before the step begins.
    stand_ins = StandIns(here / odd)
    stand_ins.program("srun", 'printf "%s" "$ODD"\n')
    assert stand_ins.run(script, here, **JOB) == (0, odd)


def test_quoting_for_sbatch() -> None:
    """Its own parser takes a backslash for an escape everywhere (seen with Slurm 22.05)."""
    assert quoted("/a/b-%j.out") == "/a/b-%j.out"
    assert quoted("""a b'c#d"e\\f""") == """'a b\\'c#d"e\\\\f'"""


def test_shellcheck(here: Path, capsys: Screen) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck, which is not here")
    cases = [
        ["train.yaml", "--gpus-per-node", "2"],
        ["train.yaml", "--nodes", "1:4", "--gpus-per-node", "2", "--cpus", "8", "--env", "A=it's", "run.experiment_dir=b c"],
        ["prepare.yaml", "--nodes", "4", "--setup", "module load python", "--setup", "export A=1"],
        ["prepare.yaml", "--image", "yard.sif"],
        ["train.yaml", "--gpus-per-node", "1", "--image", "a b", "--volume", "/x y:/z"],
    ]  # fmt: skip
    for i, words in enumerate(cases):
        Path(f"{i}.sh").write_text(launched(capsys, "slurm", *words))
    files = [f"{i}.sh" for i in range(len(cases))]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


class Queue:
    """A job with its script, started as often as a test likes."""

    def __init__(self, folder: Path, capsys: Screen, *words: str):
        self.folder, self.starts = folder, 0
        self.stand_ins = StandIns(folder)
        self.script = launched(capsys, "slurm", *words, "--log", "logs/%j.out")
        (folder / "logs").mkdir()

    def start(self, does: str, *, told: bool = False, **more: str) -> tuple[int, str]:
        """One start, with what srun does there; whether it was queued again is in `requeued`."""
        (self.folder / "waiting").unlink(missing_ok=True)
        (self.stand_ins.folder / "scontrol.words").unlink(missing_ok=True)
        self.stand_ins.program("srun", does)
        restarts = {"SLURM_RESTART_COUNT": str(self.starts)} if self.starts else {}
        self.starts += 1
        return self.stand_ins.run(self.script, self.folder, told=told, **JOB, **restarts, **more)

    @property
    def requeued(self) -> bool:
        return ["requeue", "40007"] in self.stand_ins.words("scontrol")

    @property
    def notes(self) -> list[str]:
        return [path.name for path in (self.folder / "logs").iterdir()]


@pytest.fixture
def queue(here: Path, capsys: Screen) -> Queue:
    return Queue(here, capsys, "train.yaml", *CPUS, "--max-idle-starts", "2")


RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
COMPLETING = "JobState=COMPLETING Reason=None PreemptTime=None"


@pytest.mark.parametrize(
    ("status", "state", "again"),
    [
        (0, RUNNING, False),
        (1, RUNNING, False),
        (2, RUNNING, False),
        (137, RUNNING, False),
        (138, RUNNING, True),  # told to by hand: scancel --signal=USR1
        (143, RUNNING, False),  # scancel --signal=TERM
        (143, COMPLETING, False),  # scancel
        (138, COMPLETING, False),  # scancel, just as it left
        (143, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
        (143, "JobState=RUNNING Reason=None PreemptTime=2026-01-01T12:00:00", True),
        (1, "JobState=RUNNING Reason=None PreemptTime=2026-01-01T12:00:00", False),
    ],
)
def test_what_is_queued_again(queue: Queue, status: int, state: str, again: bool) -> None:
    queue.stand_ins.state = state
    code, said = queue.start(f"exit {status}\n")
    assert (code, queue.requeued) == (status, again)
    assert said == ("modelyard: job 40007 is queued again, to go on from here\n" if again else "")
    assert queue.notes == ([".modelyard-40007"] if again else [])


def test_a_job_that_lost_too_many_nodes(here: Path, capsys: Screen) -> None:
    """Slurm has taken them from it and lets it go on; where it cannot, it waits for others."""
    queue = Queue(here, capsys, "train.yaml", *CPUS, "--nodes", "2:4")
    for nodes, status, again in ((4, 1, False), (1, 2, False), (1, 1, True)):
        queue.stand_ins.state = f"JobState=RUNNING Reason=None PreemptTime=None NumNodes={nodes} NumCPUs=4"
        assert queue.start(f"exit {status}\n", SLURM_JOB_NUM_NODES="4")[0] == status
        assert queue.requeued == again


def test_the_signal_before_the_time_limit(queue: Queue) -> None:
    assert queue.start(WAIT, told=True)[0] == 138
    assert queue.requeued
    assert (queue.folder / "told").exists()


def test_the_signal_before_there_is_a_step(here: Path, capsys: Screen) -> None:
    setup = "touch waiting; sleep 0.3"
    queue = Queue(here, capsys, "train.yaml", *CPUS, "--setup", setup)
    assert queue.start("exit 0\n", told=True)[0] == 138
    assert queue.requeued
    assert queue.stand_ins.words("srun") == []


def test_a_job_that_gets_nowhere_is_given_up(queue: Queue) -> None:
    checkpoints = queue.folder / "runs" / "tiny" / "checkpoint"
    assert queue.start("exit 138\n")[0] == 138
    assert queue.requeued
    # A checkpoint: the count begins anew. What is being written, or was set aside, is none.
    saves = f"mkdir -p '{checkpoints}'/9 '{checkpoints}'/10 '{checkpoints}'/11.tmp '{checkpoints}'/12.damaged; exit 138\n"
    assert queue.start(saves)[0] == 138
    assert queue.requeued
    assert queue.start(f"mkdir '{checkpoints}'/13.tmp; exit 138\n")[0] == 138
    assert queue.requeued
    assert queue.start("exit 138\n") == (
        1, "modelyard: 2 starts in a row ended without a new checkpoint; the job is not queued again\n",
    )  # fmt: skip
    assert not queue.requeued
    assert queue.notes == []


def test_starts_that_slurm_itself_repeats_count(queue: Queue) -> None:
    """After the loss of a node nobody is left to count; the next start does."""
    killed = "kill -KILL $PPID\nexit 0\n"
    assert queue.start(killed)[0] == -9
    assert queue.start(killed)[0] == -9
    code, said = queue.start("exit 0\n")
    assert (code, "2 starts in a row" in said) == (1, True)
    assert not queue.stand_ins.words("scontrol")


def test_a_preparation_that_is_stopped(here: Path, capsys: Screen) -> None:
    """It has no word for 138: it is killed by the signal, and some of its processes by srun."""
    queue = Queue(here, capsys, "prepare.yaml", "--nodes", "2", "--max-idle-starts", "2")
    assert queue.start(WAIT.replace("138", "143"), told=True)[0] == 138
    assert queue.requeued
    grows = "mkdir -p data.parts/a; echo more >>data.parts/a/tokens; "
    for _ in range(2):
        queue.start(grows + "exit 138\n")
        assert queue.requeued
    assert queue.start("echo alive >data.parts/a/rank-1.json; exit 138\n")[0] == 138
    code, said = queue.start("exit 138\n")
    assert (code, "ended without more on the disk" in said) == (1, True)


def test_setup_that_fails_ends_the_job(here: Path, capsys: Screen) -> None:
    queue = Queue(here, capsys, "train.yaml", *CPUS, "--setup", "false")
    assert queue.start("exit 0\n") == (1, "")
    assert queue.stand_ins.words("srun") == []


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["slrm", "train.yaml"], ["'slrm' is none of slurm, kubeflow; did you mean 'slurm'?; as in `modelyard launch slurm train.yaml --nodes 2 --gpus-per-node 8 --cpus 96 --time 24:00:00 --submit`"]),
        (["slurm", "train.yaml"], ["--gpus-per-node N is missing; on CPUs: --gpus-per-node 0 --processes-per-node P"]),
        (
            ["slurm", "train.yaml", "--gpus-per-node", "3"],
            ["train.yaml:2: batch.batch_size: 8 rows cannot be dealt evenly to 3 data-parallel processes; possible: batch_size 6 or 9, or --nproc 1, 2, 4, 8"],
        ),
        (["slurm", "train.yaml", *CPUS, "training.train_itrs=3"], ["override 1: unknown key 'train_itrs' in training; did you mean 'train_iters'?"]),
        (["slurm", "train.yaml", *CPUS, "--namespace", "a"], ["--namespace is for kubeflow alone"]),
        (["slurm", "train.yaml", *CPUS, "--nodes", "4:2"], ["--nodes: '4:2' has MIN above MAX; write 2:4"]),
        (["slurm", "train.yaml", *CPUS, "--nodes", "0"], ["--nodes: '0' is neither N nor MIN:MAX, from 1 on"]),
        (["slurm", "train.yaml", "--gpus", "2"], ["modelyard launch: unrecognized arguments: --gpus 2; did you mean '--gpus-per-node'? (modelyard launch --help lists them)"]),
        (["slurm", "train.yaml", "--nproc", "2"], ["modelyard launch: unrecognized arguments: --nproc 2; did you mean '--gpus-per-node' or '--processes-per-node'? (modelyard launch --help lists them)"]),
        (["slurm", "prepare.yaml", "--nodes", "1:2"], ["--nodes: 1:2, but a preparation has one number of nodes from its start to its end"]),
        (["slurm", "prepare.yaml", "--gpus-per-node", "1"], ["--gpus-per-node: a preparation has no use for GPUs; leave it out"]),
        (["slurm", "prepare.yaml", "--processes-per-node", "3", "--cpus", "8"], ["--cpus: 8 CPUs of a node cannot be dealt to 3 processes"]),
        (["slurm", "train.yaml", "--gpus-per-node", "2", "--processes-per-node", "4"], ["--processes-per-node: 4, but each of 2 GPUs has a process; leave it out"]),
        (["slurm", "train.yaml", *CPUS, "--time", "soon"], ["--time: 'soon' is none of MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS"]),
        (["slurm", "train.yaml", *CPUS, "--time", "5"], ["--time: 5 leaves nothing before the 300 s of --grace"]),
        (["slurm", "train.yaml", *CPUS, "--mem", "64"], ["--mem: '64' is not a number with K, M, G or T, such as 64G (of 1024)"]),
        (["slurm", "train.yaml", *CPUS, "--env", "A"], ["--env: 'A' is not NAME=VALUE"]),
        (["slurm", "train.yaml", *CPUS, "--env", "A-B=1"], ["--env: 'A-B' is no name of a variable"]),
        (["slurm", "train.yaml", *CPUS, "--volume", "/a:/b"], ["--volume is mounted in an image, and there is none; name one with --image"]),
        (
            ["slurm", "train.yaml", *CPUS, "--image", "x", "--volume", "/a:b", "run.experiment_dir=/runs"],
            ["--volume: 'b' is not an absolute path", "run.experiment_dir: /runs is on no --volume and would go with the container; add --volume FOLDER:PATH"],
        ),
        (["slurm", "train.yaml", *CPUS, "--container-runtime", "pyxis"], ["--container-runtime runs an image, and there is none; name one with --image"]),
        (["slurm", "train.yaml", *CPUS, "--job-name", "a b"], ["--job-name: 'a b' has more than letters, digits, '.', '_' and '-'"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch", "-"], ["--sbatch: '-' is no option of sbatch, such as constraint=h100"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch", "nodes=3"], ["--sbatch: 'nodes=3': launch sets this itself; use --nodes"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch", "--ntasks-per-node 4"], ["--sbatch: 'ntasks-per-node 4': launch sets this itself; use --nodes and --processes-per-node"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch", "gres=gpu:8"], ["--sbatch: 'gres=gpu:8': launch sets this itself; use --gpus-per-node"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch=signal=USR1@60"], ["--sbatch: 'signal=USR1@60': launch sets this itself; use --grace"]),
        (["slurm", "train.yaml", *CPUS, "--sbatch=requeue"], ["--sbatch: 'requeue': launch sets this itself; use --max-idle-starts"]),
        (["slurm", "train.yaml", *CPUS, "--max-idle-starts", "0"], ["--max-idle-starts: at least 1"]),
        (["slurm", "train.yaml", *CPUS, "--program", "'a"], ["--program: No closing quotation"]),
        (["slurm", "train.yaml", *CPUS, "--output", "-", "--submit"], ["--submit needs a file, and --output - makes none; leave one of the two out"]),
        (["slurm", "train.yaml", *CPUS, "--output", "prepare.yaml"], ["prepare.yaml exists and is not from `modelyard launch`; name another file with --output"]),
    ],
)  # fmt: skip
def test_refused(here: Path, capsys: Screen, words: list[str], problems: list[str]) -> None:
    assert refused(capsys, *words) == problems


def test_setup_that_is_no_shell(here: Path, capsys: Screen) -> None:
    """It would make the whole script one that bash cannot read."""
    for line in ('source act"', "if true; then", "cat <<END"):
        (problem,) = refused(capsys, "slurm", "train.yaml", *CPUS, "--setup", line)
        assert problem.startswith("--setup: line ")
    launched(capsys, "slurm", "train.yaml", *CPUS, "--setup", "if true; then", "--setup", "true; fi")


def test_what_was_changed_by_hand_stays(here: Path, capsys: Screen) -> None:
    words = ["launch", "slurm", "train.yaml", *CPUS]
    script = Path("train.sbatch")
    assert main(words) == 0
    written = script.read_text()
    assert main(words) == 0  # the same again
    script.write_text(written + "# by hand\n")
    capsys.readouterr()
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: train.sbatch exists and differs; remove it, name another with --output, or replace it (--overwrite)\n"
    )
    assert script.read_text() == written + "# by hand\n"
    assert main([*words, "--overwrite"]) == 0
    assert script.read_text() == written
    script.write_text("echo mine\n")
    assert main([*words, "--overwrite"]) == 2
    assert script.read_text() == "echo mine\n"


def test_numbers_of_nodes_in_between(here: Path, capsys: Screen) -> None:
    assert main(["launch", "slurm", "train.yaml", "--nodes", "2:8", *CPUS]) == 0
    captured = capsys.readouterr()
    assert captured.out == "wrote train.sbatch\n"
    assert captured.err.splitlines() == [
        "note: 3, 5, 6, 7 of 2:8 nodes cannot share the work; then some stand by"
    ]


def test_a_limit_in_seconds() -> None:
    times = {"90": 5400, "90:30": 5430, "1:30:00": 5400, "1-0": 86400, "1-2:30": 95400, "2-0:0:1": 172801}
    assert {time: seconds(time) for time in times} == times


def test_submit(here: Path, capsys: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["launch", "slurm", "train.yaml", *CPUS, "--log", "logs/a/%j.out", "--submit"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: train.sbatch is written, but there is no sbatch on this machine; where there is one: sbatch train.sbatch\n"
    )
    assert Path("logs/a").is_dir()
    stand_ins = StandIns(here)
    monkeypatch.setenv("PATH", f"{stand_ins.folder}:/usr/bin:/bin")
    stand_ins.program("sbatch", "echo Submitted batch job 12\n")
    assert main(words) == 0  # what was written before is written anew
    assert capsys.readouterr().out == "wrote train.sbatch\nSubmitted batch job 12\n"
    assert stand_ins.words("sbatch") == [["train.sbatch"]]
    stand_ins.program("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: sbatch train.sbatch: sbatch: error: invalid partition specified: gpu\n"
    )
