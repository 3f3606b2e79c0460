"""Rooms import one way only, in megatron_ext and in recipes, and megatron_ext needs no framework of a recipe's."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imported import imported_modules

ROOT = Path(__file__).parents[2]
# In the order of CONTRIBUTING.md: a room may import only from rooms above it.
ROOMS = (
    "errors", "files", "kinds", "ports", "devices", "prefix_tree", "grouping", "flops", "packing", "attention", "rotary",
    "losses", "bias", "adapters", "runtime", "vision", "models", "blocks", "hf", "vllm_servers", "rollouts", "planner",
)  # fmt: skip
# What these import of megatron_ext, themselves apart. The rooms after them may import from any room above.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "kinds": set(),
    "ports": {"errors"},
    "devices": set(),
    "prefix_tree": {"errors"},
    "grouping": {"errors", "prefix_tree"},
    "flops": {"errors", "prefix_tree"},
    "packing": {"errors", "flops"},
    "attention": {"errors", "devices", "prefix_tree", "grouping"},
    "rotary": {"errors"},
    "losses": {"errors", "devices"},
    "bias": {"errors"},
    "adapters": {"errors", "kinds"},
    "vllm_servers": {"errors", "files", "ports"},
}
# The rooms of recipes. Algorithms do not know each other; scripts and planning know all of them.
RECIPE_ROOMS = ("registry", "cli", "data", "environments", "rewards", "run")
ALGORITHMS = ("sft", "grpo", "bias", "niah", "video_eval")
FOREIGN = {
    "nemo",
    "nemo_toolkit",
    "hydra",
    "lightning",
    "pytorch_lightning",
    "omegaconf",
    "recipes",
    "launch",
    "tools",
    "tests",
}

OWN = ("megatron_ext", "recipes", "launch", "tools", "tests")

FILES = sorted(p for package in ("megatron_ext", "recipes") for p in (ROOT / package).rglob("*.py"))
files = pytest.mark.parametrize("path", FILES, ids=[p.relative_to(ROOT).as_posix() for p in FILES])


def room_of(path: Path, root: Path = ROOT) -> tuple[str, str]:
    """(package, room)."""
    package, room, *_ = path.relative_to(root).parts
    return package, room.removesuffix(".py")


def rooms_imported(path: Path, root: Path = ROOT) -> set[tuple[str, str]]:
    """Rooms of both packages but the file's own."""
    modules = (m.split(".") for m in imported_modules(path, root))
    return {(m[0], m[1]) for m in modules if m[0] in ("megatron_ext", "recipes") and len(m) > 1} - {room_of(path, root)}


def allowed(package: str, room: str) -> set[tuple[str, str]] | None:
    """The rooms that a room may import; None: all."""
    library = {("megatron_ext", name) for name in ROOMS}
    if package == "megatron_ext":
        known = ALLOWED.get(room, ROOMS[: ROOMS.index(room)] if room in ROOMS else ())
        return {("megatron_ext", name) for name in known}
    if room in (*RECIPE_ROOMS, *ALGORITHMS):
        above = RECIPE_ROOMS[: RECIPE_ROOMS.index(room)] if room in RECIPE_ROOMS else RECIPE_ROOMS
        return library | {("recipes", name) for name in above}
    return None


def misplaced(path: Path, root: Path = ROOT) -> set[tuple[str, str]]:
    """Rooms that a file imports and may not."""
    may = allowed(*room_of(path, root))
    return set() if may is None else rooms_imported(path, root) - may


@files
def test_rooms_import_one_way(path: Path):
    package, room = room_of(path)
    if room == "__init__":
        assert not rooms_imported(path)
        return
    if package == "megatron_ext":
        assert room in ROOMS, f"{room} is not in the list of rooms: add it to CONTRIBUTING.md and here"
    elif path.parent != ROOT / "recipes":
        assert room in (*RECIPE_ROOMS, *ALGORITHMS), f"recipes/{room} is no known room: see CONTRIBUTING.md"
    assert not misplaced(path), f"{path.name} imports from rooms that it may not"


