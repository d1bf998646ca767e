import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modelyard.errors import UserError
from modelyard.files import Retention, complete_or_absent, damage, numbered_folders, only_one, prune


def make(folder: Path) -> None:
    with complete_or_absent(folder, manifest=True) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a.bin").write_bytes(b"abc")
        (temporary / "b.txt").write_text("hello")


def test_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    make(tmp_path / "7")
    manifest = json.loads((tmp_path / "7" / "manifest.json").read_text())
    assert manifest["inner/a.bin"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert set(manifest) == {"inner/a.bin", "b.txt"}
    assert damage(tmp_path / "7", checksums=True) == []
    assert [p.name for p in tmp_path.iterdir()] == ["7"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def fill_the_disk() -> None:
        with complete_or_absent(tmp_path / "7") as temporary:
            (temporary / "a").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="no space left while writing"):
        fill_the_disk()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (
            errno.EFBIG,
            "File too large (a limit on file size: ulimit -f) while writing {}; nothing of it was kept",
        ),
        (errno.EDQUOT, "Disk quota exceeded while writing {}; nothing of it was kept"),
        (errno.EIO, "{} cannot be written: Input/output error"),
    ],
)
def test_what_there_is_no_room_in_is_named(tmp_path: Path, code: int, line: str) -> None:
    with pytest.raises(UserError) as failure, complete_or_absent(tmp_path / "7"):
        raise OSError(code, os.strerror(code))
    assert str(failure.value) == line.format(tmp_path / "7")
    assert list(tmp_path.iterdir()) == []


def test_kill_while_writing_leaves_no_complete_folder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from modelyard.files import complete_or_absent\n"
        "with complete_or_absent(Path(sys.argv[1])) as t:\n"
        "    (t / 'a').write_text('x'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "7")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["7.tmp"]
    assert numbered_folders(tmp_path) == []
    make(tmp_path / "7")
    assert [p.name for p in tmp_path.iterdir()] == ["7"]


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda f: (f / "b.txt").write_text("hell"), "4 bytes where its manifest says 5"),
        (lambda f: (f / "b.txt").write_text("jello"), "differs from its checksum"),
        (lambda f: (f / "b.txt").unlink(), "cannot be read (No such file"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, harm, expected: str) -> None:
    make(tmp_path / "7")
    harm(tmp_path / "7")
    problems = damage(tmp_path / "7", checksums=True)
    assert len(problems) == 1
    assert expected in problems[0]


def test_prune_keeps_the_newest_and_the_permanent(tmp_path: Path) -> None:
    for name in (10, 20, 30, 40, 50):
        make(tmp_path / str(name))

    def kinds(folder: Path) -> Retention:
        iteration = int(folder.name)
        return "ephemeral" if iteration % 10 else "permanent" if iteration % 20 == 0 else "regular"

    assert prune(tmp_path, keep=None, retention=kinds) == []
    gone = prune(tmp_path, keep=2, retention=kinds)
    assert [p.name for p in gone] == ["10"]
    assert [p.name for p in numbered_folders(tmp_path)] == ["20", "30", "40", "50"]
    make(tmp_path / "53")  # not counted, stays while it is the newest
    assert prune(tmp_path, keep=2, retention=kinds) == []
    make(tmp_path / "57")
    assert [p.name for p in prune(tmp_path, keep=None, retention=kinds)] == ["53"]
    make(tmp_path / "60")
    assert [p.name for p in prune(tmp_path, keep=2, retention=kinds)] == ["57"]
    prune(tmp_path, keep=1, retention=lambda _: "regular")
    assert [p.name for p in numbered_folders(tmp_path)] == ["60"]
    assert prune(tmp_path / "nothing", keep=1, retention=kinds) == []


def test_only_one_process_holds_the_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from modelyard.files import only_one\n"
        "with only_one(Path(sys.argv[1]), 'busy'):\n    print('held', flush=True); time.sleep(60)\n"
    )
    lock = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", program, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="busy"), only_one(lock, "busy"):
        pass
    with pytest.raises(UserError, match="busy"), only_one(lock, "busy", patience=0.2):
        pass
    threading.Timer(0.3, process.kill).start()
    with only_one(lock, "busy", patience=60):
        assert process.wait() == -signal.SIGKILL
    with only_one(lock, "busy"):
        pass
