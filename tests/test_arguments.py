"""The switches of a host script, on its command line and in its configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sosa_stream import SOSATrainingWrapper, add_sosa_arguments, wrap_training
from sosa_stream.agent.arguments import switches_of
from sosa_stream.errors import ConfigError, UsageError
from sosa_stream.settings import Mode


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    add_sosa_arguments(parser)
    return parser.parse_args(words)


def wrapped(config: Any, tmp_path: Any) -> SOSATrainingWrapper:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return wrap_training(model, optimizer, config=config, checkpoint_dir=tmp_path, say=lambda text: None)


@dataclass
class Section:
    enabled: bool = True
    auto_fix: bool = False
    max_fixes: int = 2


def test_arguments_reach_the_settings(tmp_path: Any) -> None:
    wrapper = wrapped(parsed("--use-sosa", "--sosa-window", "64", "--sosa-max-fixes", "5"), tmp_path)
    assert wrapper.enabled
    assert wrapper.settings.mode is Mode.AUTO
    assert wrapper.settings.detect.window_steps == 64
    assert wrapper.settings.auto.max_fixes_per_error == 5
    assert wrapped(parsed("--use-sosa", "--no-sosa-auto-fix"), tmp_path).settings.mode is Mode.SUGGEST


def test_without_the_switch_nothing_is_watched(tmp_path: Any) -> None:
    wrapper = wrapped(parsed(), tmp_path)
    assert not wrapper.enabled
    batch = torch.ones(4, 2)
    wrapper.training_step(batch, lambda model, batch: model(batch).square().mean())


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(sosa=Section()),
        SimpleNamespace(sosa=SimpleNamespace(enabled=True, auto_fix=False, max_fixes=2)),
        {"sosa": {"enabled": "true", "auto_fix": "off", "max_fixes": 2}},
        SimpleNamespace(sosa={"enabled": True, "auto_fix": False, "max_fixes": 2}),
    ],
    ids=["dataclass", "namespace", "mapping", "mixed"],
)
def test_a_section_of_a_configuration_is_read_whatever_it_is(config: Any, tmp_path: Any) -> None:
    wrapper = wrapped(config, tmp_path)
    assert wrapper.enabled
    assert wrapper.settings.mode is Mode.SUGGEST
    assert wrapper.settings.auto.max_fixes_per_error == 2


def test_what_a_section_does_not_say_stays_as_it_is(tmp_path: Any) -> None:
    assert switches_of({"sosa": {}}) == {}
    assert wrapped({"sosa": {}}, tmp_path).settings.mode is Mode.AUTO
    assert not wrapped({"sosa": False}, tmp_path).enabled
    assert switches_of({"mode": "suggest"}) is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"autofix": True}, "no 'autofix'"),
        ({"enabled": "perhaps"}, "true or false"),
        ({"window": 3.5}, "whole number"),
        ({"window": 3}, "window_steps"),
        ({"max_fixes": True}, "whole number"),
    ],
)
def test_a_switch_that_there_is_not_is_told(section: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        wrapped({"sosa": section}, tmp_path)


def test_a_configuration_that_is_none_is_told(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="section"):
        wrapped(3, tmp_path)
