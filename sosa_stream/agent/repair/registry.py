"""What belongs to training beside the model and its optimizers: schedulers, scalers, and what the script names.

Schedulers are noted as they are made, by wrapped constructors; those made before us are found by one look at all live
objects. A scaler does not know whose it is: it is noted as it steps an optimizer. State that only the script knows of
(an EMA, the position in its data) it registers:

    agent.register_state("ema", ema)        # anything with state_dict() and load_state_dict()
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, ReduceLROnPlateau, SequentialLR

from sosa_stream.agent.repair.copies import Copy, copy_all, revive
from sosa_stream.errors import SosaError, describe

Thing = TypeVar("Thing")

CONSTRUCTORS = (LRScheduler, ReduceLROnPlateau, SequentialLR, ChainedScheduler)
"""Those whose ``__init__`` is wrapped: these schedulers do not call that of `LRScheduler`."""

MAX_REGISTERED = 64


class Registry:
    """Keeps no scheduler or scaler alive; what the script registers is held, for it may be known to nobody else."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._schedulers: list[weakref.ref[LRScheduler]] = []
        self._scalers: weakref.WeakKeyDictionary[Optimizer, weakref.ref[GradScaler]] = weakref.WeakKeyDictionary()
        self.registered: dict[str, Any] = {}
        """What the script has named, by its name."""
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        """Note every scheduler that is made from here on, and every scaler that steps."""
        for cls in CONSTRUCTORS:
            original = cls.__init__
            setattr(cls, "__init__", self._noting(original))  # noqa: B010
            self._restore.append(functools.partial(setattr, cls, "__init__", original))
        self._restore.append(functools.partial(setattr, GradScaler, "step", GradScaler.step))
        setattr(GradScaler, "step", self._noting_scaler(GradScaler.step))  # noqa: B010

    def remove(self) -> None:
        self.registered.clear()
        while self._restore:
            self._restore.pop()()

    def note(self, thing: Any) -> None:
        """Take a scheduler in, once; anything else is let by."""
        if issubclass(type(thing), LRScheduler):  # and not `isinstance`, which asks proxies what they stand for
            _add(self._schedulers, thing)

    def note_scaler(self, scaler: GradScaler, optimizer: Any) -> None:
        """Take in which scaler steps an optimizer."""
        if issubclass(type(optimizer), Optimizer):
            self._scalers[optimizer] = weakref.ref(scaler)

    def register(self, name: str, thing: Any) -> None:
        """Take state of the script's own in, unless it cannot be: that is said, and training goes on without it."""
        if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
            self._say(f"register_state: a name must be a short string, not {name!r}; it is left out")
        elif missing := [m for m in ("state_dict", "load_state_dict") if not callable(getattr(thing, m, None))]:
            self._say(
                f"register_state: {name} ({type(thing).__name__}) has no {' and no '.join(missing)}, and cannot be "
                "copied or put back; it is left out"
            )
        elif len(self.registered) >= MAX_REGISTERED and name not in self.registered:
            self._say(f"register_state: {MAX_REGISTERED} names at most; {name} is left out")
        else:
            self.registered[name] = thing

    def schedulers(self, optimizers: Iterable[Optimizer]) -> list[LRScheduler]:
        """Those that set the rates of ``optimizers``, in their order, then by kind: in every process the same."""
        place = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
        ours = [s for s in _alive(self._schedulers) if id(getattr(s, "optimizer", None)) in place]
        return sorted(ours, key=lambda s: (place[id(s.optimizer)], type(s).__name__))

    def scalers(self, optimizers: Iterable[Optimizer]) -> list[GradScaler]:
        """Those that step ``optimizers``, in their order; one that is switched off has no state."""
        refs = [self._scalers[optimizer] for optimizer in optimizers if optimizer in self._scalers]
        return [scaler for scaler in dict.fromkeys(_alive(refs)) if scaler.is_enabled()]

    def capture(self, reuse: dict[str, Any]) -> dict[str, Any]:
        """Copies of what the script has registered, by name. One that cannot tell its state is said and let go."""
        states = {}
        for name, thing in list(self.registered.items()):
            try:
                states[name] = copy_all(thing.state_dict(), reuse.get(name), deep=True)
            except Exception as error:
                self._say(f"the state of {name} cannot be copied, and is left out: {type(error).__name__}: {error}")
                del self.registered[name]
        return states

    def restore(self, states: dict[str, Any]) -> None:
        """Give the script's own their state back.

        Raises:
            SosaError: one would not take it; those before it have.
        """
        for name, state in states.items():
            if name in self.registered:
                try:
                    self.registered[name].load_state_dict(revive(state))
                except Exception as error:
                    raise SosaError(f"the state of {name} could not be put back: {describe(error)}") from error

    def _noting(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(thing: Any, *args: Any, **kwargs: Any) -> None:
            original(thing, *args, **kwargs)
            self.note(thing)

        return __init__

    def _noting_scaler(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.note_scaler(scaler, optimizer)
            return original(scaler, optimizer, *args, **kwargs)

        return step


def follows_metric(scheduler: LRScheduler) -> bool:
    """Whether it goes by a metric, not by the number of steps."""
    return isinstance(scheduler, ReduceLROnPlateau)


def copy_scale(scaler: Any) -> dict[str, Any]:
    """A scaler's state, without the synchronisation of its ``state_dict``."""
    names = ("_scale", "_growth_tracker", "_init_scale", "_init_growth_tracker")
    return {name: copy_all(getattr(scaler, name)) for name in names}


def restore_scale(scaler: Any, saved: dict[str, Any]) -> None:
    for name, start in (("_scale", "_init_scale"), ("_growth_tracker", "_init_growth_tracker")):
        present, before = getattr(scaler, name), saved[name]
        if isinstance(before, Copy):
            before.put_back(present)
        elif present is not None:  # it is made by the first loss that is scaled
            present.fill_(saved[start])


def _add(refs: list[weakref.ref[Thing]], thing: Thing) -> None:
    alive = [ref for ref in refs if ref() is not None]
    if all(ref() is not thing for ref in alive):
        alive.append(weakref.ref(thing))
    refs[:] = alive


def _alive(refs: list[weakref.ref[Thing]]) -> list[Thing]:
    return [thing for ref in refs if (thing := ref()) is not None]
