"""Checkpoints read back, whoever wrote them: ours, a script's own ``torch.save``, Lightning's, Hugging Face's.

Nothing is unpickled that could run code, and a model is changed only once everything has been read and compared.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.errors import SosaError

MODEL_KEYS = ("model_state_dict", "state_dict", "model", "module", "net", "network", "weights")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "optimizer_states", "optim")
CONFIG_KEYS = ("model_config", "config", "hyper_parameters", "hparams", "args")
STEP_KEYS = ("step", "global_step", "iteration", "iter", "epoch")
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.", "network.", "net.")
"""What wrappers put before a parameter's name."""
SHARD_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "best.pt", "pytorch_model.pt", "model.pt")
MOST_NAMES_TOLD = 8


class CheckpointError(SosaError):
    """A checkpoint cannot be read, or does not fit; the model is as it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file or folder holds. ``layout`` says what it was taken for."""

    path: Path
    layout: str
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was loaded, and what was not.

    ``missing`` are the model's entries that the file lacks, ``unexpected`` the file's that the model lacks,
    ``mismatched`` those of another shape (``name: file (2, 3), model (3, 3)``); all three were left alone.
    """

    path: Path
    layout: str
    num_loaded: int
    step: int | None = None
    config: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.layout}): {self.num_loaded} tensors loaded"]
        for what in ("missing", "unexpected", "mismatched"):
            names = getattr(self, what)
            if names:
                more = f", and {len(names) - MOST_NAMES_TOLD} more" if len(names) > MOST_NAMES_TOLD else ""
                lines.append(f"{what}: {', '.join(names[:MOST_NAMES_TOLD])}{more}")
        return "\n".join([*lines, *self.notes])


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    strict: bool = False,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Copy a checkpoint's weights into ``model``, and into ``optimizer`` where the file has its state and it fits.

    Args:
        path: a file or a folder.
        model: wrapped or not; the wrappers' prefixes are found by themselves.
        optimizer: as it was when the checkpoint was written.
        strict: anything missing, unexpected or of another shape is an error.
        allow_nonfinite: take weights that hold NaN or Inf.

    Raises:
        CheckpointError: it cannot be read, nothing in it fits, or it is not finite. Nothing has been changed.
    """
    found = read_checkpoint(path)
    target = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    given = _renamed(found.model, target)
    fitting = {name: value for name, value in given.items() if name in target and value.shape == target[name].shape}
    report = LoadReport(
        path=found.path,
        layout=found.layout,
        num_loaded=len(fitting),
        step=found.step,
        config=found.config,
        missing=tuple(sorted(set(target) - set(given))),
        unexpected=tuple(sorted(set(given) - set(target))),
        mismatched=tuple(
            f"{name}: file {tuple(given[name].shape)}, model {tuple(target[name].shape)}"
            for name in sorted(set(given) & set(target) - set(fitting))
        ),
    )
    if not fitting:
        raise CheckpointError(f"nothing in {found.path} fits this model\n{report}")
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(f"the checkpoint is not this model's, and strict=True\n{report}")
    bad = [name for name, value in fitting.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad and not allow_nonfinite:
        raise CheckpointError(f"{found.path} holds NaN or Inf, in {', '.join(bad[:MOST_NAMES_TOLD])}: not loaded")
    notes = _load_optimizer(found.optimizer, optimizer)
    with torch.no_grad():
        for name, value in fitting.items():
            target[name].copy_(value)
    return LoadReport(**{**{f: getattr(report, f) for f in LoadReport.__slots__}, "notes": notes})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What lies at ``path``, on the CPU.

    Raises:
        CheckpointError: there is nothing, it is no checkpoint, or reading it would run code from it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return Checkpoint(path=path, layout="safetensors", model=_read_safetensors(path))
    return _sorted_out(path, _read_torch(path))


def _read_folder(path: Path) -> Checkpoint:
    if (path / ".metadata").is_file():
        return _read_distributed(path)
    config = path / "config.json"
    settings = json.loads(config.read_text("utf-8")) if config.is_file() else None
    for name in SHARD_INDEXES:
        if (path / name).is_file():
            files = sorted(set(json.loads((path / name).read_text("utf-8"))["weight_map"].values()))
            model: dict[str, torch.Tensor] = {}
            for file in files:
                model.update(read_checkpoint(path / file).model)
            return Checkpoint(path=path, layout=f"{len(files)} shards", model=model, config=settings)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            found = read_checkpoint(path / name)
            return Checkpoint(
                path=found.path,
                layout=found.layout,
                model=found.model,
                optimizer=found.optimizer,
                config=found.config or settings,
                step=found.step,
            )
    raise CheckpointError(
        f"no checkpoint in {path}: looked for {', '.join(('.metadata', *SHARD_INDEXES, *SINGLE_FILES))}"
    )


def _read_distributed(path: Path) -> Checkpoint:
    """A folder of ``torch.distributed.checkpoint``, whole, in this process alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        reader = dcp.FileSystemReader(path)  # type: ignore[attr-defined]
        entries = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings(action="ignore"):  # that it reads alone is what is wanted
            dcp.load(tensors, storage_reader=reader, no_dist=True)  # type: ignore[attr-defined]
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        reason = str(error).strip().splitlines()[-1:] or [""]
        raise CheckpointError(f"{path} is no whole distributed checkpoint: {reason[0][:200]}") from None
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    metadata = path / "metadata.json"
    about = json.loads(metadata.read_text("utf-8")) if metadata.is_file() else {}
    return Checkpoint(
        path=path, layout="distributed", model=model or tensors, step=about.get("step"), config=about.get("config")
    )


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        if "weights_only" in text or "WeightsUnpickler" in text:
            raise CheckpointError(
                f"{path} holds pickled Python objects, which could run code when loaded. If you trust it: "
                f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], 'weights.pt'), then load that"
            ) from None
        raise CheckpointError(f"{path} is no checkpoint of torch's: {type(error).__name__}: {text[:200]}") from None


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None
    return tensors


def _sorted_out(path: Path, saved: Any) -> Checkpoint:
    """Which part of a saved object is what."""
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{path} holds a {type(saved).__name__}, not a dictionary of tensors")
    for key in MODEL_KEYS:
        inner = saved.get(key)
        if isinstance(inner, Mapping) and _tensors(inner):
            layout, model = f"dictionary, weights under {key!r}", _tensors(inner)
            break
    else:
        layout, model = "bare state dictionary", _tensors(saved)
    if not model:
        raise CheckpointError(f"{path} holds no tensors: its keys are {', '.join(map(str, list(saved)[:8])) or 'none'}")
    optimizer = _first(saved, OPTIMIZER_KEYS, Mapping)
    several = saved.get("optimizer_states")
    if optimizer is None and isinstance(several, list) and several:  # Lightning's
        optimizer = several[0]
    step = next((int(saved[key]) for key in STEP_KEYS if isinstance(saved.get(key), int)), None)
    return Checkpoint(
        path=path,
        layout=layout,
        model=model,
        optimizer=optimizer,
        config=_first(saved, CONFIG_KEYS, Mapping),
        step=step,
    )


def _first(saved: Mapping[str, Any], keys: tuple[str, ...], kind: type) -> Any:
    return next((saved[key] for key in keys if isinstance(saved.get(key), kind)), None)


def _tensors(saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {str(name): value for name, value in saved.items() if isinstance(value, torch.Tensor)}


def _renamed(given: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries under those names, of all that differ by a wrapper's prefix, by which most of them fit."""
    candidates = [dict(given)]
    for prefix in PREFIXES:
        for names in list(candidates):
            if any(name.startswith(prefix) for name in names):
                candidates.append({name.removeprefix(prefix): value for name, value in names.items()})
    wrapped = {name.split(".")[0] + "." for name in target} & set(PREFIXES)
    candidates += [
        {prefix + name: value for name, value in names.items()} for names in list(candidates) for prefix in wrapped
    ]
    return max(candidates, key=lambda names: len(set(names) & set(target)))


def _load_optimizer(saved: Mapping[str, Any] | None, optimizer: Optimizer | None) -> tuple[str, ...]:
    if optimizer is None:
        return ()
    if saved is None:
        return ("the checkpoint has no optimizer state: it begins anew",)
    before = optimizer.state_dict()
    try:
        optimizer.load_state_dict(dict(saved))
    except Exception as error:
        optimizer.load_state_dict(before)
        return (f"the optimizer state does not fit and was left out: {error}",)
    return ()
