"""Folders of `torch.distributed.checkpoint`, read by this process alone, and only as far as they are wanted.

Their ``.metadata`` is a pickle and so are their entries that are no tensors. The one is read with a closed list of
classes, the others are not read at all: what we write besides tensors lies in a file of its own.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sosa_stream.errors import SosaError

OF_METADATA: tuple[str, ...] = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "StorageMeta",
)
OF_METADATA += ("ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING")
KNOWN = frozenset(
    {("torch.distributed.checkpoint.metadata", name) for name in OF_METADATA}
    | {("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
    | {("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")}
    | {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")}
    | {("torch", str(kind).removeprefix("torch.")) for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
)
"""What may stand in ``.metadata``; none of it does anything when it is made."""


class CheckpointError(SosaError):
    """A checkpoint cannot be read, or does not fit; the model is as it was."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f".metadata names {module}.{name}, which has no place in it")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):  # type: ignore[name-defined,misc]
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._folder / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        if metadata.storage_meta is None:
            raise pickle.UnpicklingError(".metadata does not say where the tensors lie")
        metadata.storage_meta.load_id = self.load_id
        outside = [info.relative_path for info in (metadata.storage_data or {}).values() if "/" in info.relative_path]
        if outside:
            raise pickle.UnpicklingError(f".metadata points out of its folder, to {outside[0]}")
        return metadata


class DistributedFolder:
    """The tensors of one folder, by name.

    Raises:
        CheckpointError: it is no whole distributed checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
            entries = self._reader.read_metadata().state_dict_metadata
            self.outline: Mapping[str, torch.Tensor] = {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in entries.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            """Shapes and types, on the meta device."""
        except Exception as error:
            raise _not_whole(path, error) from None

    def read(self, rooms: Mapping[str, torch.Tensor]) -> None:
        """Fill ``rooms`` in place: whole tensors, or of a DTensor the part that is this process's.

        Raises:
            CheckpointError: a part is missing or damaged. Some of ``rooms`` may be filled.
        """
        if not rooms:
            return
        try:
            with warnings.catch_warnings(action="ignore"):  # that it reads alone is what is wanted
                dcp.load(dict(rooms), storage_reader=self._reader, no_dist=True)  # type: ignore[attr-defined]
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            raise _not_whole(self.path, error) from None


def laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every rank holds, spread as ``like`` is: each rank cuts its part out."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    its: Any = like
    return distribute_tensor(value.to(its.device), its.device_mesh, its.placements, src_data_rank=None)


def _not_whole(path: Path, error: BaseException) -> CheckpointError:
    failures = getattr(error, "failures", {})
    cause, _ = next(iter(failures.values()), (error, None))
    reason = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
    return CheckpointError(f"{path} is no whole distributed checkpoint: {reason[0][:200]}")
