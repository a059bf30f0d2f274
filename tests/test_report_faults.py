"""Seven real trainings, each broken in another way: the page that a browser shows names what was broken, and when."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from browser import visit

from sosa_stream.cli import main

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
centers = torch.randn(10, 32)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(400):
    labels = torch.randint(10, (64,))
    inputs = centers[labels] + torch.randn(64, 32)
    scale = 1.0
    if step >= 200:
        pass  # what breaks it
    loss = scale * nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize(
    ("inject", "damage", "kinds"),
    [
        pytest.param("lr_jump@200:factor=1000", "pass", {"lr_jump"}, id="learning rate"),
        pytest.param("nan_batch@200", "pass", {"nan_loss", "nonfinite_gradient", "input_anomaly"}, id="nan"),
        pytest.param("", "inputs[:, 7] *= 1e4", {"input_anomaly", "exploding_gradient", "loss_spike"}, id="feature"),
        pytest.param("", "scale = 1e4", {"exploding_gradient", "loss_spike"}, id="loss scale"),
        pytest.param("", "scale = 0.0", {"loss_plateau"}, id="no loss"),
        pytest.param("", "optimizer.param_groups[0]['maximize'] = True", {"loss_divergence"}, id="ascent"),
        pytest.param("", "labels = torch.randint(10, (64,))", {"loss_spike", "exploding_gradient"}, id="labels"),
    ],
)
def test_the_page_names_what_was_broken(inject: str, damage: str, kinds: set[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.replace("pass  # what breaks it", damage))
    env = {name: value for name, value in os.environ.items() if not name.startswith("SOSA_")}
    env |= {"SOSA_HOME": str(tmp_path / "home"), "SOSA_RUN": "one", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sosa_stream.agent", *(["--inject", inject] if inject else []), "train.py"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    assert main(["report", str(tmp_path / "home" / "one" / "run.sosa"), "--out", str(tmp_path / "out")]) == 0
    shown = visit(tmp_path / "out" / "report.html", tmp_path)
    sentence = html.unescape(re.search(r"<h1>([^<]*)</h1>", shown.dom)[1])  # type: ignore[index]
    assert sentence.split()[0] in kinds, sentence
    assert 200 <= int(re.search(r"step (\d+)", sentence)[1]) <= 300  # type: ignore[index]
    assert (shown.console, shown.requests) == ((), ())
