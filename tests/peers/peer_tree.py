"""A source distribution of transformers made ready to run its common tests on this project's classes."""

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


ROOT = Path(__file__).parents[2]
SUITES = Path(__file__).parent / "suites"
COMMON = ("test_modeling_common.py", "test_configuration_common.py", "test_processing_common.py")
# What the common tests import and the source distribution leaves out. The mixins in it test autoregressive generation
# and export to other runtimes.
LEFT_OUT = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url, return_url_if_not_found=True):\n    return url\n",
    "tests/utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, '
        '"dtype": "float16", "chunk_size_feed_forward": 3, "id2label": {0: "a"}, "label2id": {"a": 0}}\n'
    ),
}


def download(version: str, folder: Path) -> Path:
    """Fetch transformers' source distribution of a version with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-binary", ":all:", "--dest", folder, f"transformers=={version}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def unpack(archive: Path, folder: Path) -> Path:
    """The top folder of a .tar.gz, unpacked into a folder."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if (path / "PKG-INFO").is_file())


def version_of(sdist: Path) -> str:
    """The version that an unpacked source distribution names."""
    lines = (sdist / "PKG-INFO").read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("Version: ") for line in lines if line.startswith("Version: "))


def plant(sdist: Path, tree: Path) -> Path:
    """Lay out the common tests, what they import, and this project's suites; returns the folder of the suites."""
    models = tree / "tests" / "models" / "perceptiondlm"
    models.mkdir(parents=True)
    for name, text in LEFT_OUT.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in COMMON:
        shutil.copy(sdist / "tests" / name, tree / "tests" / name)
    for suite in SUITES.glob("*.py"):
        shutil.copy(suite, models / f"test_{suite.stem}_perceptiondlm.py")
    for folder in [tree / "tests", *(path for path in (tree / "tests").rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    return models


def run(tree: Path, suites: Path) -> dict[str, tuple[str, str]]:
    """Run the suites in a process of their own: `Class.test` to its outcome and the first line of its message.

    Outcomes are "passed", "failed" and "skipped".
    """
    report = tree / "report.xml"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "utils"))),
        "PERCEPTIONDLM_ROOT": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={tree}", *options, str(suites)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if not report.is_file():
        raise RuntimeError(f"the suites ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {name: outcome for case in ElementTree.parse(report).iter("testcase") for name, outcome in [_read(case)]}


def _read(case: ElementTree.Element) -> tuple[str, tuple[str, str]]:
    name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            return name, (outcome, (found.get("message") or "").split("\n")[0][:300])
    return name, ("passed", "")
