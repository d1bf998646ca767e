"""The door of the program. It imports next to nothing, so that Ctrl-C is answered from the first moment on."""

import os
import signal
from types import FrameType


def _leave(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt as Python does, but leave at once in the midst of an import.

    Libraries answer an interrupt while they are loaded with errors of their own, and nothing has begun that would have to
    be tidied up.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(128 + signum)
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> int:
    # Where the parent ignores the signal (nohup), so do we.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from modelyard.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
