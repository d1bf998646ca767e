"""What `train/` uses of torch that has no public door: parts of the distributed checkpoint, the GPU's memory history.

Checked against torch 2.11 and 2.13.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

_ALLOWED = {
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
} | {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes that a checkpoint's metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class SafeFileSystemReader(FileSystemReader):
    """`FileSystemReader` that runs no code from the folder that it reads, and reads the metadata once.

    `FileSystemReader.read_metadata` unpickles anything (https://github.com/pytorch/pytorch/issues/126925 asks for
    another format); tensors are read with `weights_only=True` already.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        with (path / ".metadata").open("rb") as file:
            self._metadata: Metadata = _MetadataUnpickler(file).load()
        for stored in (self._metadata.storage_data or {}).values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"it names a file outside its folder: {stored.relative_path}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is not None:
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


@contextmanager
def cuda_memory_history(*, enabled: bool) -> Iterator[Callable[[Path], None]]:
    """Record every allocation on the GPU while entered; gives a function that writes what there is so far as a snapshot.

    https://docs.pytorch.org/docs/stable/torch_cuda_memory.html describes both calls, which have kept their underscores.
    """
    if not enabled:
        yield lambda path: None
        return
    memory = torch.cuda.memory
    if not hasattr(memory, "_record_memory_history") or not hasattr(memory, "_dump_snapshot"):
        raise RuntimeError(
            f"torch {torch.__version__} records no memory history; set training.profiling.memory: no"
        )
    memory._record_memory_history(max_entries=1_000_000)
    try:
        yield lambda path: memory._dump_snapshot(str(path))
    finally:
        memory._record_memory_history(enabled=None)
