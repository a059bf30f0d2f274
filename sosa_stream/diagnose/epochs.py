"""Epochs, as the DataLoaders show them that the training steps on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sosa_stream.agent.repair.stopping import StopTraining

MAX_LOADERS = 64


class EpochsDone(StopTraining):
    """The epochs that were asked for are over: raised in the training thread, before the first update of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.code = 0


@dataclass(slots=True)
class _Loader:
    epoch: int
    iterator: Callable[[], Any]
    num_yielded: int


class Epochs:
    """Counts how often the DataLoader with the most batches has begun anew; asked before each step.

    Batches that no step is made of (validation) are not seen. Loaders are told apart by their data and length, for a
    script may make a new one for each epoch.

    Args:
        most: raise `EpochsDone` before the first update beyond so many epochs; 0: never.
    """

    def __init__(self, most: int) -> None:
        self.epoch = 0
        """Of the step that is about to be taken, from 1; 0 where no DataLoader has been seen."""
        self._most = most
        self._loaders: dict[tuple[int, str], _Loader] = {}

    def before_step(self, iterators: Iterable[Any]) -> None:
        """A step is about to be taken on batches of ``iterators``.

        Raises:
            EpochsDone: it would be the first of an epoch too many.
        """
        with contextlib.suppress(Exception):  # their length and data are the script's own code
            for iterator in iterators:
                self._see(iterator)
        if not self._loaders:
            return
        epoch = self._loaders[max(self._loaders)].epoch
        if epoch > self._most > 0:
            raise EpochsDone
        self.epoch = epoch

    def _see(self, iterator: Any) -> None:
        try:
            length = len(iterator)
        except TypeError:
            length = 0
        key = length, type(iterator._dataset).__qualname__
        num = int(getattr(iterator, "_num_yielded", 0))
        loader = self._loaders.get(key)
        if loader is None:
            if len(self._loaders) < MAX_LOADERS:
                self._loaders[key] = _Loader(1, weakref.ref(iterator), num)
        elif loader.iterator() is not iterator or num < loader.num_yielded:  # persistent workers keep the iterator
            self._loaders[key] = _Loader(loader.epoch + 1, weakref.ref(iterator), num)
        else:
            loader.num_yielded = num
