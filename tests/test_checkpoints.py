"""Checkpoints on disk: whole and finite under their name, or not there."""

from __future__ import annotations

import json
import math
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_parts import Watch, act, batches, bits, carry_out, command, toy, train
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from sosa_stream.agent.repair import checkpoints
from sosa_stream.agent.repair.checkpoints import NotWrittenError, latest
from sosa_stream.agent.repair.contents import contents_of
from sosa_stream.agent.repair.loading import CheckpointError, load_checkpoint
from sosa_stream.agent.repair.saving import Checkpoints, SaveCheckpoint
from sosa_stream.errors import RefusedError
from sosa_stream.settings import AgentSettings


class Counting:
    def __init__(self, seen: Any = 0) -> None:
        self.seen = seen

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Training:
    """A small training with an actuator for ``save_checkpoint``."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.model = toy()
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        self.watch = Watch()
        of_agent = AgentSettings(**settings)
        self.checkpoints = Checkpoints(self.watch.state, of_agent, True, 1, lambda: folder)
        self.save: Any = SaveCheckpoint(self.checkpoints, of_agent, True, self.watch.said.append)
        self.watch.actuators._by_action["save_checkpoint"] = self.save  # type: ignore[index]

    def steps(self, num: int) -> None:
        with self.watch.installed():
            train(self.model, self.optimizer, batches(num))

    def action(self, name: str | None = None) -> str:
        probe = self.watch.probe
        fix = command(act("save_checkpoint", **({} if name is None else {"name": name})))
        return carry_out(self.watch.actuators, fix, probe.tick, probe.step)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []

    def about(self, name: str) -> Any:
        return json.loads((self.folder / name / "metadata.json").read_text())


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "kept")


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    """The disk is full, as far as this process can see."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_action_writes_the_last_one_and_says_its_size(training: Training) -> None:
    training.steps(3)
    words = training.action()
    assert training.names == ["last"]
    assert str(training.folder / "last") in words
    assert "kB" in words
    about = training.about("last")
    assert (about["step"], about["tick"], about["finite"]) == (3, 3, True)
    assert about["holds"]["optimizers"] == ["AdamW"]
    assert json.loads((training.folder / "last" / "standing_fixes.json").read_text()) == {}


def test_the_last_one_is_replaced_and_named_ones_bear_their_step(training: Training) -> None:
    training.steps(2)
    training.action()
    training.steps(2)
    training.action()
    training.action("best")
    assert training.names == ["best_4", "last"]
    assert training.about("last")["step"] == 4


def test_it_has_no_name_until_all_ranks_have_written_and_none_if_one_has_not(training: Training) -> None:
    training.steps(2)
    training.action()
    actuators = training.watch.actuators
    actuators.apply(command(act("save_checkpoint")), 2, 2)
    assert training.names == ["last", "last.partial"]
    assert latest(training.folder) == training.folder / "last"
    actuators.take_back()
    assert training.names == ["last"]


def test_what_is_taken_back_later_leaves_the_checkpoint_alone(training: Training) -> None:
    training.steps(2)
    fix = command(act("save_checkpoint"))
    carry_out(training.watch.actuators, fix, 2, 2)
    carry_out(training.watch.actuators, command(act("revert", command=fix.id)), 2, 2)
    assert training.names == ["last"]


@pytest.mark.parametrize("name", [None, "best", "final", "mine"])
def test_a_state_that_is_not_finite_gets_none_of_these_names(training: Training, name: str | None) -> None:
    training.steps(2)
    spoil(training.model)
    with pytest.raises(NotWrittenError, match=r"models\.0\.0\.weight is not finite"):
        training.action(name)
    assert training.names == []


@pytest.mark.parametrize("kind", ["interrupted", "error"])
def test_at_a_bad_end_the_state_is_written_as_it_is_and_that_is_told(training: Training, kind: str) -> None:
    training.steps(2)
    training.optimizer.state[next(training.model.parameters())]["exp_avg"].fill_(math.inf)
    training.checkpoints.save(kind, 2, 2)
    assert training.about(f"{kind}_2")["not_finite"] == ["optimizers.0.0.0.weight/exp_avg"]
    assert latest(training.folder) is None


def test_an_infinite_buffer_is_no_fault_and_one_with_nan_is(training: Training) -> None:
    training.model.register_buffer("mask", torch.full((3,), -math.inf))
    training.steps(2)
    training.action()
    training.model.get_buffer("mask").fill_(math.nan)
    with pytest.raises(NotWrittenError, match="mask is not finite"):
        training.action()


def test_a_full_disk_is_told_in_words_and_leaves_what_was_there(training: Training) -> None:
    training.steps(2)
    training.action()
    before = (training.folder / "last" / "metadata.json").read_bytes()
    with no_file_larger_than(2000), pytest.raises(NotWrittenError, match=r"cannot write .*last"):
        training.action()
    assert training.names == ["last"]
    assert (training.folder / "last" / "metadata.json").read_bytes() == before


