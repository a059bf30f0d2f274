"""``wrap_training``: a training loop's step, watched and repaired, in a notebook or in any script.

    wrapper = wrap_training(model, optimizer, auto_fix=True)
    for batch in dataloader:
        loss = wrapper.training_step(batch)

Alone in one process it needs no socket and no thread: the Engine runs inside the step. In a process group with several
ranks it publishes to the daemon like any other agent, and fixes are agreed on by all ranks.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent import process
from sosa_stream.agent.arguments import switches_of
from sosa_stream.agent.core import Agent
from sosa_stream.agent.environment import is_disabled, read_settings, run_name
from sosa_stream.agent.monitor import TrainingMonitor
from sosa_stream.agent.repair.actuator import InForce
from sosa_stream.agent.repair.best import BestCheckpoint
from sosa_stream.agent.repair.knobs import Knob
from sosa_stream.agent.repair.learning_rate import effective, rate_of
from sosa_stream.agent.splitting.batches import ForwardFunction, loss_of
from sosa_stream.agent.splitting.micro_batches import MicroBatches
from sosa_stream.agent.transport.courier import policy
from sosa_stream.agent.transport.link import LocalLink
from sosa_stream.config import absolute, load_settings, with_absolute_paths
from sosa_stream.detect.detectors import BY_KIND
from sosa_stream.engine import Engine
from sosa_stream.errors import UsageError
from sosa_stream.settings import Mode, Settings

WRAPPER_ALLOW = ("skip_step", "split_batch", "clip_grad", "scale_lr", "rollback")
"""What ``auto_fix=True`` allows where neither the configuration nor ``SOSA_AUTO_ALLOW`` says otherwise."""

RECENT_LOSSES = 100


class SOSATrainingWrapper:
    """Runs forward, backward and the optimizer step of one batch; watches, and with ``auto_fix`` repairs.

    Args:
        model: the module; in a distributed job already wrapped (DDP).
        optimizer: its optimizer, whose param groups have an ``lr``.
        config: `Settings`, a mapping of dotted settings, what a parser with `add_sosa_arguments` gives, or any object
            or mapping with a section ``sosa`` (``enabled``, ``auto_fix``, ``window``, ``max_fixes``); None takes
            ``SOSA_CONFIG`` and ``SOSA_*``.
        checkpoint_dir: where ``best.pt`` is kept.
        auto_fix: apply fixes; False only watches and suggests.
        max_fixes_per_error: fixes tried for one kind of error before it is left to a person.
        checkpoint_every: least steps between two looks at whether this is the best state so far.

    Raises:
        UsageError: model or optimizer is not one, or the optimizer has no learning rate.
        ConfigError: a setting in ``config`` is unknown or out of bounds. What is wrong with ``SOSA_CONFIG`` or
            ``SOSA_*`` is only told, and nothing is watched.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: Any = None,
        checkpoint_dir: str | os.PathLike[str] = "./checkpoints",
        auto_fix: bool = True,
        max_fixes_per_error: int = 3,
        *,
        checkpoint_every: int = 100,
        say: Callable[[str], None] | None = None,
    ) -> None:
        _check(model, optimizer)
        if checkpoint_every < 1:
            raise UsageError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
        self.model = model
        self.optimizer = optimizer
        self._say = say or (_to_stdout if _is_rank_zero() else _to_nowhere)
        self.enabled, self.settings, complaint = settings_of(config, auto_fix, max_fixes_per_error)
        if complaint:
            self._say(f"sosa: {complaint}")
        self._losses: deque[float] = deque(maxlen=RECENT_LOSSES)
        self._best_loss = math.inf
        self._best = BestCheckpoint(Path(absolute(os.fspath(checkpoint_dir))), model, optimizer, checkpoint_every)
        self._num_steps = 0
        self._anomaly_steps = 0
        self._told_of_disk = False
        self._agent: Agent | None = None
        self._owns_agent = True
        self._distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        run = run_name(self.settings, os.environ, sys.argv[0] if sys.argv else "")
        self.monitor = TrainingMonitor(
            Engine(run, self.settings.detect),
            self._say,
            suggests=self.settings.mode is not Mode.AUTO,
        )
        if self.enabled:
            self._start(run)
        self._batches = MicroBatches(model, optimizer, self._agent)

    # -- the step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, forward_fn: ForwardFunction | None = None) -> torch.Tensor:
        """One step on ``batch``: forward, backward, update. Returns the detached loss, a tensor of shape ().

        Args:
            batch: a mapping goes into the model as keywords, a tuple or list as arguments, anything else as the one
                argument.
            forward_fn: ``forward_fn(model, batch)`` instead of that.

        The loss is what comes back: a tensor, a tuple's first element, ``["loss"]`` or ``.loss``. Where memory runs out
        in the forward pass, the batch is run in parts with the same gradient, if its loss is a mean over samples.

        Raises:
            UsageError: what came back holds no scalar loss tensor.
        """
        if self._agent is not None:
            if self._owns_agent:
                self._agent.see_inputs(self.model, batch)
            self._agent.hand_over(self.model, batch, lambda model: loss_of(model, batch, forward_fn))
        try:
            loss = self._batches.backward(batch, forward_fn)
            self.optimizer.step()
        except UsageError:
            raise
        except Exception as error:
            if self._agent is not None:
                self._agent.taps.losses.take()  # this batch takes no step: its loss is not the next one's
                with contextlib.suppress(Exception):  # the script's own error must reach it, whatever ours is
                    self._agent.report_exception(error)
                    self._agent.flush()
            raise
        self._count(loss)
        return loss

    # -- what it has seen --------------------------------------------------------------------------------------------

    def get_statistics(self) -> dict[str, Any]:
        """What `print_report` prints, as JSON values."""
        recent = [loss for loss in self._losses if math.isfinite(loss)]
        fixes = self._fixes()
        group = self.optimizer.param_groups[0]
        actuators = self._agent.actuators if self._agent is not None else None
        in_force = actuators.in_force if actuators is not None else InForce()
        kinds = {incident.id: incident.kind for incident in self.monitor.incidents.values()}
        return {
            "steps": self._num_steps,
            "best_loss": self._best_loss if math.isfinite(self._best_loss) else None,
            "best_checkpoint": None if self._best.step is None else str(self._best.path),
            "best_checkpoint_step": self._best.step,
            "fixes_per_kind": dict(Counter(kinds.get(fix["incident"], "seen by the daemon") for fix in fixes)),
            "learning_rate": float(effective(self.optimizer, in_force)),
            "learning_rate_of_the_script": float(group["lr"]),
            "clip_bound": actuators.in_force.max_norm if actuators is not None else None,
            "anomaly_steps": self._anomaly_steps,
            "anomaly_rate": self._anomaly_steps / self._num_steps if self._num_steps else 0.0,
            "last_fixes": fixes[-5:],
            "recent_loss": {
                "mean": statistics.fmean(recent) if recent else None,
                "std": statistics.pstdev(recent) if recent else None,
                "min": min(recent) if recent else None,
            },
            "incidents": [incident.as_dict() for incident in self.monitor.incidents.values()],
        }

    def print_report(self) -> None:
        """Where training stands, for a person."""
        seen = self.get_statistics()
        recent = seen["recent_loss"]
        clip = "none" if seen["clip_bound"] is None else f"{seen['clip_bound']:g}"
        lines = [
            f"steps            {seen['steps']}",
            f"best loss        {_number(seen['best_loss'])}",
            f"best checkpoint  {seen['best_checkpoint'] or 'none yet'}",
            f"learning rate    {seen['learning_rate']:g} (the script's own: {seen['learning_rate_of_the_script']:g})",
            f"clip bound       {clip}",
            f"anomaly steps    {seen['anomaly_steps']} ({seen['anomaly_rate']:.2%})",
            f"recent loss      mean {_number(recent['mean'])}, std {_number(recent['std'])}, "
            f"min {_number(recent['min'])}",
            f"fixes per kind   {seen['fixes_per_kind'] or 'none'}",
        ]
        for fix in seen["last_fixes"]:
            actions = ", ".join(action["action"] for action in fix["actions"])
            lines.append(f"  step {fix['applied_step']}: {actions}: {fix['state']}, {fix['verdict']}")
        self._say("\n".join(lines))

    def log(self, metrics: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Hand metrics over at the present step, as `sosa_stream.agent.log` does: ``wrapper.log(val_loss=1.2)``."""
        if self._agent is not None:
            self._agent.log(metrics, more)

    def register_knob(self, knob: Knob) -> None:
        """Let fixes set one of the script's hyperparameters, as `sosa_stream.agent.register_knob` does."""
        if self._agent is not None:
            self._agent.knobs.register(knob)

    def register_state(self, name: str, thing: Any) -> None:
        """Have a rollback restore this too, as `sosa_stream.agent.register_state` does."""
        if self._agent is not None:
            self._agent.registry.register(name, thing)

    def observe_posterior(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        """Hand over a VAE's approximate posterior of one training batch: means and log variances, (batch, latent)."""
        if self._agent is not None:
            self._agent.observe_posterior(mu, logvar)

    def load_best(self) -> int:
        """Put the best checkpoint back into model and optimizer. Returns the step after which it was saved.

        Raises:
            SosaError: there is none yet.
        """
        return self._best.load()

    def close(self) -> None:
        """Stop watching and put everything back. The model and the optimizer stay as they are."""
        self._batches.remove()
        if self._agent is not None and self._owns_agent:
            self._agent.close("wrapper closed")

    def __enter__(self) -> SOSATrainingWrapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._agent is not None and self._owns_agent:
            self._agent.close("wrapper closed", checkpoint=process.ending(error))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _start(self, run: str) -> None:
        here = LocalLink(self.monitor.engine, self.monitor.on_effect)
        there = process.current()
        if there is not None and there.watches_everything:  # under `-m sosa_stream.agent`
            self._agent, self._owns_agent, self.monitor.decides = there, False, False
            there.show(here)
            return
        ranks = dist.get_world_size() if self._distributed else 1
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self._agent = Agent(
            self.settings,
            run=run,
            rank=dist.get_rank() if ranks > 1 else 0,
            world_size=ranks,
            optimizer=self.optimizer,
            parameters=names,
            say=lambda text: self._say(f"sosa: {text}"),
        )
        self._agent.say(_promise(self.settings))
        if ranks > 1:
            self.monitor.decides = False
            self._agent.show(here)
            self._agent.start()
        else:
            self._agent.start_local(here)

    def _count(self, loss: torch.Tensor) -> None:
        step = self._num_steps
        self._num_steps += 1
        if loss.device.type != "cpu" and step % 10:
            return  # reading it would make the host wait for the device
        value = float(loss)
        self._losses.append(value)
        if math.isfinite(value):
            self._best_loss = min(self._best_loss, value)
        error = self.monitor.detect_error()
        self._anomaly_steps += error is not None
        if not self._distributed or dist.get_rank() == 0:
            try:
                self._best.observe(step, value, trusted=error is None)
            except Exception as problem:  # a full disk, say, is no reason to end a training
                if not self._told_of_disk:
                    self._told_of_disk = True
                    self._say(f"sosa: the best checkpoint cannot be written, training goes on: {problem}")

    def _fixes(self) -> list[dict[str, Any]]:
        """What was applied: with verdicts where this process decides, as this rank did it where the daemon does."""
        if not self.monitor.decides and self._agent is not None:
            return self._agent.actuators.history
        records = self.monitor.commands.values()
        return [record.as_dict() for record in records if record.applied_step is not None]


def wrap_training(model: nn.Module, optimizer: Optimizer, auto_fix: bool = True, **options: Any) -> SOSATrainingWrapper:
    """A `SOSATrainingWrapper`; ``options`` are its further arguments."""
    return SOSATrainingWrapper(model, optimizer, auto_fix=auto_fix, **options)


def _check(model: Any, optimizer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if any(rate_of(group) is None for group in optimizer.param_groups):
        raise UsageError(
            "the optimizer has a parameter group without 'lr', or whose 'lr' is no number: its learning rate cannot be "
            "watched"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("the model lies on the meta device: materialise it (model.to_empty) before wrapping")


def settings_of(config: Any, auto_fix: bool, max_fixes_per_error: int = 3) -> tuple[bool, Settings, str]:
    """Whether to watch at all, how, and what is wrong with the environment, which is no reason not to train."""
    if isinstance(config, Settings):
        config.detect.check_kinds(BY_KIND)
        return True, with_absolute_paths(config), ""
    overrides: dict[str, Any] = {}
    enabled = True
    switches = switches_of(config)
    if switches is not None:
        enabled = switches.get("enabled", True)
        auto_fix = switches.get("auto_fix", auto_fix)
        max_fixes_per_error = switches.get("max_fixes", max_fixes_per_error)
        if "window" in switches:
            overrides["detect.window_steps"] = switches["window"]
    elif isinstance(config, Mapping):
        overrides.update(config)
    elif config is not None:
        raise UsageError("config must be Settings, a mapping of settings, parsed arguments, or have a `sosa` section")
    overrides.setdefault("auto.max_fixes_per_error", max_fixes_per_error)
    overrides.setdefault("mode", Mode.AUTO if auto_fix else Mode.SUGGEST)
    given = load_settings(overrides=overrides)
    given.detect.check_kinds(BY_KIND)
    if not enabled or is_disabled(os.environ):
        return False, given, ""
    settings, complaint = read_settings(os.environ, overrides)
    if settings is None:
        return False, given, complaint
    default = settings.auto.allow == Settings().auto.allow and "auto.allow" not in overrides
    if settings.mode is Mode.AUTO and default:
        settings = replace(settings, auto=replace(settings.auto, allow=WRAPPER_ALLOW))
    return True, settings, complaint


def _promise(settings: Settings) -> str:
    if settings.mode is Mode.AUTO:
        allowed = ", ".join(policy(settings)["allow"])
        return f"watching; may apply by itself: {allowed}"
    return "watching; applies nothing, suggests only"


def _number(value: float | None) -> str:
    return "none yet" if value is None else f"{value:.6g}"


def _is_rank_zero() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _to_stdout(text: str) -> None:
    print(text, flush=True)


def _to_nowhere(text: str) -> None:
    """Ranks other than 0 say nothing that rank 0 says too."""
