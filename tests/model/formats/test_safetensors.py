from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.errors import UserError
from modelyard.model.formats.safetensors import FileWriter, read_entries

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scalar": torch.tensor(7.0, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with FileWriter(path, [(name, t.dtype, tuple(t.shape)) for name, t in TENSORS.items()]) as writer:
        for tensor in TENSORS.values():
            writer.write(tensor)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_transposed_tensor_is_written_as_its_values(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with FileWriter(path, [("t", torch.float32, (3, 2))]) as writer:
        writer.write(TENSORS["a"].t())
    assert torch.equal(load_file(path)["t"], TENSORS["a"].t())


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    entries = read_entries(path)
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()
    }
    assert all(torch.equal(entries[name].load(), t) for name, t in TENSORS.items())


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000000\n")
    with pytest.raises(UserError, match=r"x\.safetensors is a git-lfs pointer.*git lfs pull"):
        read_entries(path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_entries(path)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="header that cannot be read"):
        read_entries(path)
