"""Builds our Transformer Engine model on the CPU, with a package that takes what a version's signatures take, and no more.

    python -m tests.programs.te_modules FOLDER

Its modules have the real ones' parameters and compute what they stand for, so that loss, names and checkpoints can be compared
with those of the local implementation. Which names exist, and their arguments, are tests/fixtures/transformer_engine.json's.
The last line of output is JSON: for every version what it lacks, and what differs.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures/transformer_engine.json").read_text(encoding="utf-8"))
PYTORCH = "transformer_engine.pytorch"


class Version:
    """Which version is played, and what has been asked of it."""

    number = FIXTURE["versions"][0]
    taken: set[str] = set()  # full names that Megatron took when it was imported
    fp8: FP8 | None = None  # the context that modules are called in
    contexts: list[FP8] = []  # since `contexts` was emptied

    @classmethod
    def entry(cls, full_name: str) -> dict | None:
        return next((e for e in FIXTURE["names"].get(full_name, ()) if cls.number in e["versions"]), None)


class FP8:
    """A context of FP8: its recipe's name, linears that were called in it, and those of them that would keep their weights."""

    def __init__(self, recipe: str):
        self.recipe, self.linears, self.kept = recipe, 0, 0

    def called(self, x: Tensor, weight: Tensor, arguments: dict) -> None:
        for tensor in (x, weight):  # `assert_dim_for_fp8_exec`
            assert tensor[..., 0].numel() % 8 == 0 and tensor.size(-1) % 16 == 0, f"FP8 of {tuple(tensor.shape)}"
        self.linears += 1
        self.kept += arguments.get("is_first_microbatch") is not None


@contextlib.contextmanager
def fp8_autocast(*args, **kwargs):
    a = check_call(f"{PYTORCH}.fp8_autocast", "arguments", args, kwargs)
    assert a["enabled"]
    before, Version.fp8 = Version.fp8, FP8(type(a["fp8_recipe"]).__name__)
    Version.contexts.append(Version.fp8)
    try:
        yield
    finally:
        Version.fp8 = before


def checkpoint(function, *args, **kwargs):
    check_call(f"{PYTORCH}.distributed.checkpoint", "arguments", (function, *args), kwargs)
    return function(*args)


class Format(enum.Enum):
    E4M3 = 1
    HYBRID = 2


def recipe(name: str) -> type:
    def init(self, *args, **kwargs):
        a = check_call(f"transformer_engine.common.recipe.{name}", "arguments", args, kwargs)
        assert isinstance(a["fp8_format"], Format) and not a.get("fp8_dpa")

    return type(name, (), {"__init__": init})


