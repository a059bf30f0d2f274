"""Checkpoints of two ranks: replicas are written by one of them, shards by both, and read back on any number."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agent_parts import Watch, act, batches, command, toy, train
from test_actions_on_ranks import KINDS, held
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torchrun_job import Job
from two_ranks import TwoRanks

from sosa_stream.agent.repair.checkpoints import latest
from sosa_stream.agent.repair.loading import load_checkpoint
from sosa_stream.agent.repair.ranks import Ranks
from sosa_stream.agent.repair.saving import Checkpoints, SaveCheckpoint
from sosa_stream.settings import AgentSettings


def watched(rank: int, folder: str) -> tuple[Watch, Checkpoints]:
    watch = Watch(alone=False, ranks=Ranks(rank, range(2), lambda: (0, 1), 30.0))
    settings = AgentSettings()
    checkpoints = Checkpoints(watch.state, settings, True, 2, lambda: Path(folder))
    save = SaveCheckpoint(checkpoints, settings, True, watch.said.append)
    watch.actuators._by_action["save_checkpoint"] = save  # type: ignore[index]
    return watch, checkpoints


def whole(tensor: torch.Tensor) -> list[float]:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().reshape(-1).tolist()


def saves(rank: int, kind: str, folder: str, spoilt_on: int) -> Any:
    model, optimizer = KINDS[kind]()
    watch, checkpoints = watched(rank, folder)
    with watch.installed():
        train(model, optimizer, batches(3, seed=rank))
        if rank == spoilt_on:
            local = next(model.parameters())
            (local.to_local() if isinstance(local, DTensor) else local).data.view(-1)[0] = torch.inf
        before = held(model, optimizer), [whole(p) for p in model.parameters()]
        watch.fence.due[3] = command(act("save_checkpoint"))
        train(model, optimizer, batches(1, seed=rank))
        at_an_end = checkpoints.save("interrupted", watch.probe.step, watch.probe.tick)
    assert not watch.errors, watch.errors
    fresh, another = KINDS[kind]()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    back = None
    dist.barrier()
    if (Path(folder) / "last").exists():
        load_checkpoint(Path(folder) / "last", fresh, another)
        back = held(fresh, another)
    return before, back, watch.acks[0].state, watch.acks[0].detail, at_an_end


@pytest.mark.parametrize("kind", KINDS)
def test_the_action_writes_one_checkpoint_that_every_rank_reads_back(
    two_ranks: TwoRanks, kind: str, tmp_path: Path
) -> None:
    results = two_ranks.run(saves, kind, str(tmp_path), -1)
    for (before, _), back, state, detail, _ in results:
        assert (str(state), back == before) == ("applied", True), detail
    files = sorted(path.name for path in (tmp_path / "last").glob("*.distcp"))
    assert files == (["__0_0.distcp"] if kind == "ddp" else ["__0_0.distcp", "__1_0.distcp"])
    assert json.loads((tmp_path / "last" / "metadata.json").read_text())["step"] == 3
    at_ends = [at_an_end for *_, at_an_end in results]
    if kind == "ddp":
        assert "interrupted_4" in at_ends[0]
        assert at_ends[1] == ""
    else:
        assert "sharded, and the ranks end each for itself" in at_ends[0]
    # And by one process alone, without shards.
    model = toy() if kind == "ddp" else nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=0.5)
    load_checkpoint(tmp_path / "last", model, optimizer)
    assert [whole(p) for p in model.parameters()] == results[0][0][1]
    assert {float(optimizer.state[p]["step"]) for p in model.parameters()} == {3.0}


@pytest.mark.parametrize("spoilt_on", [0, 1])
def test_shards_of_which_one_is_not_finite_are_written_by_no_rank(
    two_ranks: TwoRanks, spoilt_on: int, tmp_path: Path
) -> None:
    results = two_ranks.run(saves, "fsdp", str(tmp_path), spoilt_on)
    for _, back, state, detail, _ in results:
        assert (str(state), back) == ("failed", None)
        assert "not finite" in detail
    assert list(tmp_path.iterdir()) == []


def reshards(rank: int, folder: str) -> Any:
    """What one process has written, into shards."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    fully_shard(model)
    optimizer = AdamW(model.parameters(), lr=0.5)
    report = load_checkpoint(folder, model, optimizer)
    moments = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert all(isinstance(moment, DTensor) for moment in moments)
    return [whole(p) for p in model.parameters()], [whole(m) for m in moments], report.notes


