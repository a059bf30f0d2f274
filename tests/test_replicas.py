"""Which ranks are replicas is learned, and which one has left them is said only where a majority says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.optim import SGD, AdamW

from sosa_stream.agent.watch.digests import Digests
from sosa_stream.detect.replicas import Replicas
from sosa_stream.protocol.columns import DIGEST_CHUNKS, DIGEST_PARTS


def after(*digests: tuple[float, ...], owed: float = 0.0) -> Replicas:
    replicas = Replicas()
    for step, row in enumerate(digests):
        replicas.take(step, np.array(row), np.where(np.isnan(row), np.nan, 4.0), np.full(len(row), owed))
    return replicas


@pytest.mark.parametrize(
    ("row", "odd", "has_majority"),
    [
        ((3.0, 3.0, 7.0, 3.0), (2,), True),
        ((3.0, 3.0, 7.0, 7.0), (0, 1, 2, 3), False),
        ((3.0, 7.0, float("nan"), float("nan")), (0, 1), False),
    ],
)
def test_majority_names_the_odd_rank_and_without_one_all_are_named(
    row: tuple[float, ...], odd: tuple[int, ...], has_majority: bool
) -> None:
    replicas = after((1.0,) * 4, (2.0,) * 4, row)
    assert replicas.news
    assert (replicas.parted[4].odd, replicas.parted[4].has_majority) == (odd, has_majority)


@pytest.mark.parametrize(
    "history", [((1.0, 2.0), (3.0, 4.0)), ((1.0, 1.0), (1.0, 1.0), (2.0, 3.0)), ((1.0, 2.0), (3.0, 3.0), (4.0, 4.0))]
)
def test_ranks_that_never_moved_together_owe_each_other_nothing(history: tuple[tuple[float, ...], ...]) -> None:
    assert not after(*history, (5.0, 6.0)).parted


def test_equal_digests_end_it() -> None:
    assert not after((1.0, 1.0), (2.0, 2.0), (3.0, 4.0), (5.0, 5.0)).parted


def test_what_ddp_owes_is_judged_from_the_first_look_on_and_though_it_never_moves() -> None:
    assert after((1.0, 2.0), owed=1.0).never_equal
    frozen = after((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 9.0, 1.0), owed=1.0)
    assert (frozen.parted[4].odd, frozen.never_equal) == ((1,), False)


def test_a_large_model_is_looked_at_in_more_chunks_each_of_them_once_in_a_round() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(160, 160) for _ in range(20)))
    optimizer = AdamW(model.parameters())
    digests = Digests(lambda: [optimizer], 1)
    looks = [digests.take(step) for step in range(4, 104)]
    chunks = [int(columns["digest_chunk"]) for columns in looks if columns]  # there is no optimizer state yet
    num = len(set(chunks))
    assert 4 < num <= DIGEST_CHUNKS // 2
    assert sorted(chunks[num : 2 * num]) == sorted(chunks[2 * num : 3 * num]) == sorted(set(chunks))


def all_digests(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """By chunk; a round of a small model is two looks."""
    digests = Digests(lambda: [optimizer], 1)
    taken = [digests.take(step) for step in range(2)]
    return [float(columns["digest"]) for columns in taken if columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bit", [0, -1], ids=["lowest", "sign"])
def test_one_flipped_bit_changes_one_digest(dtype: torch.dtype, bit: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64).to(dtype)
    optimizer = AdamW(model.parameters())
    model(torch.randn(2, 64, dtype=dtype)).sum().backward()
    optimizer.step()
    before = all_digests(model, optimizer)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    flat = model.weight.detach().view(-1).view(width)
    flat[1000] ^= 1 if bit == 0 else torch.iinfo(width).min
    changed = [a != b for a, b in zip(before, all_digests(model, optimizer), strict=True)]
    assert sum(changed) == 1
    assert len(before) == 2


def test_rows_that_change_places_change_the_digest() -> None:
    model = torch.nn.Linear(256, 16, bias=False)
    optimizer = SGD(model.parameters(), lr=0.1)
    before = all_digests(model, optimizer)
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0))
    assert all_digests(model, optimizer) != before


def test_many_small_parameters_beside_large_ones_have_no_more_chunks_than_there_are_numbers() -> None:
    large = [torch.nn.Parameter(torch.zeros(1 << 18)) for _ in range(15)]
    small = [torch.nn.Parameter(torch.zeros(2)) for _ in range(900)]
    optimizer = SGD([*large, *small], lr=0.1)
    digests = Digests(lambda: [optimizer], 1)
    looks = [digests.take(step) for step in range(4, 104)]
    assert max(columns["digest_chunk"] for columns in looks if columns) < DIGEST_CHUNKS


def test_another_part_of_a_table_of_each_rank_s_own_has_not_moved() -> None:
    table = torch.nn.Parameter(torch.randn(4 << 18))
    optimizer = SGD([table], lr=0.1)
    digests, replicas = Digests(lambda: [optimizer], 1), Replicas()
    for step in range(4, 40):
        if columns := digests.take(step):
            value = float(columns["digest"])
            is_last = columns["digest_chunk"] >= 3 * DIGEST_PARTS  # where ranks have used different rows
            row = np.array([value, value + is_last])
            replicas.take(step, row, np.full(2, columns["digest_chunk"]), np.zeros(2))
    assert not replicas.parted


def test_counters_move_no_state() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    before = all_digests(model, optimizer)
    for state in optimizer.state.values():
        state["step"] += 1
    assert all_digests(model, optimizer) == before


def test_other_optimizers_begin_anew() -> None:
    replicas = after((1.0, 1.0), (2.0, 2.0), (3.0, 4.0))
    assert replicas.parted
    replicas.take(3, np.array([5.0, 6.0]), np.full(2, 4.0 + DIGEST_CHUNKS), np.zeros(2))
    assert not replicas.parted


def test_a_new_set_of_optimizers_has_chunks_of_its_own() -> None:
    first, second = (SGD(torch.nn.Linear(4, 4).parameters(), lr=0.1) for _ in range(2))
    known = [first]
    digests = Digests(lambda: known, 1)
    assert digests.take(0)["digest_chunk"] == 0.0
    known.append(second)
    assert digests.take(2)["digest_chunk"] == DIGEST_CHUNKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_digest_is_that_of_the_same_bits_on_a_cpu_and_makes_nobody_wait() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    on_cpu = Digests(lambda: [SGD(model.parameters(), lr=0.1)], 1).take(0)["digest"]
    model.cuda()
    optimizer = SGD(model.parameters(), lr=0.1)
    digests = Digests(lambda: [optimizer], 1)
    digests.take(0)  # its weights are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = digests.take(2)["digest"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(on_gpu) == int(on_cpu)
