"""The house stands on floors: a file imports from its own floor and those below, never upwards or in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# From the top down. The model's files lie in the root of the repository, which is a model directory.
FLOORS = (
    "scripts",
    "studies",
    "training",
    "data_engine",
    "serving",
    "checkpoints",
    "evaluation",
    "drawn",
    "root",
    "common",
)


def files() -> list[Path]:
    folders = [ROOT / floor for floor in FLOORS if floor != "root"]
    return [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(("perceptiondlm", *path.relative_to(ROOT).with_suffix("").parts))


def floor_of(module: str) -> str:
    """The floor of a module of ours, `perceptiondlm.<floor>.…`."""
    name = module.split(".")[1]
    return name if name in FLOORS else "root"


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of ours that a file imports anywhere, functions included, and the line where it does."""
    package = module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("perceptiondlm."))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, (package.rsplit(".", node.level - 1)[0], base)))
            if not base.startswith("perceptiondlm"):
                continue
            for alias in node.names:  # `from package import module` names a module, too
                inner = ROOT.joinpath(*f"{base}.{alias.name}".split(".")[1:]).with_suffix(".py")
                yield (f"{base}.{alias.name}" if inner.is_file() else base), node.lineno


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_imports_run_downwards(path):
    own = FLOORS.index(floor_of(module_of(path)))
    upwards = [
        f"{path.relative_to(ROOT)}:{line} imports {module}, which stands on a floor above"
        for module, line in imports(path)
        if FLOORS.index(floor_of(module)) < own
    ]
    assert not upwards, "\n".join(upwards)


def test_no_circle_among_modules():
    """Imports for type checkers and for the remote-code loader close circles on purpose: they are never executed."""
    graph = {module_of(path): executed_imports(path) for path in files()}
    assert circle(graph) is None, " -> ".join(circle(graph))


def test_what_exists_for_the_published_weights_stands_behind_one_seam():
    """The word that marks it occurs in the root only where the seam is, and the leaf is imported there alone."""
    seam = {"configuration_perceptiondlm.py", "released_perceptiondlm.py"}
    assert {path.name for path in ROOT.glob("*.py") if "released" in path.read_text().lower()} == seam


def executed_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    guarded = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return {module for module, line in imports(path) if line not in guarded}


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path through the graph that ends where it began, or None."""
    finished: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str] | None:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in finished:
            return None
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*trail, module]):
                return found
        finished.add(module)
        return None

    return next(filter(None, (walk(module, []) for module in graph)), None)


def test_the_test_sees_what_it_looks_for():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert floor_of("perceptiondlm.training.data.mixture") == "training"
    assert floor_of("perceptiondlm.modeling_perceptiondlm") == "root"
    found = {module for module, _ in imports(ROOT / "modeling_perceptiondlm.py")}
    assert {"perceptiondlm.configuration_perceptiondlm", "perceptiondlm.processing_perceptiondlm"} <= found
