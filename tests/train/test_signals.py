import signal
import subprocess
import sys

import pytest


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


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_saves_however_often_it_comes(ignored: bool) -> None:
    """A closing terminal sends it twice, by the shell and by the kernel; standard error is gone with it."""
    program = (
        "import os, signal\nfrom modelyard.train.signals import StopSignal\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "os.close(2)\n"
        "with StopSignal() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print(stop.signum, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.signum, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if ignored:  # under nohup
        assert (done.returncode, done.stdout) == (0, "None\n15\n")
    else:
        assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "1\n")
