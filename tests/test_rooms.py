"""Each room imports only from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dst"

# From the bottom to the top: a room imports from itself and from what stands before it.
ORDER = [
    "errors",
    "checkpoints",
    "tables",
    "kernels",
    "nn",
    "topology",
    "pieces",
    "method",
    "methods",
    "planning",
    "backends",
    "engine",
    "metrics",
    "models",
    "data",
    "report",
    "lightning",
    "cli",
]
# What stands aside: public names of what is above, or nothing but names.
ASIDE = {"", "moved", "types", "allocation", "amounts", "init", "patterns", "perturbations", "redistribute"}
ASIDE |= {"relaxations", "schedules", "scores"}

# Low-level arithmetic that the kernels' fallback and the sparse modules share with the engine.
ALLOWED = {("kernels", "dst.topology.selection"), ("nn", "dst.topology.selection")}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[str]:
    """What a file imports of the package, as dotted modules; what only type checkers see is left out."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dst":
            found += [f"{node.module}.{name.name}" for name in node.names] if node.module == "dst" else [node.module]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("dst.")]
    return found


@pytest.mark.parametrize("room", ORDER)
def test_a_room_knows_only_what_is_below(room: str) -> None:
    single = PACKAGE / f"{room}.py"
    for path in [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py")):
        for module in imports(path):
            other = room_of(module)
            allowed = other in ASIDE or ORDER.index(other) <= ORDER.index(room)
            allowed = allowed or any(room == r and module.startswith(m) for r, m in ALLOWED)
            assert allowed, f"{path.relative_to(PACKAGE.parent)} imports {module}"


def test_every_module_is_in_a_room() -> None:
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.suffix in (".py", "")}
    assert found - {"py", "conf"} == {*ORDER, *ASIDE} - {""}


def test_lightning_and_hydra_stay_at_the_top() -> None:
    heavy = {"lightning", "pytorch_lightning", "hydra", "wandb"}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("lightning", "cli", "data", "models"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not heavy & {name.split(".")[0] for name in names}, path
