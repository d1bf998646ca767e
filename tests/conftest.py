"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Two cores at most are there; tests run in several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job ignores it, and so would every program that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # likewise under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and guides' configs beside the checkout; skips where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data and the guides' configs), which is not here")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: Path) -> Path:
    """`../shared/data`: corpora, tokenizers, small real weights."""
    return shared / "data"


@pytest.fixture(scope="session")
def chat_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Chat format → folder of a byte-level tokenizer of 290 tokens that has its special tokens; no chat template."""
    from modelyard.data.tokenizer_training import BOS, EOS, chat_tokens, train_tokenizer

    folders = {}
    for name in ("llama3", "qwen2.5", "chatml", "vicuna"):
        folders[name] = tmp_path_factory.mktemp(f"tokenizer-{name}")
        texts = ["user assistant system ipython the ship sails over a wide sea 42 times\n\n"] * 3
        train_tokenizer(texts, folders[name], vocab_size=290, special_tokens=(BOS, EOS, *chat_tokens(name)))
    return folders
