"""The parts of torch's distributed checkpoint that have no public door; checked against torch 2.11 and 2.13."""

from __future__ import annotations

import pickle
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
