"""The project's own files agree with each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import launch

ROOT = Path(launch.ROOT)


def front_matter() -> dict[str, str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block is not None
    return dict(re.findall(r"^(\w+): *(.*)$", block[1], re.MULTILINE))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_launch_reads_pyproject_as_a_toml_reader_does() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert launch.requirements() == project["dependencies"]
    for extra, pins in project["optional-dependencies"].items():
        assert launch.requirements(extra) == pins


def test_every_dependency_is_pinned_exactly() -> None:
    for name in ("dependencies", "dev", "peers"):
        for pin in launch.requirements(name):
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+(; .+)?", pin), pin


def test_the_requirements_of_the_space_are_those_of_the_project() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "--"))]
    assert pins == launch.requirements()


def test_the_front_matter_is_what_a_space_needs() -> None:
    fields = front_matter()
    assert fields["sdk"] == "gradio"
    assert f"gradio=={fields['sdk_version']}" in launch.requirements()
    assert fields["python_version"].strip("'\"") in ("3.10", "3.11", "3.12", "3.13")
    assert (ROOT / fields["app_file"]).is_file()
    assert 0 < len(fields["short_description"]) <= 60  # the hub's limit


def test_the_readme_names_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Files\n(.*?)(\n## |\Z)", text, re.DOTALL)
    assert block is not None
    named = re.findall(r"^\| `([^`]+)` \|", block[1], re.MULTILINE)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
    tracked = subprocess.run(
        ["git", "ls-files", "engine/*.py", "app/*.py", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    modules = {name for name in tracked if name.startswith(("engine/", "app/")) and "__init__" not in name}
    covered = {
        name
        for name in modules
        for entry in named
        if name == entry or name.startswith(entry.rstrip("/") + "/")
    }
    assert sorted(modules - covered) == []


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "python3 launch.py lint" in script and "python3 launch.py test" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python launch.py\n" in readme and "python launch.py test" in readme


def test_the_launchers_are_runnable() -> None:
    folder = ROOT / "assets" / "launchers"
    command = folder / "Slipstream.command"
    assert command.stat().st_mode & 0o111 and command.read_bytes().startswith(b"#!/bin/sh\n")
    assert subprocess.run(["sh", "-n", str(command)], check=False).returncode == 0
    batch = (folder / "Slipstream.bat").read_bytes()
    assert b"launch.py" in batch and batch.count(b"\r\n") == batch.count(b"\n")
    png = (ROOT / "assets" / "icons" / "slipstream.png").read_bytes()
    assert png.startswith(b"\x89PNG") and png[16:24] == (256).to_bytes(4, "big") * 2


def test_the_results_in_the_readme_are_those_of_the_reports() -> None:
    from engine.evaluation.readme import fill

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == fill(text, ROOT / "assets" / "results")
    assert "tokens a round" in text


def test_the_tables_of_the_findings_are_those_of_the_reports() -> None:
    from engine.evaluation.readme import fill_findings

    results = ROOT / "assets" / "results"
    text = (results / "README.md").read_text(encoding="utf-8")
    assert text == fill_findings(text, results)
