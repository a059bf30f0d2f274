"""Checkpoints of every layout that people have, loaded whole or refused with a reason."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from sosa_stream.agent.repair.loading import CheckpointError, load_checkpoint, read_checkpoint


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def save_distributed(path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": net().state_dict()}, checkpoint_id=path, no_dist=True)


def _prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in net().state_dict().items()}


LAYOUTS: dict[str, Any] = {
    "bare": lambda: net().state_dict(),
    "state_dict": lambda: {"state_dict": net().state_dict(), "epoch": 3},
    "model_state_dict": lambda: {"model_state_dict": net().state_dict(), "optimizer_state_dict": {}, "step": 3},
    "model": lambda: {"model": net().state_dict(), "config": {"width": 4}},
    "data parallel": lambda: {"state_dict": _prefixed("module.")},
    "compiled": lambda: _prefixed("_orig_mod."),
    "compiled data parallel": lambda: {"model": _prefixed("module._orig_mod.")},
    "lightning": lambda: {
        "state_dict": _prefixed("model."),
        "hyper_parameters": {"width": 4},
        "global_step": 9,
        "pytorch-lightning_version": "2.4",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_out_and_loaded_whole(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](), tmp_path / "saved.pt")
    model = net(1)
    report = load_checkpoint(tmp_path / "saved.pt", model)
    assert same(model, net())
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert report.num_loaded == len(net().state_dict())


def test_weights_saved_bare_fit_a_wrapped_model(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "saved.pt")
    wrapped = nn.Module()
    wrapped.module = net(1)
    load_checkpoint(tmp_path / "saved.pt", wrapped)
    assert same(wrapped.module, net())


@pytest.mark.parametrize("key", ["model_config", "config", "hyper_parameters", "hparams"])
def test_the_configuration_is_found_whatever_it_is_called(key: str, tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict(), key: {"width": 4}, "global_step": 7}, tmp_path / "saved.pt")
    report = load_checkpoint(tmp_path / "saved.pt", net(1))
    assert (report.config, report.step) == ({"width": 4}, 7)


def test_what_is_missing_unexpected_or_of_another_shape_is_named_and_left_alone(tmp_path: Path) -> None:
    saved = net().state_dict()
    del saved["0.bias"]
    saved["head.weight"] = torch.zeros(2)
    saved["2.weight"] = torch.zeros(5, 4)
    torch.save(saved, tmp_path / "saved.pt")
    model, untouched = net(1), net(1)
    report = load_checkpoint(tmp_path / "saved.pt", model)
    assert report.missing == ("0.bias",)
    assert report.unexpected == ("head.weight",)
    assert report.mismatched == ("2.weight: file (5, 4), model (2, 4)",)
    assert torch.equal(model.get_parameter("2.weight"), untouched.get_parameter("2.weight"))
    assert torch.equal(model.get_parameter("0.weight"), net().get_parameter("0.weight"))
    assert "missing: 0.bias" in str(report)
    with pytest.raises(CheckpointError, match="strict=True"):
        load_checkpoint(tmp_path / "saved.pt", net(1), strict=True)


def test_the_optimizers_state_comes_along_where_it_fits_and_is_told_of_where_not(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.5)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    other = net(1)
    fresh = AdamW(other.parameters(), lr=0.1)
    assert load_checkpoint(tmp_path / "saved.pt", other, fresh).notes == ()
    assert fresh.param_groups[0]["lr"] == 0.5
    assert len(fresh.state) == len(optimizer.state)
    odd = AdamW(list(other.parameters())[:2], lr=0.1)
    (note,) = load_checkpoint(tmp_path / "saved.pt", other, odd).notes
    assert "does not fit" in note
    assert odd.param_groups[0]["lr"] == 0.1


def test_weights_that_are_not_finite_are_refused_unless_they_are_wanted(tmp_path: Path) -> None:
    saved = net().state_dict()
    saved["0.weight"][0, 0] = math.nan
    torch.save(saved, tmp_path / "saved.pt")
    model = net(1)
    with pytest.raises(CheckpointError, match=r"NaN or Inf, in 0\.weight"):
        load_checkpoint(tmp_path / "saved.pt", model)
    assert same(model, net(1))
    load_checkpoint(tmp_path / "saved.pt", model, allow_nonfinite=True)
    assert model.get_parameter("0.weight").isnan().any()


def test_a_distributed_checkpoint_is_read_whole_by_one_process(tmp_path: Path) -> None:
    save_distributed(tmp_path / "last")
    model = net(1)
    assert load_checkpoint(tmp_path / "last", model).layout == "distributed"
    assert same(model, net())


def test_a_hugging_face_folder_with_shards_is_read(tmp_path: Path) -> None:
    items = list(net().state_dict().items())
    torch.save(dict(items[:3]), tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(dict(items[3:]), tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {name: f"pytorch_model-0000{1 + (i >= 3)}-of-00002.bin" for i, (name, _) in enumerate(items)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    model = net(1)
    report = load_checkpoint(tmp_path, model)
    assert same(model, net())
    assert (report.layout, report.config) == ("2 shards", {"hidden_size": 4})


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(net().state_dict()), tmp_path / "model.safetensors")
    model = net(1)
    load_checkpoint(tmp_path, model)
    assert same(model, net())


class Custom:
    """Something of the user's own."""


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "there is no checkpoint at"),
        (lambda path: path.write_bytes(b""), "no checkpoint of torch's"),
        (lambda path: path.write_bytes(b"not a checkpoint"), "no checkpoint of torch's|pickled Python objects"),
        (lambda path: path.mkdir(), "no checkpoint in"),
        (lambda path: torch.save([1, 2], path), "holds a list"),
        (lambda path: torch.save({"note": "none"}, path), "holds no tensors: its keys are note"),
        (lambda path: torch.save({"state_dict": Custom()}, path), "pickled Python objects"),
        (lambda path: torch.save({"other.weight": torch.zeros(7)}, path), "nothing in .* fits this model"),
    ],
)
def test_what_is_no_checkpoint_of_this_model_is_refused_with_a_reason(write: Any, says: str, tmp_path: Path) -> None:
    write(tmp_path / "saved.pt")
    model = net(1)
    with pytest.raises(CheckpointError, match=says):
        load_checkpoint(tmp_path / "saved.pt", model)
    assert same(model, net(1))


def test_a_distributed_checkpoint_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    save_distributed(tmp_path / "last")
    for file in (tmp_path / "last").glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no whole distributed checkpoint"):
        read_checkpoint(tmp_path / "last")
