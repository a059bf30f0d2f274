"""Which copies are kept, and which of them may be gone back to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from agent_parts import Watch, batches, bits, toy, train
from torch import nn
from torch.optim import SGD, AdamW

from sosa_stream.agent.repair.snapshots import FARTHER_STEPS, NoSnapshotError, Snapshot, SnapshotRing
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.settings import AgentSettings

ONE = torch.tensor(1.0)


class Kept:
    """A ring over one parameter, led through ticks without any training."""

    def __init__(
        self, max_rollback_steps: int = 2000, norm: Callable[[int], float] = lambda tick: 1.0, **settings: Any
    ):
        self.parameter = nn.Parameter(torch.zeros(2))
        self.said: list[str] = []
        self.optimizer = SGD([self.parameter], lr=0.1)  # held here: the state keeps no optimizer alive
        state = TrainingState()
        state.meet(self.optimizer)
        wanted = {"snapshot_every_ticks": 10, "quarantine_ticks": 5, **settings}
        self.ring = SnapshotRing(state, AgentSettings(**wanted), max_rollback_steps, self.said.append)
        self.norm = norm
        self.tick = 0
        self.ring.take(0, 0)
        self.ring.complete()

    def run(self, ticks: int) -> Kept:
        for _ in range(ticks):
            self.tick += 1
            with torch.no_grad():
                self.parameter.fill_(self.tick)
            self.ring.observe(self.tick, self.tick, torch.tensor(self.norm(self.tick - 1)))
            self.ring.complete()
        return self

    def choose(self, before_step: int, present_step: int) -> Snapshot:
        return self.ring.candidates(before_step, present_step)[0]

    def go_back(self, to: Snapshot) -> None:
        self.ring.went_back(to, self.tick)

    @property
    def held(self) -> list[int]:
        return [snapshot.step for snapshot in self.ring._snapshots]


def test_the_schedule_is_a_pure_function_of_the_tick() -> None:
    assert Kept().run(45).held == Kept(norm=lambda tick: math.nan).run(45).held == [0, 10, 20, 30, 40]


def test_a_snapshot_holds_the_state_from_before_its_step() -> None:
    kept = Kept().run(27)
    snapshot = kept.choose(25, 27)
    assert snapshot.step == 20
    assert torch.equal(snapshot.parameters[0].host, torch.full((2,), 20.0))


def test_a_snapshot_within_the_quarantine_of_the_onset_is_not_chosen() -> None:
    kept = Kept().run(40)
    assert kept.choose(35, 40).step == 30
    assert kept.choose(34, 40).step == 20


def test_a_non_finite_norm_in_its_quarantine_disqualifies_a_snapshot() -> None:
    for bad, chosen in [(29, 30), (30, 20), (34, 20), (35, 30), (20, 30)]:
        kept = Kept(norm=lambda tick, bad=bad: math.nan if tick == bad else 1.0).run(45)  # type: ignore[misc]
        assert kept.choose(38, 45).step == chosen, bad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_snapshot_is_never_chosen(value: float) -> None:
    kept = Kept().run(19)
    with torch.no_grad():
        kept.parameter[0] = value
    kept.ring.observe(20, 20, ONE)
    kept.ring.complete()
    assert kept.held == [0, 10, 20]
    assert kept.choose(100, 30).step == 10


def test_a_second_rollback_soon_after_goes_further_back_although_it_asks_for_no_more() -> None:
    kept = Kept().run(40)
    first = kept.choose(36, 40)
    assert first.step == 30
    kept.go_back(first)
    assert kept.held == [0, 10, 20, 30]
    assert kept.choose(36, 41).step == 20
    kept.go_back(kept.choose(36, 41))
    assert kept.choose(36, 42).step == 10


def test_trouble_long_after_a_rollback_is_another_matter() -> None:
    kept = Kept(snapshot_every_ticks=1000).run(5)
    kept.go_back(kept.choose(5, 5))
    with pytest.raises(NoSnapshotError, match="held: 0"):
        kept.choose(5, 5 + FARTHER_STEPS - 1)
    assert not kept.ring.may_choose(5, 5 + FARTHER_STEPS - 1)
    assert kept.choose(5, 5 + FARTHER_STEPS).step == 0


def test_what_was_copied_since_a_rollback_and_is_healthy_can_be_gone_back_to() -> None:
    kept = Kept().run(40)
    kept.go_back(kept.choose(36, 40))
    assert kept.run(40).choose(75, 80).step == 70


def test_what_was_copied_after_the_target_is_forgotten() -> None:
    kept = Kept().run(60)
    kept.go_back(kept.choose(25, 60))
    assert kept.held == [0, 10, 20]
    assert kept.run(5).held == [0, 10, 20]
    assert kept.run(5).held == [0, 10, 20, 70]


def test_nothing_old_enough_is_said_with_what_there_is() -> None:
    kept = Kept().run(20)
    with pytest.raises(NoSnapshotError, match=r"5 steps before step 3 \(held: 0, 10, 20\)"):
        kept.choose(3, 20)


def test_a_rollback_gives_up_at_most_max_rollback_steps() -> None:
    kept = Kept(max_rollback_steps=15).run(30)
    assert kept.choose(25, 30).step == 20
    with pytest.raises(NoSnapshotError):
        kept.choose(24, 30)


@pytest.mark.parametrize("keep", [4, 8])
def test_ages_are_spread_geometrically_within_the_number_kept(keep: int) -> None:
    kept = Kept(max_rollback_steps=100_000, snapshot_keep=keep).run(2000)
    for _ in range(60):
        kept.run(10)
        ages = [kept.tick - step for step in kept.held]
        assert len(ages) == keep
        assert ages == sorted(ages, reverse=True)
        assert ages[-1] == 0
        # However long ago a fault began, one of them is from before it and wastes no more than a factor of its age.
        gaps = [(old + 10) / (young + 10) for old, young in itertools.pairwise(ages)]
        assert max(gaps) <= (220 if keep == 4 else 12)


@pytest.mark.parametrize("keep", [2, 3, 4, 8])
def test_the_newest_three_stand_at_the_base_spacing(keep: int) -> None:
    kept = Kept(max_rollback_steps=100_000, snapshot_keep=keep).run(1000)
    for _ in range(20):
        kept.run(10)
        near = kept.held[-3:] if keep > 2 else kept.held
        assert near == [kept.tick - 10 * i for i in reversed(range(len(near)))]


def test_a_snapshot_that_is_not_finite_is_the_first_to_make_room() -> None:
    kept = Kept(snapshot_keep=4).run(30)
    with torch.no_grad():
        kept.parameter.fill_(math.nan)
    kept.ring.observe(40, 40, ONE)
    kept.ring.complete()
    poisoned = kept.held
    assert poisoned[-1] == 40
    kept.tick = 40
    kept.run(10)
    assert kept.held == [*poisoned[:-1], 50]


def test_what_lies_beyond_max_rollback_steps_makes_room() -> None:
    kept = Kept(max_rollback_steps=200, snapshot_keep=4).run(1000)
    assert kept.held[0] >= 1000 - 200 - 4 * 10 - 200
    assert len(kept.held) == 4


def test_memory_is_bounded_by_keeping_fewer() -> None:
    kept = Kept(snapshot_max_bytes=3 * 8).run(100)
    assert len(kept.held) == 3
    assert kept.said == ["snapshots: 8 B each, up to 3 in host memory (24 B) on every rank"]


def test_snapshots_that_cannot_fit_twice_are_turned_off_with_a_sentence() -> None:
    kept = Kept(snapshot_max_bytes=15).run(50)
    assert kept.held == []
    assert len(kept.said) == 1
    assert "snapshot_max_bytes" in kept.said[0]
    with pytest.raises(NoSnapshotError, match="held: none"):
        kept.choose(40, 50)


def test_the_cost_is_told_before_it_is_spent_and_corrected_once_it_is_known() -> None:
    class Heavy:
        def state_dict(self) -> dict[str, Any]:
            return {"weights": torch.zeros(1000)}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(snapshots=True, snapshot_every_ticks=1)
    told: list[int] = []
    capture = watch.state.capture
    watch.state.capture = lambda *args: (told.append(len(watch.said)), capture(*args))[1]  # type: ignore[method-assign]
    size = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    moments = sum(2 * p.numel() * p.element_size() for p in model.parameters())
    with watch.installed():
        train(model, optimizer, batches(1))
        assert told[0] == 1
        assert watch.said == [
            f"snapshots: about {size + moments} B each, up to 8 in host memory "
            f"({8 * (size + moments) / 1000:.1f} kB) on every rank"
        ]
        train(model, optimizer, batches(3))  # Adam's step counters are no news
        assert len(watch.said) == 1
        watch.registry.register("heavy", Heavy())
        train(model, optimizer, batches(3))
    assert len(watch.said) == 2
    assert watch.said[1].startswith("snapshots: 4.9 kB each")


def test_the_optimizers_state_counts_toward_the_memory() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # Room for two copies of the weights, not for two with AdamW's moments.
    watch = Watch(snapshots=True, snapshot_every_ticks=1, snapshot_max_bytes=4 * size)
    with watch.installed():
        train(model, optimizer, batches(3))
    assert watch.ring is not None
    assert watch.ring._snapshots == []
    assert len(watch.said) == 1


def test_memory_is_reused_and_what_is_held_stays_what_it_was() -> None:
    kept = Kept(snapshot_keep=3).run(200)
    for snapshot in kept.ring._snapshots:
        assert torch.equal(snapshot.parameters[0].host, torch.full((2,), float(snapshot.step)))
    pointers = {snapshot.parameters[0].host.data_ptr() for snapshot in kept.ring._snapshots}
    kept.run(100)
    assert {snapshot.parameters[0].host.data_ptr() for snapshot in kept.ring._snapshots} == pointers


def test_restoring_does_not_share_memory_with_the_snapshot() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(snapshots=True, snapshot_every_ticks=2, quarantine_ticks=0)
    assert watch.ring is not None
    with watch.installed():
        train(model, optimizer, batches(2))
        before = bits(model, optimizer)
        for seed in (5, 6):  # the second time from what the first has trained on top of
            train(model, optimizer, batches(3, seed=seed))
            (target,) = [snapshot for snapshot in watch.ring._snapshots if snapshot.step == 2]
            watch.state.restore(target, target)
            assert bits(model, optimizer) == before


def test_steps_without_gradients_keep_a_snapshot_healthy() -> None:
    kept = Kept()
    for tick in range(1, 31):
        kept.ring.observe(tick, tick, None)
        kept.ring.complete()
    assert kept.choose(25, 30).step == 20


def test_buffers_of_modules_that_do_not_own_the_parameters_are_left_alone() -> None:
    model, stranger = toy(), nn.BatchNorm1d(4)
    optimizer = SGD(model.parameters(), lr=0.1)
    state = TrainingState()
    state.meet(optimizer)
    held = {id(t) for t in state.buffers}
    assert held == {id(b) for b in model.buffers()}
    assert not {id(b) for b in stranger.buffers()} & held
