"""What a file imports, read from its text."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.harness import ROOT

__all__ = ["imported_modules"]


def imported_modules(path: Path, root: Path = ROOT) -> set[str]:
    """Every module named by an import statement anywhere in the file, those inside functions included."""
    package = list(path.relative_to(root).parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found.add(module)
            if module in ("megatron_ext", "recipes"):  # `from recipes import data` names the room after the import
                found.update(f"{module}.{alias.name}" for alias in node.names)
    return found