def test_too_little_room_is_noticed_before_anything_is_written(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.steps(2)
    room = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    with pytest.raises(NotWrittenError, match=r"takes .* kB, and 1\.0 kB are free"):
        training.action()
    assert training.names == []


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    training = Training(tmp_path / "file" / "kept")
    training.steps(1)
    with pytest.raises(NotWrittenError, match=r"cannot write .*: Not a directory"):
        training.action()
    assert "cannot write" in training.checkpoints.save("final", 1, 1)


def test_old_ones_go_but_never_the_best_or_the_newest_good_or_what_is_not_ours(tmp_path: Path) -> None:
    training = Training(tmp_path / "kept", checkpoint_keep=2)
    (training.folder / "mine").mkdir(parents=True)
    training.steps(1)
    training.action("best")
    for _ in range(3):
        training.steps(1)
        training.action("good")
    spoil(training.model)
    for step in range(10, 14):
        training.checkpoints.save("interrupted", step, step)
    assert training.names == ["best_1", "good_4", "interrupted_12", "interrupted_13", "mine"]
    assert latest(training.folder) == training.folder / "good_4"


def test_half_precision_is_half_the_size(tmp_path: Path) -> None:
    sizes = {}
    for half in (False, True):
        training = Training(tmp_path / str(half), checkpoint_half=half)
        training.model.append(nn.Linear(1, 50_000))
        training.model.append(nn.Linear(50_000, 1))
        training.optimizer = AdamW(training.model.parameters(), lr=0.01)
        training.steps(1)
        training.action()
        sizes[half] = training.about("last")["size_bytes"]
        assert training.about("last")["half_precision"] is half
    assert sizes[True] < 0.65 * sizes[False]


def test_a_name_that_is_no_folders_is_refused_before_it_comes_to_a_rank() -> None:
    for name in ("../../etc", "a/b", ".hidden", "a b", "a\n", "\u00fc", "x" * 65):
        with pytest.raises(RefusedError, match=r"can be no folder's name|must be a short string"):
            act("save_checkpoint", name=name)
    act("save_checkpoint", name="before-fix")


def test_what_torch_would_not_read_back_as_values_is_left_out_and_named(training: Training) -> None:
    scheduler = LambdaLR(training.optimizer, lambda step: 1.0)
    training.steps(2)
    training.watch.registry.register("plain", Counting(torch.ones(3)))
    training.watch.registry.register("odd", Counting(Counting()))
    training.action()
    about = training.about("last")
    assert about["left_out"] == ["odd"]
    assert about["holds"]["registered"] == ["plain"]
    rest = torch.load(training.folder / "last" / "rank0.pt", weights_only=True)
    assert rest["registered"]["plain"]["seen"].tolist() == [1.0] * 3
    del scheduler


def test_a_parameter_of_no_module_and_one_that_two_share_are_there() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    loose = nn.Parameter(torch.ones(2))
    optimizer = SGD([*model.parameters(), loose], lr=0.1, momentum=0.9)
    (model(torch.ones(1, 3)).sum() + loose.sum()).backward()
    optimizer.step()
    scheduler, scaler = OneCycleLR(optimizer, 0.1, 10), GradScaler("cpu")
    contents = contents_of([model], [optimizer], [scheduler], [scaler])
    assert {"models.0.1.weight", "loose.0.3", "optimizers.0.loose.0.3/momentum_buffer"} <= contents.tensors.keys()
    assert contents.left_out == ()
    assert contents.rest["optimizers"][0]["groups"][0]["params"] == ["0.0.weight", "0.0.bias", "0.1.bias", "loose.0.3"]


def test_a_checkpoint_that_was_being_replaced_when_the_power_went_is_found(training: Training) -> None:
    training.steps(1)
    training.action()
    (training.folder / "last").rename(training.folder / "last.previous")
    assert latest(training.folder) == training.folder / "last.previous"
    training.action()
    assert latest(training.folder) == training.folder / "last"


def test_nothing_is_written_before_there_is_anything_to_write(training: Training) -> None:
    assert training.checkpoints.save("final", 0, 0) == ""
    assert training.names == []


def test_the_state_of_a_script_that_has_let_go_of_it_is_still_there_at_the_end(training: Training) -> None:
    training.steps(2)
    training.checkpoints.look()
    del training.model, training.optimizer
    assert "final_2" in training.checkpoints.save("final", 2, 2)
    training.checkpoints.let_go()
    assert training.watch.state.optimizers == []


def test_unfinished_ones_of_long_ago_are_removed(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    training.steps(1)
    for name in ("error_3.partial", "mine.partial"):
        (training.folder / name).mkdir(parents=True)
    training.action()
    assert training.names == ["error_3.partial", "last", "mine.partial"]
    monkeypatch.setattr(checkpoints, "STALE_SECONDS", -1.0)
    training.action()
    assert training.names == ["last", "mine.partial"]


# -- and read back -----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(training: Training) -> Training:
    """With a scheduler, a scaler, an EMA, written after five steps."""
    training.scheduler = OneCycleLR(training.optimizer, 0.1, 50)  # type: ignore[attr-defined]
    training.scaler = GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
    training.watch.registry.note(training.scheduler)  # type: ignore[attr-defined]
    training.watch.registry.note_scaler(training.scaler, training.optimizer)  # type: ignore[attr-defined]
    training.steps(5)
    training.watch.registry.register("count", Counting(7))
    training.scheduler.step()  # type: ignore[attr-defined]
    torch.manual_seed(3)
    training.action()
    return training


def test_training_goes_on_from_disk_as_if_it_had_not_stopped(saved: Training) -> None:
    model, count = toy(seed=8), Counting()
    optimizer = AdamW(model.parameters(), lr=0.5)
    scheduler, scaler = OneCycleLR(optimizer, 0.1, 50), GradScaler("cpu")
    report = load_checkpoint(
        saved.folder / "last", model, optimizer, scheduler, scaler, registered={"count": count}, random=True
    )
    assert (report.step, report.layout, report.notes) == (5, "sosa", ())
    assert bits(model, optimizer) == bits(saved.model, saved.optimizer)
    assert optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]
    assert scheduler.state_dict() == saved.scheduler.state_dict()  # type: ignore[attr-defined]
    assert (scaler.get_scale(), count.seen) == (64.0, 7)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    train(model, optimizer, batches(3, seed=9))
    train(saved.model, saved.optimizer, batches(3, seed=9))
    assert bits(model, optimizer) == bits(saved.model, saved.optimizer)


def test_an_optimizer_with_its_parameters_in_another_order_finds_its_own(saved: Training) -> None:
    model = toy(seed=8)
    optimizer = AdamW(list(model.parameters())[::-1], lr=0.5)
    load_checkpoint(saved.folder / "last", nn.DataParallel(model), optimizer)
    for ours, theirs in zip(model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], saved.optimizer.state[theirs]["exp_avg"])


