"""Mistakes that no exception tells of, in real jobs, without a run to compare with: each told within a few steps.

The cases are those of TrainCheck's evaluation (Jiang et al., OSDI 2025) that need no GPU, made again in
`silent_training`. Three are in `make test`, all in `make test-faults`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from silent_training import CASES
from torchrun_job import Job

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("silent_training.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is told of a case that is made from step ``at`` on, ``within`` so many steps, of which ranks."""

    kind: str
    within: int
    at: int = 0
    ranks: tuple[int, ...] = ()
    num_ranks: int = 2
    seldom: bool = False
    """Whether the mistake itself takes a while to show: of it no delay is known."""


TOLD = {
    "raw_module": Told(kind="rank_desync", ranks=(0, 1), within=4),
    "hooks_lost": Told(kind="rank_desync", ranks=(0, 1), within=4),
    "clip_on_one_rank": Told(kind="rank_desync", ranks=(1,), num_ranks=4, at=40, within=64),
    "zeroed_collective": Told(kind="rank_desync", ranks=(0, 1), within=500, seldom=True),
    "missing_zero_grad": Told(kind="missing_zero_grad", within=4),
    "frozen_layers": Told(kind="weights_unchanged", at=220, within=96),
    "stale_optimizer": Told(kind="weights_unchanged", within=64),
    "identical_augmentation": Told(kind="duplicate_data", ranks=(0, 1), within=64),
    "unequal_collectives": Told(kind="hang", ranks=(1,), at=220, within=2),
}
IN_MAKE_TEST = ("raw_module", "missing_zero_grad", "identical_augmentation")


ON_GPUS = (pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices"))


@pytest.mark.parametrize("nccl", [False, pytest.param(True, marks=ON_GPUS)], ids=["gloo", "nccl"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in IN_MAKE_TEST else pytest.mark.faults) for case in CASES]
)
def test_a_silent_error_is_told_without_a_run_to_compare_with(
    start: Callable[..., Job], case: str, nccl: bool, record_property: Callable[[str, object], None]
) -> None:
    expected = TOLD[case]
    steps = expected.at + expected.within + 60
    job = start(
        *("--case", case, "--at", str(expected.at), "--steps", str(steps), *(["--nccl"] if nccl else [])),
        script=SCRIPT,
        ranks_per_node=expected.num_ranks,
    )
    found = job.wait(lambda: [one for one in job.incidents() if one["kind"] == expected.kind], expected.kind)[0]
    record_property("kind", found["kind"])
    record_property("ranks", found["ranks"])
    if not expected.seldom:
        record_property("steps", found["detected_step"] - expected.at)
    assert tuple(found["ranks"]) == expected.ranks
    assert expected.at - 1 <= found["detected_step"] <= expected.at + expected.within
    assert {one["kind"] for one in job.incidents() if one["first_step"] < expected.at - 1} == set()


def test_the_same_script_without_a_mistake_is_silent(start: Callable[..., Job]) -> None:
    job = start("--steps", "300", script=SCRIPT)
    job.ended()
    assert job.incidents() == []
