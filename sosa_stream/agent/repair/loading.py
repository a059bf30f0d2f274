"""Checkpoints read back, whoever wrote them: ours, a script's own ``torch.save``, Lightning's, Hugging Face's.

Nothing is unpickled that could run code, and a model is changed only once everything has been read and compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.repair.contents import is_finite
from sosa_stream.agent.repair.own_checkpoint import OwnCheckpoint
from sosa_stream.agent.repair.reading import CheckpointError, DistributedFolder, laid_out
from sosa_stream.errors import describe

MODEL_KEYS = ("model_state_dict", "state_dict", "model", "module", "net", "network", "weights")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "optimizer_states", "optim")
SCHEDULER_KEYS = ("scheduler_state_dict", "scheduler", "lr_scheduler_state_dict", "lr_scheduler", "lr_schedulers")
SCALER_KEYS = ("scaler_state_dict", "scaler", "grad_scaler")
CONFIG_KEYS = ("model_config", "config", "hyper_parameters", "hparams", "args")
STEP_KEYS = ("step", "global_step", "iteration", "iter", "epoch")
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "model.", "network.", "net.")
"""What wrappers put before a parameter's name."""
SHARD_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "best.pt", "pytorch_model.pt", "model.pt")
MOST_NAMES_TOLD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a file or folder holds. ``layout`` says what it was taken for."""

    path: Path
    layout: str
    model: Mapping[str, torch.Tensor]
    """On the CPU; only shapes and types, on the meta device, where `folder` has the values."""
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    scaler: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    step: int | None = None
    folder: DistributedFolder | None = None
    prefix: str = ""
    """What stands in the folder before the names of `model`."""
    own: OwnCheckpoint | None = None


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
    scheduler: Any = None,
    scaler: Any = None,
    *,
    registered: Mapping[str, Any] | None = None,
    random: bool = False,
    strict: bool = False,
    allow_nonfinite: bool = False,
) -> LoadReport:
    """Copy a checkpoint's weights into ``model``, and the rest into what else is given, where it is there and fits.

    What does not fit is left as it was and told in the report's notes. Sharded models take their own parts; there,
    every rank calls this.

    Args:
        path: a file or a folder.
        model: wrapped or not; the wrappers' prefixes are found by themselves.
        optimizer: as it was when the checkpoint was written.
        scheduler: of the same class as then.
        scaler: a ``GradScaler``.
        registered: what was handed to `register_state`, by its name.
        random: put the random number generators back too.
        strict: anything of the model's missing, unexpected or of another shape is an error.
        allow_nonfinite: take weights that hold NaN or Inf.

    Raises:
        CheckpointError: it cannot be read, nothing in it fits, or it is not finite. Nothing has been changed.
    """
    target = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    found = _open(Path(path), target)
    if found.own is not None and not allow_nonfinite:
        found.own.refuse_if_not_finite()
    names = _renamed(found.model, target)
    fitting = [name for name in names if name in target and found.model[names[name]].shape == target[name].shape]
    report = LoadReport(
        path=found.path,
        layout=found.layout,
        num_loaded=len(fitting),
        step=found.step,
        config=found.config,
        missing=tuple(sorted(set(target) - set(names))),
        unexpected=tuple(sorted(set(names) - set(target))),
        mismatched=tuple(
            f"{name}: file {tuple(found.model[names[name]].shape)}, model {tuple(target[name].shape)}"
            for name in sorted(set(names) & set(target) - set(fitting))
        ),
    )
    if not fitting:
        raise CheckpointError(f"nothing in {found.path} fits this model\n{report}")
    if strict and (report.missing or report.unexpected or report.mismatched):
        raise CheckpointError(f"the checkpoint is not this model's, and strict=True\n{report}")
    values = _values(found, {name: names[name] for name in fitting}, target)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    bad = [name for name, value in values.items() if not is_finite(value, name in buffers)]
    if bad and not allow_nonfinite:
        raise CheckpointError(f"{found.path} holds NaN or Inf, in {', '.join(bad[:MOST_NAMES_TOLD])}: not loaded")
    notes = list(found.own.notes) if found.own is not None else []
    if found.own is not None:
        found = replace(found, **found.own.parts(model, optimizer, scheduler, names))
    for what, state, thing in (
        ("optimizer", found.optimizer, optimizer),
        ("scheduler", found.scheduler, scheduler),
        ("scaler", found.scaler, scaler),
        *(
            (name, found.own.registered.get(name) if found.own else None, each)
            for name, each in (registered or {}).items()
        ),
    ):
        notes += _load_part(what, state, thing)
    if found.own is not None and random:
        notes += found.own.restore_random()
    with torch.no_grad():
        for name, value in values.items():
            target[name].copy_(value)
    return replace(report, notes=tuple(notes))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What lies at ``path``, whole and on the CPU.

    Raises:
        CheckpointError: there is nothing, it is no checkpoint, or reading it would run code from it.
    """
    found = _open(Path(path))
    if found.folder is None:
        return found
    model = {name: torch.empty_like(outline, device="cpu") for name, outline in found.model.items()}
    found.folder.read({found.prefix + name: value for name, value in model.items()})
    return replace(found, model=model)


