"""What doctor says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_model

from engine import doctor
from engine.model_report import count_parameters


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "tiny-llama")


def test_the_report_as_text(model: Path, slipstream_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--quick", "--model", str(model)]) == 0
    said = capsys.readouterr().out
    for word in (
        "Machine",
        "Weight formats on",
        "Kernels",
        "auto picks",
        "Folders",
        str(slipstream_home),
        "torch",
    ):
        assert word in said
    assert "reads at" not in said


def test_the_report_as_json(model: Path, slipstream_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json", "--quick", "--model", str(model)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["architecture"] == "llama"
    assert report["model"]["weight_format"] in {option["name"] for option in report["formats"]}
    assert report["model"]["problem"] is None
    assert report["machine"]["ram_total"] > 0
    assert {option["name"] for option in report["kernels"]} == {"fused", "torch"}
    assert report["folders"]["cache"] == str(slipstream_home / "cache")


def test_parameters_are_those_of_transformers(model: Path) -> None:
    from tiny import build_model

    from engine.models.checkpoint import open_checkpoint

    matrices = sum(p.numel() for p in build_model().parameters() if p.dim() == 2)
    assert count_parameters(open_checkpoint(model).config) == matrices


def test_a_model_that_is_not_here(
    slipstream_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.main(["--quick", "--model", "someone/not-here"]) == 0
    assert "not on this machine" in capsys.readouterr().out


def test_a_model_that_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert doctor.main(["--quick", "--model", str(tmp_path)]) == 0
    assert "safetensors" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--help"])
    assert caught.value.code == 0 and "--json" in capsys.readouterr().out
