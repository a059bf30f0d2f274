"""A VAE's code from its checkpoint: one that is in use and one that collapsed are told apart."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch
import vaes

from sosa_stream.cli import main
from sosa_stream.report.latent import Latent, encode

PICTURES = {
    "posterior_collapse_analysis.png",
    "latent_projection.png",
    "latent_correlation.png",
    "reconstruction_errors.png",
}


@pytest.fixture(scope="module")
def healthy() -> vaes.VAE:
    return vaes.trained(beta=0.5)


@pytest.fixture(scope="module")
def collapsed() -> vaes.VAE:
    return vaes.trained(beta=200.0)


def asked(checkpoint: Path, out: Path, *more: str) -> list[str]:
    data = ["--model", "vaes:make_model", "--data", "vaes:batches"]
    return ["latent", str(checkpoint), *data, "--out", str(out), *more]


def test_a_code_in_use_and_a_collapsed_one_are_told_apart(healthy: vaes.VAE, collapsed: vaes.VAE) -> None:
    used, lost = (encode(model, vaes.batches()) for model in (healthy, collapsed))
    assert not used.is_collapsed
    assert used.is_active.sum() >= 4
    assert lost.is_collapsed
    assert lost.is_active.sum() == 0
    assert used.errors is not None
    assert used.shuffled_errors is not None
    assert lost.errors is not None
    assert lost.shuffled_errors is not None
    assert used.shuffled_errors.mean() > 10 * used.errors.mean(), "the decoder listens"
    assert lost.shuffled_errors.mean() < 1.1 * lost.errors.mean(), "the decoder does not"


def test_the_variance_of_the_posterior_is_1_where_it_collapsed(collapsed: vaes.VAE) -> None:
    found = encode(collapsed, vaes.batches())
    assert np.exp(found.log_variances).mean() == pytest.approx(1.0, abs=0.1)


def test_kl_and_active_units_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    means = rng.standard_normal((5000, 3)) * [1.0, 0.05, 0.0]
    logs = np.full((5000, 3), math.log(0.25))
    found = Latent(means=means, log_variances=logs)
    assert found.is_active.tolist() == [True, False, False]
    fixed = 0.5 * (0.25 - 1.0 - math.log(0.25))
    assert found.divergences == pytest.approx([0.5 + fixed, 0.00125 + fixed, fixed], rel=0.05)
    places, shares = found.projection()
    assert np.abs(np.corrcoef(places[:, 0], means[:, 0])[0, 1]) > 0.999
    assert shares[0] > 0.99


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("state_dict", "hyper_parameters"),
        ("model_state_dict", "config"),
        ("model", "model_config"),
        ("module", "hparams"),
        (None, ""),
    ],
)
def test_any_keys_of_a_checkpoint_will_do(
    key: str | None,
    config: str,
    healthy: vaes.VAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sosa_stream.report.latent_pictures.draw_latent", lambda *_: [])  # drawn below
    state = {f"module.{name}": value for name, value in healthy.state_dict().items()}  # as DDP saves it
    torch.save(state if key is None else {key: state, config: {"dims": vaes.NUM_DIMS}}, tmp_path / "vae.pt")
    arguments = asked(tmp_path / "vae.pt", tmp_path / "out", "--json", "--samples", "128")
    if key is None:
        arguments[arguments.index("vaes:make_model")] = "vaes:default_model"
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []


def test_the_report_and_its_pictures_are_left(
    collapsed: vaes.VAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": collapsed.state_dict(), "hparams": {"dims": vaes.NUM_DIMS}}, tmp_path / "vae.pt")
    assert main(asked(tmp_path / "vae.pt", tmp_path / "out")) == 3, "collapsed"
    assert "collapsed: 0 of 8 latent dimensions are active" in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "latent_report.json").read_text())
    assert set(told["pictures"]) == PICTURES
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    assert (told["collapsed"], told["active_units"], len(told["kl_by_dim"])) == (True, 0, 8)


class Half(vaes.VAE):
    """It does not decode what is asked, and tells its code in a dictionary."""

    decode = None  # type: ignore[assignment]
    decoder = None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        mu, logvar = self.encode(x)
        return {"mu": mu, "logvar": logvar, "recon": x}


def test_models_tell_their_code_in_several_ways(healthy: vaes.VAE) -> None:
    half = Half.__new__(Half)
    half.__dict__.update(healthy.__dict__)
    expected = encode(healthy, vaes.batches())
    found = encode(half, vaes.batches())
    assert np.allclose(found.means, expected.means)
    assert np.allclose(found.log_variances, expected.log_variances)

    class Listing(vaes.VAE):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
            out, mu, logvar = super().forward(x)
            return [out, x.flatten(1), mu, logvar]

    listing = Listing.__new__(Listing)
    listing.__dict__.update(healthy.__dict__)
    assert np.allclose(encode(listing, vaes.batches()).means, expected.means)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("vaes:make_model", "vaes:nothing"), "module vaes has no nothing"),
        (("vaes:make_model", "nothing"), "write MODULE:NAME"),
        (("vaes:make_model", "no_such_module:x"), "module no_such_module failed"),
        (("vaes:make_model", "vaes:NUM_DIMS"), "not a torch.nn.Module"),
        (("vaes:batches", "vaes:NUM_DIMS"), "not batches"),
        (("vaes:batches", "vaes:trained"), "needs beta"),
    ],
)
def test_a_mistake_is_one_line(
    change: tuple[str, str], said: str, healthy: vaes.VAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": healthy.state_dict(), "hparams": {"dims": vaes.NUM_DIMS}}, tmp_path / "vae.pt")
    arguments = [change[1] if each == change[0] else each for each in asked(tmp_path / "vae.pt", tmp_path / "out")]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_what_would_run_code_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": vaes.VAE()}, tmp_path / "vae.pt")  # a pickled object
    assert main(asked(tmp_path / "vae.pt", tmp_path / "out")) != 0
    assert "could run code" in capsys.readouterr().err
