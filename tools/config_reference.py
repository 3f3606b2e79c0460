"""Write docs/configuration.md from the dataclasses that read the YAML, so that the page cannot go stale.

python tools/config_reference.py            rewrite the page
python tools/config_reference.py --check    fail if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
HEAD = """# Configuration

Every key of the recipes' YAML, written by `tools/config_reference.py` from the dataclasses that read it. A key that is not
listed is refused, with the nearest known one. Override any of them on the command line: `model.optim.lr=1e-5`.
`exp_manager` is handed to NeMo's own `exp_manager`; `exp_manager.explicit_log_dir` names the run's folder and must be new.
"""


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
        return ""
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}`"


def rows(cls: type, prefix: str) -> list[str]:
    hints, notes, table = typing.get_type_hints(cls), comments(cls), []
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            table += rows(hint, f"{key}.")
        else:
            kind = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
            note = notes.get(field.name, "").replace("|", "\\|")
            table.append(f"| `{key}` | {kind.replace('|', 'or')} | {default_text(field)} | {note} |")
    return table


def page() -> str:
    sys.path.insert(0, str(ROOT))
    from recipes.registry import RECIPES

    parts = [HEAD]
    for script, recipe in RECIPES.items():
        table = rows(recipe.config_class(), "")
        parts += [f"\n## recipes/{script}.py\n", "| key | type | default | meaning |", "|---|---|---|---|", *table]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("error: docs/configuration.md is not up to date; run python tools/config_reference.py")


if __name__ == "__main__":
    main()