def test_of_two_models_in_one_checkpoint_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    training = Training(tmp_path / "kept")
    other = nn.Sequential(nn.Linear(2, 2))
    second = SGD(other.parameters(), lr=0.1, momentum=0.9)
    with training.watch.installed():
        train(training.model, training.optimizer, batches(2))
        other(torch.ones(1, 2)).sum().backward()
        second.step()
    training.action()
    fresh = nn.Sequential(nn.Linear(2, 2))
    optimizer = SGD(fresh.parameters(), lr=0.1, momentum=0.9)
    assert load_checkpoint(training.folder / "last", fresh, optimizer).num_loaded == 2
    assert bits(fresh, optimizer) == bits(other, second)


def test_half_precision_is_read_back_into_full_with_counts_exact(tmp_path: Path) -> None:
    training = Training(tmp_path / "kept", checkpoint_half=True)
    training.steps(300)  # 299 and 301 are no bfloat16
    training.steps(1)
    training.action()
    model = toy(seed=8)
    optimizer = AdamW(model.parameters())
    load_checkpoint(training.folder / "last", model, optimizer)
    for ours, theirs in zip(model.parameters(), training.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.0)
        state = optimizer.state[ours]
        assert (state["step"].item(), state["exp_avg"].dtype) == (301.0, torch.float32)


def test_a_state_that_was_not_finite_is_refused_unless_it_is_wanted(training: Training) -> None:
    training.steps(2)
    spoil(training.model)
    training.checkpoints.save("error", 2, 2)
    model = toy(seed=8)
    before = bits(model)
    with pytest.raises(CheckpointError, match=r"NaN or Inf, in models\.0\.0\.weight"):
        load_checkpoint(training.folder / "error_2", model)
    assert bits(model) == before
    load_checkpoint(training.folder / "error_2", model, allow_nonfinite=True)
    assert bits(model) == bits(training.model)


@pytest.mark.parametrize("damage", ["no tensors", "tensors cut short", "rest cut short", "metadata cut short"])
def test_a_damaged_one_changes_nothing(saved: Training, damage: str) -> None:
    folder = saved.folder / "last"
    (tensors,) = folder.glob("*.distcp")
    if damage == "no tensors":
        tensors.unlink()
    else:
        file = {"tensors": tensors, "rest": folder / "rank0.pt", "metadata": folder / ".metadata"}[damage.split()[0]]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    model = toy(seed=8)
    optimizer = AdamW(model.parameters(), lr=0.5)
    before = bits(model, optimizer)
    with pytest.raises(CheckpointError, match=r"no whole distributed checkpoint|is damaged"):
        load_checkpoint(folder, model, optimizer)
    assert bits(model, optimizer) == before


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code from a checkpoint has run')",)


def test_code_in_a_folders_metadata_is_not_run(saved: Training) -> None:
    (saved.folder / "last" / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match=r"names builtins\.exec"):
        load_checkpoint(saved.folder / "last", toy())


def test_what_was_in_force_and_what_was_left_out_is_told(saved: Training) -> None:
    saved.watch.registry.register("odd", Counting(Counting()))
    saved.checkpoints._standing_fixes = lambda: {"fixes": [{"actions": [act("scale_lr", factor=0.5).as_dict()]}]}
    saved.action()
    report = load_checkpoint(saved.folder / "last", toy())
    assert report.notes == (
        "was not written, and begins anew: odd",
        "fixes were in force, see standing_fixes.json: scale_lr",
    )
