"""Which DataLoaders hand batches to the training, and batches of theirs that go by unused.

A DataLoader's iterators are noted as they deliver (the loop reads nothing twice, so there is no later moment to look):
with those that have delivered since the last step, the training runs on. None is kept alive.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from sosa_stream.agent.watch.own_time import OwnTime


class Deliveries:
    """Wraps what every DataLoader's iterator is asked for its next batch by.

    Args:
        tick: the step-call that comes next.
        own_time: told how long each batch takes to come.
    """

    def __init__(self, tick: Callable[[], int] = lambda: 0, own_time: OwnTime | None = None) -> None:
        self.tick = tick
        self.epoch_batches = 0
        """Of the longest DataLoader so far, as far as one can tell."""
        self._own_time = own_time or OwnTime()
        self._noted_at = -1
        self._noted: list[weakref.ref[Any]] = []
        self._unwanted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._restore: Callable[[], None] | None = None

    def install(self) -> None:
        original = _BaseDataLoaderIter.__next__

        @functools.wraps(original)
        def __next__(iterator: Any) -> Any:
            if self._unwanted:
                self._pass_over(original, iterator)
            batch = self._own_time.load(original, iterator)
            if (tick := self.tick()) != self._noted_at:
                if not self._noted or self._noted[-1]() is not iterator:
                    self._measure(iterator)
                self._noted_at, self._noted = tick, [weakref.ref(iterator)]
            elif self._noted[-1]() is not iterator:
                self._note(iterator)
            return batch

        put: Callable[[Any], None] = functools.partial(setattr, _BaseDataLoaderIter, "__next__")
        put(__next__)
        self._restore = functools.partial(put, original)

    def remove(self) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    @property
    def iterators(self) -> list[Any]:
        """Those that the last batches before this step came from: one, or several that the loop reads side by side."""
        return [iterator for ref in self._noted if (iterator := ref()) is not None]

    def pass_over(self, num_batches: int) -> Callable[[], Callable[[], None]]:
        """Let so many batches of each of `iterators` go by, at most to the end of its epoch.

        Returns what has those come after all that have not gone by yet, and returns what lets them go by again.
        """
        chosen = [weakref.ref(iterator) for iterator in self.iterators]
        self._add(chosen, num_batches)

        def undo() -> Callable[[], None]:
            before = self._unwanted.copy()
            self._add(chosen, -num_batches)
            return lambda: self._unwanted.update(before)

        return undo

    def _add(self, refs: list[weakref.ref[Any]], num_batches: int) -> None:
        for ref in refs:
            if (iterator := ref()) is not None:
                left = self._unwanted.pop(iterator, 0) + num_batches
                if left > 0:
                    self._unwanted[iterator] = left

    def _pass_over(self, original: Callable[[Any], Any], iterator: Any) -> None:
        left = self._unwanted.pop(iterator, 0)  # first, because an iterator that ends here may begin anew
        for _ in range(left):
            try:
                original(iterator)
            except StopIteration:
                raise
            except Exception:  # a batch that cannot even be loaded is what was not wanted
                continue

    def _measure(self, iterator: Any) -> None:
        with contextlib.suppress(Exception):  # it need have no length; where it has one, that is the script's code
            self.epoch_batches = max(self.epoch_batches, len(iterator))

    def _note(self, iterator: Any) -> None:
        if all(ref() is not iterator for ref in self._noted):
            self._noted.append(weakref.ref(iterator))
