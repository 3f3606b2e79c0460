"""The rooms of megatron_ext import one way only, and nothing in it needs a recipe's frameworks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_ext"
# In the order of CONTRIBUTING.md: a room may import only from rooms above it.
ROOMS = (
    "prefix_tree", "grouping", "flops", "packing", "attention", "rotary", "losses", "bias", "runtime", "models", "planner",
)  # fmt: skip
# What these import of megatron_ext, themselves apart. The rooms after them may import from any room above.
ALLOWED = {
    "prefix_tree": set(),
    "grouping": {"prefix_tree"},
    "flops": {"prefix_tree"},
    "packing": {"flops"},
    "attention": {"prefix_tree", "grouping"},
    "rotary": set(),
    "losses": set(),
    "bias": set(),
}
FOREIGN = {"nemo", "nemo_toolkit", "hydra", "lightning", "pytorch_lightning", "omegaconf", "recipes", "tools", "tests"}

FILES = sorted(p for p in PACKAGE.rglob("*.py"))
NAMES = [p.relative_to(PACKAGE).as_posix() for p in FILES]
files = pytest.mark.parametrize("path", FILES, ids=NAMES)


def imported_modules(path: Path) -> set[str]:
    """Every module named by an import statement anywhere in the file, those inside functions included."""
    package = ["megatron_ext", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found.add(module)
            if module == "megatron_ext":  # `from megatron_ext import models` names the room after the import
                found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(path: Path) -> set[str]:
    modules = (m.split(".") for m in imported_modules(path))
    return {m[1] for m in modules if m[0] == "megatron_ext" and len(m) > 1}


@files
def test_rooms_import_one_way(path: Path):
    room = room_of(path)
    imported = rooms_imported(path) - {room}
    if room == "__init__":
        assert not imported
        return
    assert room in ROOMS, f"{room} is not in the list of rooms: add it to CONTRIBUTING.md and here"
    allowed = ALLOWED.get(room, set(ROOMS[: ROOMS.index(room)]))
    assert imported <= allowed, f"{path.name} imports {sorted(imported - allowed)} from a room it may not"


@files
def test_nothing_imports_a_recipes_framework(path: Path):
    top_level = {m.split(".")[0] for m in imported_modules(path)}
    assert not top_level & FOREIGN


@files
def test_public_modules_name_what_they_export(path: Path):
    """`__all__` in every public module, naming things that are there; `__init__.py` holds imports only."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert ast.get_docstring(ast.Module(body, [])), f"{path.name} has no docstring"
    names: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            names.update({t.id: node.value for t in node.targets if isinstance(t, ast.Name)})
    if path.name == "__init__.py":
        others = [n for n in body[1:] if not isinstance(n, (ast.Import, ast.ImportFrom, ast.Assign))]
        assert not others and set(names) <= {"__all__", "__version__"}
        return
    defined = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))} | set(names)
    assert "__all__" in names, f"{path.name} has no __all__"
    exported = ast.literal_eval(names["__all__"])
    annotated = {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(exported) <= defined | annotated


def test_runtime_imports_nothing_by_itself():
    """install_check lives there and must run before Megatron is imported."""
    assert not imported_modules(PACKAGE / "runtime" / "__init__.py")
    assert not imported_modules(PACKAGE / "__init__.py")


def test_the_walk_sees_every_kind_of_import(tmp_path: Path, monkeypatch):
    """Guards the tests above: a file full of forbidden imports is caught whole."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    path = tmp_path / "losses" / "bad.py"
    path.parent.mkdir()
    path.write_text(
        "import megatron_ext.attention.plan\n"
        "from megatron_ext import rotary\n"
        "from megatron_ext.models.gpt import build_gpt\n"
        "from ..runtime import engine\n"
        "from . import logprobs\n"
        "def f():\n    import nemo.utils\n"
    )
    assert rooms_imported(path) == {"attention", "rotary", "models", "runtime", "losses"}
    assert "nemo.utils" in imported_modules(path)
