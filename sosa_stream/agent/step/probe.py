"""The optimizer step, watched and controlled: the only code of ours on the training thread.

Each outermost call of any optimizer's ``step`` is a *tick*, and so is one that GradScaler leaves out. Before it: take
part in the fence, learn the gradient norm, keep what must not reach the weights from them. After it: put everything
back as the script left it, note the row, and copy a snapshot when its time has come.

What steers training (*control*) must be the same on all ranks; if it fails here while a fix or the guard is in force,
this rank would drift from the others unseen, so it ends as in doubt. What only watches (*observation*) may fail alone:
it is switched off, said once, and training goes on.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.stop import InDoubt
from sosa_stream.agent.repair.actuators import Actuators
from sosa_stream.agent.repair.learning_rate import LearningRate
from sosa_stream.agent.repair.snapshots import SnapshotRing
from sosa_stream.agent.repair.stopping import StopTraining
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.step import gradients
from sosa_stream.agent.step.attribution import Attribution
from sosa_stream.agent.step.guard import Guard
from sosa_stream.agent.step.norm import StepNorm
from sosa_stream.agent.step.rows import Rows
from sosa_stream.agent.step.step_calls import Primary, StepCalls
from sosa_stream.agent.transport.outbox import Outbox
from sosa_stream.agent.watch.digests import Digests
from sosa_stream.agent.watch.looks import Columns, Looks
from sosa_stream.agent.watch.own_time import Part
from sosa_stream.agent.watch.taps import Taps
from sosa_stream.protocol.messages import Ack, AckState, Command, Phase

FORWARD, OPTIMIZER = Phase.FORWARD, Phase.OPTIMIZER  # at every step: to look an enum's member up costs a microsecond


class Probe:
    """Hooks around optimizer steps. One per process.

    Args:
        guard: keeps non-finite gradients from the weights.
        attribution: looks where they come from.
        on_error: told of an internal error; the argument says whether control is lost (True) or only observation.
        alone: this is the only rank, so its gradients are those of all.
        tell: given a sentence when training is changed by a fix.
    """

    def __init__(
        self,
        *,
        outbox: Outbox,
        taps: Taps,
        state: TrainingState,
        actuators: Actuators,
        snapshots: SnapshotRing | None,
        guard: Guard,
        attribution: Attribution | None = None,
        digest_after_fix: bool,
        digest_every: int = 0,
        layers_every: int = 0,
        features: bool = False,
        alone: bool,
        on_error: Callable[[BaseException, bool], None],
        tell: Callable[[str], None] = lambda text: None,
        after_tick: Callable[[], None] | None = None,
    ) -> None:
        self.tick = 0
        self.step = 0
        self.fence: Fence | None = None
        self.observing = True
        self.controlling = True
        self.device: torch.device | None = None
        """Where the parameters of the newest optimizer are; of several devices, a GPU."""
        self.epoch = 0
        """Of the step under way, from 1, for its row; 0 where nobody counts them."""
        self.before_tick: Callable[[], None] | None = None
        """Called when a step is about to begin; may raise `StopTraining`, where it does on all ranks."""
        self.at_rest: Callable[[], None] | None = None
        """Called when an optimizer step is over; may raise, as a signal's handler does."""
        self._guard = guard
        self._attribution = attribution
        self._found: dict[str, float] = {}
        """What it has found in the step under way: columns of its row."""
        self._outbox = outbox
        self._taps = taps
        taps.around_scaler_step = self._around_scaler_step
        if not alone:
            taps.on_join = functools.partial(setattr, actuators.in_force, "uneven", True)
        self._state = state
        self._actuators = actuators
        self._in_force = actuators.in_force
        self._snapshots = snapshots
        self._digest_after_fix = digest_after_fix
        self._on_error = on_error
        self._tell = tell
        self._after_tick = after_tick
        self._learning_rate = LearningRate()
        self._calls = StepCalls(self._put_back)
        self._primary = Primary(actuators.begin_anew)
        self._restore: list[Callable[[], None]] = []
        self._norm = StepNorm(taps, alone=alone)
        self.looks = Looks(
            lambda error: on_error(error, False),
            lambda: state.models,
            layers_every=layers_every,
            features=features,
        )
        self.looks.forward.before = self.before_forward
        every = 0 if alone else digest_every
        digests = Digests(lambda: state.optimizers, every, self._norm.are_shared, lambda: state.frozen_chunks)
        self._rows = Rows(outbox, taps, self.looks, self._in_force, digests)
        self._last: Callable[[], Optimizer | None] = lambda: None
        self._alone = alone
        self._handles: list[Any] = []
        self._only: Optimizer | None = None
        """The one that is watched, where not all are."""

    def before_forward(self, root: torch.nn.Module) -> None:
        """The first forward pass of a step is about to begin; never raises."""
        if self.controlling:
            self._guard.before_forward(root)
        self._taps.own_time.begin_forward()

    def install(self, optimizer: Optimizer | None = None) -> None:
        """Watch one optimizer, or every optimizer of the process."""
        if optimizer is None:
            self._handles = [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]
        else:
            self._handles = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
        self._only = optimizer
        self.looks.sees_inputs = optimizer is None
        self.looks.begin(self.step)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.looks.remove()
        self._put_back()

    @property
    def in_step(self) -> bool:
        """Whether an optimizer step is under way, in whatever thread."""
        return self._calls.under_way

    @property
    def left_in_step(self) -> bool:
        """Whether the last optimizer step has raised: weights may be updated in part."""
        return self._calls.have_raised

    # -- before the step -------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not self._calls.enter(optimizer, sys._getframe(1)) or not self.controlling:
            return None
        try:
            self._begin(optimizer)
            closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
            if closure is None:
                self._control(optimizer)
                return None
            self._scale_rate(optimizer)  # LBFGS reads it before it calls its closure
            wrapped = self._wrap_closure(closure, optimizer)
            if "closure" in kwargs:
                return args, {**kwargs, "closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs
        except StopTraining:
            self._calls.clear()  # it has not begun
            self._put_back()
            raise
        except InDoubt as error:
            self._on_error(error, True)
        except Exception as error:
            self._lose_control(error)
        return None

    def _begin(self, optimizer: Optimizer) -> None:
        """The first thing in a tick: apply what the ranks agreed to apply now."""
        if self.before_tick is not None:
            self.before_tick()
        if self._last() is not optimizer:
            is_new, self._last = self._state.meet(optimizer), weakref.ref(optimizer)
            self._norm.meet(optimizer)
            if is_new:
                self._meet(optimizer)
        if self._snapshots is not None:
            if self.tick == 0:
                self._keep_copies(lambda ring: ring.take(0, 0))
            self._keep_copies(SnapshotRing.complete)
        self._guard.begin(optimizer)
        self._norm.value = None
        self._taps.phase = OPTIMIZER
        self._taps.own_time.enter(Part.OPTIMIZER)
        if (fence := self.fence) is not None and (command := fence.arrive(self.tick)) is not None:
            try:
                self._apply(command, fence)
            except Exception as error:  # the others may have managed: this rank must not go on beside them
                self._on_error(error, True)
            if optimizer in self._in_force.stale_gradients:
                self._guard.buffers_restored()
                if self._in_force.accumulation is not None:
                    self._in_force.accumulation.drop()

    def _meet(self, optimizer: Optimizer) -> None:
        """A new optimizer: can it be watched, and can it be guarded?"""
        self.looks.meet(optimizer)
        self._taps.losses.meet(self._state.optimizers)
        devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
        self.device = max(devices, key=lambda device: device.type == "cuda", default=self.device)
        if any(device.type == "meta" for device in devices):
            self.observing = self._guard.on = False
            self._tell("parameters lie on the meta device, where there is nothing to see: training is not watched")
        if self._guard.on:
            owned = [p for known in self._state.optimizers for group in known.param_groups for p in group["params"]]
            self._guard.meet(owned)
        if self._guard.on and not self._norm.gradients_are_shared and not self._guard.reduces:
            self._tell(
                "not all parameters are DistributedDataParallel's, so gradients may differ between ranks: the guard "
                "acts only where the script's own clip_grad_norm_ gives a reduced norm of sharded ones. Where all "
                'ranks step alike, agent.guard = "allreduce" lets them ask each other'
            )

    def _apply(self, command: Command, fence: Fence) -> None:
        """Carry out what the ranks agreed on, and say what came of it."""
        tick, step = self.tick, self.step
        applied, detail = self._actuators.carry_out(command, tick, step, fence)
        state = AckState.APPLIED if applied else AckState.FAILED
        digest = self._digest_now() if applied else ""
        self._outbox.add_message(
            lambda header: Ack(
                header=header, command=command.id, state=state, tick=tick, step=step, detail=detail[:500], digest=digest
            )
        )
        self._tell(f"step {step}: {state} command {command.id}: {detail} ({command.reason})")
        if self._in_force.stop_wanted:
            raise StopTraining

    def _digest_now(self) -> str:
        if self._digest_after_fix:
            try:
                return self._actuators.digest()
            except Exception as error:
                self._on_error(error, False)
        return ""

    def _control(self, optimizer: Optimizer) -> None:
        """With the step's gradients at hand: norm, guard, clip, learning rate."""
        in_force, norm = self._in_force, self._norm
        parameters, local = gradients.with_gradients(optimizer)
        norms: list[torch.Tensor] | None = None
        if parameters:
            if norm.sharded:  # a whole one's norm would be a hidden collective
                local = [gradients.to_local(gradient) for gradient in local]
            norms = norm.take(optimizer, parameters, local)
            in_force.norm_is_shared = norm.is_shared
        skip = self._leave_out(optimizer, parameters)
        if parameters and in_force.max_norm is not None and norm.is_shared and not skip:
            norm.clip(local, in_force.max_norm)
        if self.observing and not norm.sharded and self.looks.are_due(self.step, norm.value):
            self._look(optimizer, parameters, local, norms, skip)
        if in_force.accumulation is not None and not skip:
            waits, restore = in_force.accumulation.gather(optimizer)
            self._restore.append(restore)
            if waits:
                self.looks.skip_update()
        self._state.own_rates.note(optimizer)
        self._scale_rate(optimizer)

    def _scale_rate(self, optimizer: Optimizer) -> None:
        if self._in_force.changes_lr:
            self._restore.append(self._learning_rate.restore)
            self._learning_rate.scale(optimizer, self._in_force)

    def _leave_out(self, optimizer: Optimizer, parameters: list[torch.Tensor]) -> bool:
        """Leave the coming update out where a fix or the guard wants it so. Returns whether the host knows it does."""
        in_force, guard, norm = self._in_force, self._guard, self._norm
        if stale := optimizer in in_force.stale_gradients:
            in_force.stale_gradients.discard(optimizer)
        # A scaler looks for what is not finite itself, and where it skips a step no hook is called to ask.
        asks = guard.on and guard.reduces and not norm.gradients_are_shared and self._taps.loss_scale is None
        if not parameters and not asks:
            return False
        if stale or in_force.skip_left:
            guard.skip(optimizer)
            in_force.skip_left -= not stale
            return True
        bad = False
        if asks:
            bad = guard.agree(optimizer, norm.value, self.step)
        elif guard.on and norm.is_shared and norm.value is not None:
            bad = guard.judge(optimizer, norm.value, len(parameters), self.step)
        elif self._attribution is not None and self._alone and norm.value is not None and norm.value.is_cpu:
            self._look_back(optimizer, parameters, not math.isfinite(norm.value.item()))
        self._look_back(optimizer, parameters, bad)
        return bad

    def _look_back(self, optimizer: Optimizer, parameters: list[torch.Tensor], bad: bool) -> None:
        """Where does it come from that the step is ``bad``, as all ranks know?"""
        if not bad or self._attribution is None or not self._primary.is_it(optimizer):
            return
        try:
            loss, buffers = self._taps.losses.waiting, self._guard.buffers if self._guard.on else None
            self._found = self._attribution.look(self.tick, parameters, loss, buffers)
        except Exception as error:
            self._lose_sight(error)

    def _look(
        self,
        optimizer: Optimizer,
        parameters: list[torch.Tensor],
        local: list[torch.Tensor],
        norms: list[torch.Tensor] | None,
        skip: bool,
    ) -> None:
        if not self._primary.is_it(optimizer):
            return
        try:
            self.looks.before_update(self.step, optimizer, parameters, local, norms)
            if skip:
                self.looks.skip_update()
        except Exception as error:
            self._lose_sight(error)

    def _wrap_closure(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Lightning and LBFGS run backward inside ``step``: the gradients are there only after the closure."""

        def wrapped() -> Any:
            self._put_back()  # LBFGS calls its closure many times in one step
            try:
                result = closure()
            except BaseException:  # no after-hook will come
                self._calls.clear()
                raise
            try:
                self._control(optimizer)
            except Exception as error:
                self._lose_control(error)
            return result

        return wrapped

    def _around_scaler_step(self, optimizer: Any, step: Callable[[], Any]) -> Any:
        """GradScaler calls the optimizer, or leaves it out: by the same gradients, so that all ranks do alike.

        Where it does so for ever, only a tick of its own lets a fix in.
        """
        tick = self.tick
        result = step()
        is_watched = isinstance(optimizer, Optimizer) and self._only in (None, optimizer) and bool(self._handles)
        if is_watched and self.controlling and self.tick == tick and not self.in_step:
            self._leave_to_scaler(optimizer)
        return result

    def _leave_to_scaler(self, optimizer: Optimizer) -> None:
        try:
            self._begin(optimizer)
            self._guard.left_out()
            self._in_force.stale_gradients.discard(optimizer)
            self.looks.skip_update()
        except StopTraining:
            self._put_back()
            raise
        except InDoubt as error:
            self._on_error(error, True)
        except Exception as error:
            self._lose_control(error)
        if self.controlling:
            self._end(optimizer)
        if self.at_rest is not None:
            self.at_rest()

    # -- after the step --------------------------------------------------------------------------------------------

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._calls.leave(optimizer):
            if self.controlling:
                self._end(optimizer)
            if self.at_rest is not None:
                self.at_rest()

    def _end(self, optimizer: Optimizer) -> None:
        try:
            self._put_back()
            self._guard.settle(others_wait=self.observing and self._taps.losses.others_wait(optimizer))
            primary = self._primary.steps(optimizer)
            step = self.step
            self.step += primary
            self.tick += 1
            self._taps.phase = FORWARD
            if self._attribution is not None:
                self._attribution.forget()
        except Exception as error:
            self._lose_control(error)
            return
        if self.observing:
            try:
                loss, own = self._taps.losses.take(optimizer)
                self._rows.num_objectives += own
                if primary:  # the loss shown is its own, not a GAN's other one
                    found, self._found = self._found, {}
                    apart = self._look_apart(optimizer)
                    if self.epoch:
                        apart["epoch"] = float(self.epoch)
                    num_models, norm, skipped = self._primary.num_changes, self._norm.value, self._guard.skipped
                    self._rows.add(optimizer, step, self.tick - 1, num_models, loss, norm, skipped, found, apart)
                if self._after_tick is not None:
                    self._after_tick()
            except StopTraining:
                raise
            except Exception as error:
                self._lose_sight(error)
        if self._snapshots is not None:
            shared = self._norm.value if self._norm.is_shared else None
            self._keep_copies(lambda ring: ring.observe(self.tick, self.step, shared))

    def _look_apart(self, optimizer: Optimizer) -> Columns:
        """What tells this rank's step from the others': its times, and its gradients before they were reduced."""
        taps, norm = self._taps, self._norm
        on_device = self.device is not None and self.device.type != "cpu"
        reduced = norm.gradients_are_shared and not self._alone
        found = taps.own_time.take(reduces=reduced, blind=norm.sharded or self._alone, on_device=on_device)
        if reduced:
            found |= taps.local_gradients.take(taps.loss_scale, norm.value)
            taps.local_gradients.begin(self.step, optimizer, norm.value)
        return found

    def _keep_copies(self, act: Callable[[SnapshotRing], None]) -> None:
        assert self._snapshots is not None
        try:
            act(self._snapshots)
        except Exception as error:
            self._snapshots.lose()  # this rank then refuses to hold a rollback, before any rank is bound
            self._on_error(error, False)

    def _put_back(self) -> None:
        """Everything as the script left it: learning rate, gradients, found_inf."""
        while self._restore:
            self._restore.pop()()
        self._guard.put_back()

    def _lose_sight(self, error: Exception) -> None:
        self.observing = False
        self.looks.remove()
        self._on_error(error, False)

    def _lose_control(self, error: Exception) -> None:
        in_force = self._guard.on or self._in_force.standing
        self.controlling = False
        self._put_back()
        self._on_error(error, in_force)
