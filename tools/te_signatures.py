"""What Transformer Engine's modules take, read from its wheels without importing it, which would need a GPU.

    pip download --no-deps -d wheels transformer-engine==2.9.0     # and every other version
    python tools/te_signatures.py wheels                           # writes tests/fixtures/transformer_engine.json

Reads the sources in transformer_engine-*.whl and transformer_engine_torch-*.tar.gz of a folder; downloads nothing. The file
holds, of the classes and functions that megatron-core takes from Transformer Engine where this package uses it, the arguments
with their defaults, those of `forward`, whether a checkpoint holds more of it than parameters, and in which versions it is
there. Arguments that a class hands on by **kwargs are those of its base.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = ROOT / "tests/fixtures/transformer_engine.json"
PACKAGE = "transformer_engine"
PYTORCH = f"{PACKAGE}.pytorch"
# Module -> names that megatron-core imports or builds where a model, its optimizer and its random numbers are made.
WANTED = {
    PYTORCH: ("Linear", "LayerNormLinear", "LayerNormMLP", "LayerNorm", "RMSNorm", "GroupedLinear", "DotProductAttention",
              "fp8_model_init", "fp8_autocast", "quantized_model_init", "autocast"),
    f"{PYTORCH}.fp8": ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"),
    f"{PYTORCH}.distributed": ("CudaRNGStatesTracker", "checkpoint", "activation_recompute_forward",
                               "is_fp8_activation_recompute_enabled"),
    f"{PYTORCH}.optimizers": ("FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_scale", "multi_tensor_l2norm",
                               "multi_tensor_scale_tensor"),
    f"{PYTORCH}.module.base": ("TransformerEngineBaseModule", "get_dummy_wgrad", "get_workspace"),
    f"{PYTORCH}.cpp_extensions": ("general_gemm",),
    f"{PYTORCH}.cross_entropy": ("parallel_cross_entropy",),
    f"{PYTORCH}.tensor": ("QuantizedTensor",),
    f"{PYTORCH}.float8_tensor": ("Float8Tensor",),
    f"{PYTORCH}.router": ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"),
    f"{PYTORCH}.ops": ("Sequential", "FusibleOperation"),
    f"{PACKAGE}.common.recipe": ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "Format"),
}  # fmt: skip


class Sources:
    """The Python files of one version, by module."""

    def __init__(self, files: dict[str, str]):
        self.files = files

    @cache  # noqa: B019  a handful of instances, each as long as the program
    def tree(self, module: str) -> ast.Module | None:
        for path in (module.replace(".", "/") + ".py", module.replace(".", "/") + "/__init__.py"):
            if path in self.files:
                return ast.parse(self.files[path])
        return None

    def is_package(self, module: str) -> bool:
        return module.replace(".", "/") + "/__init__.py" in self.files

    def find(self, module: str, name: str, seen: frozenset = frozenset()) -> tuple[str, ast.AST] | None:
        """(module, definition) behind a name of a module, through whatever it is imported by; None: it is not there."""
        tree = self.tree(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in _statements(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        wanted = name if alias.name == "*" else alias.name
                        if found := self.find(source, wanted, seen):
                            return found
                        if alias.name != "*" and f"{source}.".partition(".")[0] != PACKAGE:
                            return module, node  # of another package
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self.is_package(module)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def arguments(self, module: str, node: ast.AST, method: str) -> list[str] | None:
        """Of a function, or of a method of a class or of the first base that has it; "name", "name=default", "*", "**kwargs"."""
        if isinstance(node, ast.FunctionDef):
            return _texts(node)
        if not isinstance(node, ast.ClassDef):
            return None
        if method == "__init__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
            return [f"{x.target.id}={ast.unparse(x.value)}" if x.value else x.target.id for x in fields]
        own = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == method), None)
        inherited = None
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None:
                inherited = self.arguments(*found, method)
                break
        if own is None:
            return inherited
        texts = _texts(own)[1:]  # without self
        if texts and texts[-1].startswith("**") and inherited is not None:
            known = {text.split("=")[0] for text in texts}
            more = [text for text in inherited if text.split("=")[0] not in known and text != "*"]
            texts = [*texts[:-1], "*", *more] if "*" not in texts else [*texts[:-1], *more]
        return texts


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of a module, those in its `if`, `try` and `with` blocks included."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                waiting += getattr(node, part, [])


def _texts(function: ast.FunctionDef) -> list[str]:
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
    texts = [_text(argument, default) for argument, default in zip(plain, defaults, strict=True)]
    if a.vararg or a.kwonlyargs:
        texts.append(f"*{a.vararg.arg}" if a.vararg else "*")
    texts += [_text(argument, default) for argument, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return texts + ([f"**{a.kwarg.arg}"] if a.kwarg else [])


def _text(argument: ast.arg, default: ast.expr | None) -> str:
    return argument.arg if default is None else f"{argument.arg}={ast.unparse(default)}"


def read_sources(folder: Path) -> dict[str, Sources]:
    """Version -> sources, of all archives of a folder, oldest first.

    Raises:
        SystemExit: there is none.
    """
    files: dict[str, dict[str, str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("transformer_engine-") and path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
        elif path.name.startswith("transformer_engine_torch-") and path.name.endswith(".tar.gz"):
            with tarfile.open(path) as archive:
                found = {
                    member.name.split("/", 1)[1]: archive.extractfile(member).read().decode()
                    for member in archive.getmembers()
                    if member.isfile() and member.name.endswith(".py") and "/" in member.name
                }
        else:
            continue
        version = path.name.removesuffix(".tar.gz").split("-")[1]
        files.setdefault(version, {}).update({n: text for n, text in found.items() if n.startswith(PACKAGE + "/")})
    if not files:
        sys.exit(f"error: {folder} has neither transformer_engine-*.whl nor transformer_engine_torch-*.tar.gz")
    order = sorted(files, key=lambda version: [int(part) for part in version.split(".")])
    return {version: Sources(files[version]) for version in order}


def collect(versions: dict[str, Sources]) -> dict:
    """The fixture: "versions", and "names" with for each full name what is known of it, versions that are equal together."""
    names: dict[str, list[dict]] = {}
    for module, wanted in WANTED.items():
        for name in wanted:
            entries = names.setdefault(f"{module}.{name}", [])
            for version, sources in versions.items():
                found = sources.find(module, name)
                if found is None:
                    continue
                is_class = isinstance(found[1], ast.ClassDef)
                entry = {"kind": "class" if is_class else "other", "arguments": sources.arguments(*found, "__init__")}
                if is_class:
                    entry["forward"] = sources.arguments(*found, "forward")
                    entry["extra_state"] = sources.arguments(*found, "get_extra_state") is not None
                if entries and {k: v for k, v in entries[-1].items() if k != "versions"} == entry:
                    entries[-1]["versions"].append(version)
                else:
                    entries.append({"versions": [version]} | entry)
    return {"versions": list(versions), "names": names}


def _text_of(found: dict) -> str:
    """JSON with an entry a line."""
    names = []
    for name, entries in found["names"].items():
        lines = ",\n  ".join(json.dumps(entry) for entry in entries)
        names.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
    return f'{{"versions": {json.dumps(found["versions"])},\n"names": {{\n' + ",\n".join(names) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of wheels and source archives")
    parser.add_argument("--out", type=Path, default=FIXTURE, help="default: %(default)s")
    args = parser.parse_args()
    found = collect(read_sources(args.folder))
    args.out.write_text(_text_of(found), encoding="utf-8")
    print(f"{len(found['versions'])} versions, {len(found['names'])} names: {args.out}")


if __name__ == "__main__":
    main()
