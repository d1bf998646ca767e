import signal
import subprocess
import sys

import pytest

from modelyard.parallel.world import World
from modelyard.train.signals import StopSignal


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_remembered_and_the_second_ends_the_process(signum: signal.Signals) -> None:
    program = (
        "import os, time\nfrom modelyard.train.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        f"    os.kill(os.getpid(), {signum.value})\n"
        "    print('first', bool(stop), stop.signum, flush=True)\n"
        f"    os.kill(os.getpid(), {signum.value})\n"
        "    time.sleep(1)\n"
        "print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == f"first True {signum.value}\n"
    assert f"{signum.name}: saving after this iteration" in done.stderr
    assert done.returncode == 128 + signum


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_and_a_scheduler_save_however_often_they_come(name: str, ignored: bool) -> None:
    """A closing terminal sends it twice, by the shell and by the kernel, and standard error is gone with it; a scheduler
    sends SIGUSR1 early and SIGTERM later, which must not cut off the save."""
    program = (
        "import os, signal\nfrom modelyard.train.signals import StopSignal\n"
        f"signal.signal(signal.{name}, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "os.close(2)\n"
        "with StopSignal() as stop:\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    number = int(signal.Signals[name])
    expected = "None\n15\n" if ignored else f"{number}\n{number}\n"
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, expected)


def test_a_launcher_passes_on_what_the_ranks_got_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's scancel sends SIGTERM to every process of a job, the launching one among them; a person is slower."""
    now = [100.0]
    left: list[int] = []
    monkeypatch.setattr("modelyard.train.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("modelyard.train.signals.os._exit", left.append)
    stop = StopSignal(World(1, 2, object()))
    for later in (0.0, 0.5, 1.4):
        now[0] += later
        stop._handle(signal.SIGTERM, None)
    assert (stop.heard, left) == (signal.SIGTERM, [])
    now[0] += 0.2
    stop._handle(signal.SIGTERM, None)
    assert left == [128 + signal.SIGTERM]