def check_call(full_name: str, part: str, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call by name, as this version of the real thing would read them.

    Raises:
        TypeError: it would not take them.
    """
    entry = Version.entry(full_name)
    if entry is None:
        raise TypeError(f"there is no {full_name}")
    try:
        return inspect.signature(eval(f"lambda {_parameters(entry[part])}: 0")).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{full_name.rpartition('.')[2]}: {error}") from error


def _parameters(texts: list[str]) -> str:
    """Defaults are of no account here, and need not be known."""
    return ", ".join(text.split("=")[0] + ("=None" if "=" in text else "") for text in texts)


class _Module(torch.nn.Module):
    """A module of this package; `arguments` are those it was built with."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        name = next(c.__name__ for c in type(self).__mro__ if c.__module__ == __name__)
        self.full_name = f"{PYTORCH}.{name}"
        self.arguments = check_call(self.full_name, "arguments", args, kwargs)
        self.make(self.arguments)

    def make(self, a: dict) -> None:
        raise NotImplementedError(f"{self.full_name} is not played here")

    def parameter(self, name: str, *shape: int, fill: float | None = None) -> None:
        weight = torch.empty(shape, dtype=self.arguments["params_dtype"], device=self.arguments["device"])
        if fill is None:
            self.arguments["init_method"](weight)
        else:
            weight.fill_(fill)
        self.register_parameter(name, torch.nn.Parameter(weight))

    def forward(self, *args, **kwargs):
        a = check_call(self.full_name, "forward", args, kwargs)
        x = next(iter(a.values()))
        if Version.fp8 is not None and isinstance(self, Linear):
            Version.fp8.called(x, self.weight, a)
        return self.compute(x)


class Linear(_Module):
    def make(self, a: dict) -> None:
        self.in_features, self.out_features = a["in_features"], a["out_features"]
        self.save_original_input = False  # Megatron sets it, and demands that it is there
        self.tp_size, self.parallel_mode, self.use_bias = a["tp_size"], a["parallel_mode"], a["bias"]
        column, row = (self.tp_size if self.parallel_mode == mode else 1 for mode in ("column", "row"))
        self.parameter("weight", self.out_features // column, self.in_features // row)
        if self.use_bias:
            self.parameter("bias", self.out_features // column, fill=0.0)

    def compute(self, x: Tensor):
        bias = self.bias if self.use_bias else None
        if self.arguments["return_bias"]:
            return F.linear(x, self.weight), bias
        return F.linear(x, self.weight, bias)


class LayerNormLinear(Linear):
    def make(self, a: dict) -> None:
        assert a["normalization"] == "RMSNorm" and not a["zero_centered_gamma"]
        self.parameter("layer_norm_weight", a["in_features"], fill=1.0)
        super().make(a)

    def compute(self, x: Tensor):
        return super().compute(F.rms_norm(x, (x.size(-1),), self.layer_norm_weight, self.arguments["eps"]))


class RMSNorm(_Module):
    def make(self, a: dict) -> None:
        size = a.get("normalized_shape") or a.get("hidden_size")
        self.parameter("weight", size, fill=1.0)
        self.weight.sequence_parallel = a["sequence_parallel"]

    def compute(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.arguments["eps"])


class FusedAdam(torch.optim.AdamW):
    """Only made, not stepped: what it is told beside AdamW's arguments is checked and left out."""

    def __init__(self, *args, **kwargs):
        a = check_call(f"{PYTORCH}.optimizers.FusedAdam", "arguments", args, kwargs)
        known = ("params", "lr", "betas", "eps", "weight_decay")
        super().__init__(**{name: a[name] for name in known if name in a})


MODULES = {f"{PYTORCH}.{c.__name__}": c for c in (Linear, LayerNormLinear, RMSNorm)}
PLAYED = MODULES | {
    f"{PYTORCH}.optimizers.FusedAdam": FusedAdam,
    f"{PYTORCH}.fp8_autocast": fp8_autocast,
    f"{PYTORCH}.distributed.checkpoint": checkpoint,
    "transformer_engine.common.recipe.Format": Format,
    **{
        f"transformer_engine.common.recipe.{name}": recipe(name)
        for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
    },
}


class Played(types.ModuleType):
    """A module of the package in whose place this stands: what the signatures name is there."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str):
        full_name = f"{self.__name__}.{name}"
        if name.startswith("__"):
            raise AttributeError(name)
        entry = Version.entry(full_name)
        if entry is None:
            raise AttributeError(f"{full_name} is not in Transformer Engine {Version.number}, or no name we know")
        Version.taken.add(full_name)
        found = PLAYED.get(full_name) or type(name, (_Module if entry.get("forward") else object,), {})
        setattr(self, name, found)
        return found


def install() -> None:
    """Stand in Transformer Engine's place for whoever imports it."""
    modules = {"transformer_engine"}
    for full_name in FIXTURE["names"]:
        parts = full_name.split(".")[:-1]
        modules |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    for name in sorted(modules):
        sys.modules[name] = Played(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    sys.modules["transformer_engine"].__version__ = Version.number


def play(number: str) -> None:
    """Be this version from now on, for a Megatron that has been imported."""
    import megatron.core.utils

    Version.number = number
    sys.modules["transformer_engine"].__version__ = number
    megatron.core.utils._te_version = None
    for full_name, played in MODULES.items():
        _keep_extra_state(played, Version.entry(full_name)["extra_state"])


def _keep_extra_state(played: type, keeps: bool) -> None:
    """As the real module does without FP8: an empty tensor beside the parameters."""
    if keeps:
        played.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)
        played.set_extra_state = lambda self, state: None
    else:
        for method in ("get_extra_state", "set_extra_state"):
            if method in vars(played):
                delattr(played, method)


def main(folder: Path) -> dict:
    install()
    from tests.programs import te_comparison

    imported = set(Version.taken)
    answers = {}
    for number in FIXTURE["versions"]:
        play(number)
        lacking = sorted(name for name in imported if Version.entry(name) is None)
        ends = number in (FIXTURE["versions"][0], FIXTURE["versions"][-1])
        answers[number] = {"lacking": lacking} | te_comparison.compare(folder / number, ends, Version)
    return {"imported": sorted(imported), "versions": answers}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