@files
def test_nothing_below_imports_what_is_above_the_recipes(path: Path):
    foreign = FOREIGN if room_of(path)[0] == "megatron_ext" else {"launch", "tools", "tests"}
    assert not {m.split(".")[0] for m in imported_modules(path)} & foreign


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
    if path.parent == ROOT / "recipes" and any(isinstance(n, ast.If) for n in body):  # a script
        return
    defined = {n.name for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))} | set(
        names
    )
    assert "__all__" in names, f"{path.name} has no __all__"
    exported = ast.literal_eval(names["__all__"])
    annotated = {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(exported) <= defined | annotated


def test_contributing_tells_the_rooms_and_what_they_import():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `megatron_ext/(\w+)(?:\.py|/)` \| .+ \| (.+) \|$", text, re.M)
    assert tuple(room for room, _ in rows) == ROOMS
    for room, imports in rows:
        told = set(re.findall(r"\w+", imports)) & set(ROOMS)
        assert told == ALLOWED[room] - {"errors"} if room in ALLOWED else imports == "all above", room


def test_what_tests_share_is_in_no_file_of_tests():
    shared = {
        (path.name, module)
        for path in (ROOT / "tests").rglob("*.py")
        for module in imported_modules(path)
        if module.startswith("tests.") and module.rpartition(".")[2].startswith("test_")
    }
    assert not shared


def test_no_two_classes_have_one_name():
    """One word, one thing."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_whatever_is_imported_from_our_own_is_there():
    """Also by tools that no test starts."""
    known = {
        ("tools/bench_rollouts.py", "megatron_ext.models.generation")
    }  # of the older checkout that it measures beside this
    paths = [p for package in OWN for p in (ROOT / package).rglob("*.py")]
    missing = {(path.relative_to(ROOT).as_posix(), name) for path in paths for name in imports_of_nothing(path)}
    assert missing == known


def imports_of_nothing(path: Path) -> Iterator[str]:
    """`from module import name` where one of ours has no such module or name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        places = [base.joinpath(*node.module.split(".")) for base in (ROOT, path.parent)]
        found = [f for place in places for f in (place.with_suffix(".py"), place / "__init__.py", place) if f.exists()]
        if found:
            within = found[0].parent if found[0].name == "__init__.py" else found[0]
            here = names_in(found[0]) | ({p.stem for p in within.iterdir()} if within.is_dir() else set())
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name not in here)
        elif node.module.partition(".")[0] in OWN:
            yield node.module


@functools.cache
def names_in(path: Path) -> set[str]:
    """That a module has, or any function in it."""
    if path.is_dir():
        return set()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_an_import_of_nothing_is_found(tmp_path: Path):
    (tmp_path / "beside.py").write_text("def there(): ...\nONE = 1\n")
    source = "from beside import there, ONE, gone\nfrom megatron_ext.vision import Pixels, settings, Nobody\n"
    (tmp_path / "user.py").write_text(source + "from recipes.nowhere import x\nfrom torch import anything\n")
    said = ["beside.gone", "megatron_ext.vision.Nobody", "recipes.nowhere"]
    assert list(imports_of_nothing(tmp_path / "user.py")) == said


def test_runtime_imports_nothing_by_itself():
    """install_check lives there and must run before Megatron is imported."""
    assert not imported_modules(ROOT / "megatron_ext" / "runtime" / "__init__.py")
    assert not imported_modules(ROOT / "megatron_ext" / "__init__.py")


def test_the_walk_sees_every_kind_of_import(tmp_path: Path):
    """Guards the tests above: files full of forbidden imports are caught whole."""
    path = tmp_path / "megatron_ext" / "losses" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import megatron_ext.attention.plan\n"
        "from megatron_ext import rotary\n"
        "from megatron_ext.models.gpt import build_gpt\n"
        "from ..runtime import engine\n"
        "from . import logprobs\n"
        "from recipes import data\n"
        "def f():\n    import nemo.utils\n"
    )
    library = {("megatron_ext", room) for room in ("attention", "rotary", "models", "runtime")}
    assert misplaced(path, tmp_path) == library | {("recipes", "data")}
    assert "nemo.utils" in imported_modules(path, tmp_path)


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("registry", "from recipes.cli import launch", "cli"),
        ("cli", "from recipes.data.rows import Prompt", "data"),
        ("data", "def f():\n    from ..run import session", "run"),
        ("run", "import recipes.grpo.trainer", "grpo"),
        ("sft", "from recipes.grpo.batches import in_parts", "grpo"),
        ("bias", "from recipes import planning", "planning"),
        ("grpo", "from recipes import train_grpo", "train_grpo"),
    ],
)
def test_an_arrow_upwards_among_recipes_is_caught(tmp_path: Path, room: str, source: str, found: str):
    path = tmp_path / "recipes" / room / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(source + "\nfrom megatron_ext.models import build_gpt\nfrom recipes.cli.config import build\n")
    assert misplaced(path, tmp_path) == {("recipes", found)}
