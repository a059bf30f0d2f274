"""The posterior panel shows what a VAE's run recorded, and says what it did not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from test_compare import incident, story
from test_pairing import curve, falling

from sosa_stream.cli import main
from sosa_stream.report.posterior import draw_posterior, verdict
from sosa_stream.report.story import Story


def vae(active: float, divergence: float) -> Story:
    """A run of 900 steps whose code was looked at every 10."""
    looks = 90
    curves = {
        "kl_per_dim": curve(np.linspace(1.0, divergence, looks), every=10),
        "active_units": curve(np.round(np.linspace(8.0, active, looks)), every=10),
        "latent_dims": curve(np.full(looks, 8.0), every=10),
    }
    told = story("vae", falling(0))
    return replace(told, curves={**told.curves, **curves})


def test_runs_without_a_posterior_have_no_panel(tmp_path: Path) -> None:
    assert not draw_posterior(tmp_path / "posterior.png", story("plain", falling(0)))
    assert not (tmp_path / "posterior.png").exists()


@pytest.mark.parametrize("reconstruction", [True, False])
def test_a_panel_is_drawn_whatever_is_missing(reconstruction: bool, tmp_path: Path) -> None:
    told = vae(8.0, 0.9)
    if reconstruction:
        told = replace(told, curves={**told.curves, "log/recon_loss": curve(falling(1))})
    for missing in ("", "loss") if reconstruction else ("kl_per_dim", "active_units"):
        curves = {name: each for name, each in told.curves.items() if name != missing}
        assert draw_posterior(tmp_path / "posterior.png", replace(told, curves=curves))
        assert (tmp_path / "posterior.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_with_our_own_names_is_a_vaes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i},{3 / (1 + i):.6f},{0.5 if i < 100 else 0.001},{12 if i < 100 else 0},16" for i in range(400)]
    (tmp_path / "vae.csv").write_text("\n".join(["step,loss,kl_per_dim,active_units,latent_dims", *rows]))
    assert main(["report", str(tmp_path / "vae.csv")]) == 0
    assert capsys.readouterr().out.startswith("posterior_collapse at step ")


def test_the_verdict_is_that_of_the_detector_and_else_of_the_last_look() -> None:
    assert verdict(vae(7.0, 0.9)) == "not collapsed, 88% of the latent dimensions active"
    assert "not yet for long enough" in verdict(vae(0.0, 0.001))
    told = replace(vae(0.0, 0.001), incidents=(incident("posterior_collapse", 500),))
    assert verdict(told) == "collapsed at step 500"
    assert verdict(story("plain", falling(0))) == "whether it collapsed cannot be told"
