"""What is installed from a wheel: every file that the package reads at run time, and a word on what it lacks."""

from pathlib import Path

import pytest

from perceptiondlm.common import loading
from perceptiondlm.scripts.cli import main
from perceptiondlm.training.config import load_run_config


tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package: str) -> Path:
    """Where a package lies: as declared, or below its parent's folder."""
    if package in SETTINGS["package-dir"]:
        return ROOT / SETTINGS["package-dir"][package]
    parent, _, name = package.rpartition(".")
    return folder_of(parent) / name


def test_every_folder_of_code_is_a_package():
    declared = {folder_of(name) for name in SETTINGS["packages"]} - {ROOT}
    rooms = {ROOT / folder.relative_to(ROOT).parts[0] for folder in declared}
    assert declared == {path.parent for room in rooms for path in room.rglob("__init__.py")}


def test_files_that_are_read_at_run_time_are_in_the_wheel():
    """Recipes, templates, word lists, and the metrics' scripts, which are loaded by path."""
    shipped = {
        path
        for name, patterns in SETTINGS["package-data"].items()
        for pattern in patterns
        for path in folder_of(name).glob(pattern)
    }
    folders = [
        ROOT / name
        for name in ("common", "drawn", "evaluation", "checkpoints", "data_engine", "serving", "training", "scripts")
    ]
    read = {
        path
        for folder in folders
        for kind in ("yaml", "jinja", "json", "html", "css", "js")
        for path in folder.rglob(f"*.{kind}")
        if "model" not in path.relative_to(ROOT).parts  # weights stay with a clone
    }
    read |= {ROOT / "evaluation" / name / f"{name}.py" for name in ("paradlc", "dlc")}
    assert read <= shipped


def test_the_command_outside_a_clone_says_what_to_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "REPOSITORY", tmp_path)
    scene = str(ROOT / "examples" / "scene.png")
    assert main(["caption", scene, "--boxes", "10,10,60,60"]) == 2
    assert "the installed package carries no model" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"the recipes lie in .*configs"):
        load_run_config("absent.yaml")
