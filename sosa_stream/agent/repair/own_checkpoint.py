"""One of our own checkpoints: which part of it belongs to whom, found by the names of the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.checkpoints import told_of
from sosa_stream.agent.repair.reading import CheckpointError, DistributedFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCheckpoint:
    """What `contents.contents_of` wrote."""

    path: Path
    about: Mapping[str, Any]
    rest: Mapping[str, Any]
    folder: DistributedFolder
    models: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Shapes and types by model and name."""
    model: int = 0
    """Which of them is meant."""

    @classmethod
    def at(cls, path: Path, folder: DistributedFolder) -> OwnCheckpoint | None:
        """None where the folder is not one of ours.

        Raises:
            CheckpointError: it is, and a part of it cannot be read.
        """
        about = told_of(path)
        if about is None:
            return None
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        file = path / f"rank{rank}.pt"
        try:
            rest = torch.load(file if file.is_file() else path / "rank0.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from None
        models: dict[int, dict[str, torch.Tensor]] = {}
        for name, outline in folder.outline.items():
            what, _, its = name.partition(".")
            if what == "models":
                i, _, its = its.partition(".")
                models.setdefault(int(i), {})[its] = outline
        return cls(path=path, about=about, rest=rest, folder=folder, models=models)

    def of_model(self, model: int) -> OwnCheckpoint:
        return replace(self, model=model)

    @property
    def registered(self) -> Mapping[str, Any]:
        return self.rest["registered"]  # type: ignore[no-any-return]

    @property
    def notes(self) -> list[str]:
        """What a person should know who goes on from here."""
        notes = []
        if left_out := self.about.get("left_out"):
            notes.append(f"was not written, and begins anew: {', '.join(left_out)}")
        try:
            fixes = json.loads((self.path / "standing_fixes.json").read_text("utf-8")).get("fixes", [])
        except (OSError, ValueError, AttributeError):
            fixes = []
        actions = [action["action"] for fix in fixes for action in fix["actions"]]
        if actions:
            notes.append(f"fixes were in force, see standing_fixes.json: {', '.join(actions)}")
        return notes

    def refuse_if_not_finite(self) -> None:
        if not self.about.get("finite", False):
            bad = ", ".join(self.about.get("not_finite", [])[:8])
            raise CheckpointError(f"{self.path} was written with NaN or Inf, in {bad}: not loaded")

    def parts(
        self, model: nn.Module, optimizer: Optimizer | None, scheduler: Any, names: Mapping[str, str]
    ) -> dict[str, Any]:
        """The states of optimizer, scheduler and scaler, as their ``load_state_dict`` takes them; None where unknown.

        Args:
            names: by a parameter's name in ``model`` its name in the checkpoint.

        Raises:
            CheckpointError: the folder is damaged.
        """
        theirs: int | None = None
        state = None
        if optimizer is not None:
            theirs, state = self._optimizer(model, optimizer, names)
        kind = type(scheduler).__name__
        alike = [s for s in self.rest["schedulers"] if s["type"] == kind]
        alike = [s for s in alike if s["optimizer"] == theirs] or alike
        return {
            "optimizer": state,
            "scheduler": alike[0]["state"] if alike else None,
            "scaler": next(iter(self.rest["scalers"]), None),
        }

    def restore_random(self) -> list[str]:
        try:
            random_numbers.restore(self.rest["random"])
        except Exception as error:
            return [f"the random number generators could not be put back: {error}"]
        return []

    def _optimizer(
        self, model: nn.Module, optimizer: Optimizer, names: Mapping[str, str]
    ) -> tuple[int | None, dict[str, Any] | None]:
        known = {
            id(p): f"{self.model}.{names[n]}" for n, p in model.named_parameters(remove_duplicate=False) if n in names
        }
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        wanted = {known[id(p)] for p in parameters if id(p) in known}
        saved = self.rest["optimizers"]
        covered = [len(wanted & {name for group in its["groups"] for name in group["params"]}) for its in saved]
        if not any(covered):
            return None, None
        i = covered.index(max(covered))
        state: dict[int, dict[str, Any]] = {}
        rooms: dict[str, torch.Tensor] = {}
        for position, parameter in enumerate(parameters):
            name = known.get(id(parameter), f"loose.{i}.{position}")
            if name not in saved[i]["state"]:
                continue
            its = saved[i]["state"][name]
            state[position] = dict(its["others"])
            for key in its["tensors"]:
                stored = f"optimizers.{i}.{name}/{key}"
                rooms[stored] = state[position][key] = _room(self.folder.outline[stored], parameter)
        self.folder.read(rooms)
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        groups = (
            saved[i]["groups"] if [len(g["params"]) for g in saved[i]["groups"]] == sizes else optimizer.param_groups
        )
        positions = iter(range(len(parameters)))
        return i, {
            "state": state,
            "param_groups": [
                {**group, "params": [next(positions) for _ in range(size)]}
                for group, size in zip(groups, sizes, strict=True)
            ],
        }


def _room(outline: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """To read into: spread over the ranks as the parameter is, where it has its shape."""
    if outline.shape == parameter.shape and outline.dim():
        return torch.empty_like(parameter.detach(), dtype=outline.dtype)
    return torch.empty(outline.shape, dtype=outline.dtype)
