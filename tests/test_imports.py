"""Imports run one way (DESIGN §1), every module can be imported, and the command line imports nothing heavy."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "blipdiff_train"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

LAYERS = [
    ("common",),
    ("models", "losses", "context"),
    ("data", "checkpoints"),
    ("stages", "inference", "prepare"),
    ("evaluation",),
    ("build",),
    ("train", "doctor", "commands", "ui"),
    ("__main__",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

WITHIN_A_LAYER = {
    ("stages", "stages"),
    ("inference", "inference"),
    ("commands", "doctor"),
    # what is read and what is written are one format
    ("data", "data"),
    ("checkpoints", "checkpoints"),
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names below the package that a module imports, at any place in it, annotations left out."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("blipdiff_train"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("blipdiff_train")}
    return found


def targets(path: Path) -> set[str]:
    return {
        name.split(".")[1]
        for name in imports(path)
        if "." in name and not name.startswith("blipdiff_train.__version")
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    part = part_of(path)
    if part == "__init__":
        assert not targets(path)
        return
    for target in targets(path) - {part, "config"}:
        assert target in LEVEL, f"{path}: {target} has no place among the layers"
        below = LEVEL[target] < LEVEL.get(part, -1)
        assert below or (part, target) in WITHIN_A_LAYER, f"{path.name} of {part} imports {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_config_is_seen_from_above_only(path):
    if "config" in targets(path):
        assert part_of(path) in ("build", "train", "doctor", "commands", "__main__")


def test_stages_do_not_import_each_other():
    for path in (PACKAGE / "stages").glob("stage*.py"):
        others = {name for name in imports(path) if name.startswith("blipdiff_train.stages.stage")}
        assert not others, path


def test_losses_see_tensors_only():
    for path in (PACKAGE / "losses").glob("*.py"):
        assert targets(path) <= {"losses", "common"}, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_can_be_imported(path):
    if path.name == "__main__.py":
        return
    words = path.relative_to(PACKAGE.parent).with_suffix("").parts
    importlib.import_module(".".join(word for word in words if word != "__init__"))


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "pytorch_lightning", "diffusers", "transformers"]
    code = (
        "import sys; from blipdiff_train.__main__ import main; "
        "assert main(['--help']) == 0; assert main(['generate', '--help']) == 0; assert main(['tran']) == 2; "
        f"bad = [name for name in {heavy} if name in sys.modules]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=PACKAGE.parent)
