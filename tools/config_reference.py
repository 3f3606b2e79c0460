"""Write docs/configuration.md from the dataclasses that read the YAML and docs/metrics.md from the table of metrics, so that the
pages cannot go stale.

python tools/config_reference.py            rewrite the pages
python tools/config_reference.py --check    fail if one is not up to date, or a key has no meaning
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = """# Configuration

Every key of the recipes' YAML, written by `tools/config_reference.py` from the dataclasses that read it. A key that is not
listed is refused, with the nearest known one. Override any of them on the command line: `model.optim.lr=1e-5`. A section that
may be null is off by default; its keys are those that it has when it is given.
"""
METRICS_PAGE = """# Metrics

Every number that a run logs, written by `tools/config_reference.py` from `recipes/run/metrics.py`: one JSON line for each step in
`metrics.jsonl` of the run's folder, and the same names in TensorBoard, Weights & Biases and MLflow where they are on.
Step 0 is the validation before the first step, in GRPO and LFTF.
`exp_manager.checkpoint_callback_params.monitor` takes any of the `val` ones.

| metric | written by | unit | meaning |
|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """A row of the page."""

    name: str
    kind: str
    default: str
    meaning: str

    def row(self) -> str:
        meaning = self.meaning.replace("|", "\\|")
        return f"| `{self.name}` | {self.kind} | {self.default} | {meaning} |"


def comments(cls: type) -> dict[str, str]:
    """The comment lines above each field, of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        for node in ast.parse("\n".join(lines)).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            above, number = [], node.lineno - 2
            while lines[number].strip().startswith("#"):
                above.insert(0, lines[number].strip(" #"))
                number -= 1
            found[node.target.id] = " ".join(above)
    return found


def default_text(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "required"
    else:
        value = field.default
    return f"`{shown(value)}`"


def shown(value: Any) -> str:
    """As YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def kind_text(hint: Any) -> str:
    """A type in YAML's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_text(a) for a in arguments)
    if origin in (list, tuple):
        return f"list of {kind_text(arguments[0])}"
    if origin is dict:
        return "mapping"
    if dataclasses.is_dataclass(hint):
        return "section"
    return {types.NoneType: "null", Any: "any", str: "text"}.get(hint) or hint.__name__


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every key that a configuration class knows, with those of its optional sections."""
    hints, notes = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name, hint = f"{prefix}{field.name}", hints[field.name]
        sections = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if hint not in sections:
            yield Key(name, kind_text(hint), default_text(field), notes.get(field.name, ""))
        for section in sections:
            yield from keys(section, f"{name}.<name>." if typing.get_origin(hint) is dict else f"{name}.")


def pages() -> dict[str, str]:
    """The text of each page, by its file in docs/."""
    sys.path.insert(0, str(ROOT))
    from recipes.registry import RECIPES
    from recipes.run.metrics import METRICS

    parts, nameless = [CONFIGURATION], []
    for script, recipe in RECIPES.items():
        found = list(keys(recipe.config_class()))
        nameless += [key.name for key in found if not key.meaning]
        table = [key.row() for key in found]
        parts += [f"\n## recipes/{script}.py\n", "| key | type | default | meaning |", "|---|---|---|---|", *table]
    if nameless:
        sys.exit(f"error: keys without a comment that says what they mean: {', '.join(sorted(set(nameless)))}")
    metrics = "".join(f"| `{name}` | {m.recipes} | {m.unit} | {m.meaning} |\n" for name, m in METRICS.items())
    return {"configuration.md": "\n".join(parts) + "\n", "metrics.md": METRICS_PAGE + metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, text in pages().items():
        path = ROOT / "docs" / name
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"error: docs/{name} is not up to date; run python tools/config_reference.py")


if __name__ == "__main__":
    main()
