"""What a process takes of its machine, and how many samples it trains on, arrive where they are shown."""

from __future__ import annotations

import pytest
import torch
from agent_parts import Watch, batches, loss_of, toy, train, watched_live
from torch.optim import SGD

from sosa_stream.agent.environment import pod_name, run_name
from sosa_stream.agent.footprint import footprint, resident_bytes
from sosa_stream.config import load_settings


def test_memory_and_samples_of_a_script_are_in_its_view() -> None:
    model = toy()
    with watched_live() as link:
        train(model, SGD(model.parameters(), lr=0.01), batches(6))
        view = link.engine.view()
    assert view.figures.num_samples == 6 * 16
    assert view.figures.num_steps == 6
    (rank,) = view.ranks
    assert 0 < rank.memory_bytes <= 2 * resident_bytes()
    assert (rank.device_memory_bytes, rank.gpu_uuid) == (0, "")


def test_every_part_of_an_accumulated_batch_counts() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch().installed() as watch:
        for _ in range(2):
            for part in batches(4):
                loss_of(model, part).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [row["samples"] for row in watch.rows] == [64.0, 64.0]


def test_a_scaled_loss_that_fails_in_its_backward_is_no_part() -> None:
    model = toy()
    optimizer = SGD(model.parameters(), lr=0.01)
    with Watch().installed() as watch:
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        optimizer.step()
    assert [row["samples"] for row in watch.rows] == [16.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_named_as_dcgm_names_it() -> None:
    held = torch.ones(1 << 20, device="cuda")
    taken = footprint(held.device)
    assert taken.device_memory_bytes >= held.numel() * 4
    assert taken.gpu_uuid.startswith("GPU-")


@pytest.mark.parametrize(
    ("env", "pod"),
    [
        ({}, ""),
        ({"HOSTNAME": "node-7"}, ""),
        ({"HOSTNAME": "train-worker-3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "train-worker-3"),
        ({"HOSTNAME": "node-7", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "train-worker-3"}, "train-worker-3"),
        ({"POD_NAME": "two\nlines"}, ""),
    ],
)
def test_a_pod_is_named_where_there_is_one(env: dict[str, str], pod: str) -> None:
    assert pod_name(env) == pod


def test_no_run_is_called_as_the_file_that_stops_repairs() -> None:
    named = run_name(load_settings(overrides={"run": "kill"}), {}, "train.py")
    assert named.startswith("kill-")
    assert run_name(load_settings(overrides={"run": "killer"}), {}, "train.py") == "killer"
