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