@pytest.mark.parametrize("layout", ["sosa", "torch.save"])
def test_what_one_process_wrote_is_read_into_shards(two_ranks: TwoRanks, layout: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=0.01)
    watch = Watch()
    with watch.installed():
        train(model, optimizer, batches(3))
    checkpoints = Checkpoints(watch.state, AgentSettings(), True, 1, lambda: tmp_path)
    checkpoints.save("final", 3, 3)
    path = tmp_path / "final_3"
    if layout == "torch.save":
        path = tmp_path / "weights.pt"
        torch.save({"model": model.state_dict()}, path)
    for weights, moments, notes in two_ranks.run(reshards if layout == "sosa" else reshards_weights, str(path)):
        assert weights == [whole(p) for p in model.parameters()]
        if layout == "sosa":
            assert moments == [whole(optimizer.state[p]["exp_avg"]) for p in model.parameters()]
            assert notes == ()


def reshards_weights(rank: int, folder: str) -> Any:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    fully_shard(model)
    report = load_checkpoint(folder, model)
    return [whole(p) for p in model.parameters()], None, report.notes


def fails_on_rank(rank: int, kind: str, folder: str, failing: int) -> Any:
    model, optimizer = KINDS[kind]()
    watch, _ = watched(rank, folder)
    if rank == failing:
        from sosa_stream.agent.repair import checkpoints as module

        def full(*_: Any, **__: Any) -> None:
            raise module.NotWrittenError("No space left on device")

        original, module.write_rest = module.write_rest, full
    try:
        with watch.installed():
            train(model, optimizer, batches(2, seed=rank))
            watch.actuators.apply(command(act("save_checkpoint")), 2, 2)
            watch.actuators.take_back()
            failed = ""
    except Exception as error:
        failed = str(error)
    finally:
        if rank == failing:
            module.write_rest = original
    return failed


@pytest.mark.parametrize(("kind", "failing"), [("ddp", 0), ("fsdp", 1)])
def test_a_rank_that_cannot_write_leaves_nothing_under_a_name(
    two_ranks: TwoRanks, kind: str, failing: int, tmp_path: Path
) -> None:
    failures = two_ranks.run(fails_on_rank, kind, str(tmp_path), failing)
    assert [bool(failure) for failure in failures] == [rank == failing for rank in range(2)]
    assert "No space left" in failures[failing]
    assert list(tmp_path.iterdir()) == []


def refuses(rank: int, folder: str) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which is an error in a test's own process

    model = DistributedDataParallel(toy())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=0.01)
    watch, checkpoints = watched(rank, folder)
    with watch.installed():
        train(model, optimizer, batches(2, seed=rank))
        watch.fence.due[2] = command(act("save_checkpoint"))
        train(model, optimizer, batches(1, seed=rank))
    return str(watch.acks[0].state), watch.acks[0].detail, checkpoints.save("final", 3, 3) if rank == 0 else ""


def test_state_of_which_nobody_knows_who_holds_what_is_refused_in_the_same_words(
    two_ranks: TwoRanks, tmp_path: Path
) -> None:
    one, other = two_ranks.run(refuses, str(tmp_path))
    assert one[:2] == other[:2]
    assert "the ranks hold different parts" in one[1]
    assert "the ranks hold different parts" in one[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torchrun
def test_a_job_that_is_terminated_leaves_one_checkpoint_by_rank_0(start: Callable[..., Job]) -> None:
    job = start("--until-told", settings={"SOSA_AGENT_CHECKPOINTS": "on"})
    job.wait_step(30)
    os.kill(job.process.pid, signal.SIGTERM)  # torchrun hands it on to both
    job.process.wait(60)
    folder = job.home / "job" / "checkpoints"
    (path,) = folder.iterdir()
    about = json.loads((path / "metadata.json").read_text())
    assert path.name == f"interrupted_{about['step']}"
    assert latest(folder) == path
    assert about["step"] >= 30
    assert (about["spread"], about["rank"], about["world_size"]) == ("replicated", 0, 2)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    assert load_checkpoint(path, model, strict=True).num_loaded == 6


@pytest.mark.torchrun
def test_a_job_that_ends_well_or_badly_leaves_a_checkpoint_of_that_name(start: Callable[..., Job]) -> None:
    job = start("--steps", "60", settings={"SOSA_AGENT_CHECKPOINTS": "on"})
    job.ended()
    assert [path.name for path in (job.home / "job" / "checkpoints").iterdir()] == ["final_60"]
    assert job.log.count("checkpoint final_60") == 1