def _values(found: Checkpoint, names: Mapping[str, str], target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's values, laid out as the ``target``'s are, by the target's names."""
    if found.folder is not None:
        rooms = {name: torch.empty_like(target[name]) for name in names}
        found.folder.read({found.prefix + names[name]: room for name, room in rooms.items()})
        return rooms
    return {name: laid_out(found.model[given], target[name]) for name, given in names.items()}


def _open(path: Path, target: Mapping[str, torch.Tensor] | None = None) -> Checkpoint:
    """What lies at ``path``; of several models in it the one that fits ``target`` best."""
    if path.is_dir():
        return _open_folder(path, target)
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return Checkpoint(path=path, layout="safetensors", model=_read_safetensors(path))
    return _sorted_out(path, _read_torch(path))


def _open_folder(path: Path, target: Mapping[str, torch.Tensor] | None) -> Checkpoint:
    if (path / ".metadata").is_file():
        return _open_distributed(path, target)
    config = path / "config.json"
    settings = json.loads(config.read_text("utf-8")) if config.is_file() else None
    for name in SHARD_INDEXES:
        if (path / name).is_file():
            files = sorted(set(json.loads((path / name).read_text("utf-8"))["weight_map"].values()))
            model: dict[str, torch.Tensor] = {}
            for file in files:
                model.update(_open(path / file).model)
            return Checkpoint(path=path, layout=f"{len(files)} shards", model=model, config=settings)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            found = _open(path / name)
            return replace(found, config=found.config or settings)
    raise CheckpointError(
        f"no checkpoint in {path}: looked for {', '.join(('.metadata', *SHARD_INDEXES, *SINGLE_FILES))}"
    )


def _open_distributed(path: Path, target: Mapping[str, torch.Tensor] | None) -> Checkpoint:
    """A folder of ``torch.distributed.checkpoint``: ours, or somebody else's with the weights under ``model.``."""
    folder = DistributedFolder(path)
    own = OwnCheckpoint.at(path, folder)
    if own is not None:
        fits = {i: _num_fitting(model, target or model) for i, model in own.models.items()}
        best = max(fits, key=lambda i: fits[i], default=0)
        return Checkpoint(
            path=path,
            layout="sosa",
            model=own.models.get(best, {}),
            step=own.about.get("step"),
            folder=folder,
            prefix=f"models.{best}.",
            own=own.of_model(best),
        )
    prefix = "model." if any(name.startswith("model.") for name in folder.outline) else ""
    model = {name.removeprefix(prefix): t for name, t in folder.outline.items() if name.startswith(prefix)}
    return Checkpoint(path=path, layout="distributed", model=model, folder=folder, prefix=prefix)


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
    step = next((int(saved[key]) for key in STEP_KEYS if isinstance(saved.get(key), int)), None)
    return Checkpoint(
        path=path,
        layout=layout,
        model=model,
        optimizer=_first(saved, OPTIMIZER_KEYS),
        scheduler=_first(saved, SCHEDULER_KEYS),
        scaler=_first(saved, SCALER_KEYS),
        config=_first(saved, CONFIG_KEYS),
        step=step,
    )


def _first(saved: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The first mapping under one of ``keys``, or first in a list there, as Lightning keeps its optimizers."""
    for key in keys:
        value = saved.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, Mapping):
            return value
    return None


def _tensors(saved: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {str(name): value for name, value in saved.items() if isinstance(value, torch.Tensor)}


def _renamed(given: Iterable[str], target: Collection[str]) -> dict[str, str]:
    """By their name in the target the given names, of all readings that differ by a wrapper's prefix the one by which
    most of them fit."""
    candidates = [{name: name for name in given}]
    for prefix in PREFIXES:
        for names in list(candidates):
            if any(name.startswith(prefix) for name in names):
                candidates.append({name.removeprefix(prefix): its for name, its in names.items()})
    wrapped = {name.split(".")[0] + "." for name in target} & set(PREFIXES)
    candidates += [
        {prefix + name: its for name, its in names.items()} for names in list(candidates) for prefix in wrapped
    ]
    return max(candidates, key=lambda names: len(set(names) & set(target)))


def _num_fitting(given: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> int:
    names = _renamed(given, target)
    return sum(name in target and given[its].shape == target[name].shape for name, its in names.items())


def _load_part(what: str, state: Mapping[str, Any] | None, thing: Any) -> list[str]:
    if thing is None:
        return []
    if state is None:
        return [f"the checkpoint has no {what} state: it begins anew"]
    before = thing.state_dict() if what == "optimizer" else copy.deepcopy(thing.state_dict())
    try:
        thing.load_state_dict(dict(state))
    except Exception as error:
        thing.load_state_dict(before)
        return [f"the {what} state does not fit and was left out: {describe(error)}"]
    return []
