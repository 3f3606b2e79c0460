"""The configuration that a command line or a caller asks for: a YAML file, what it is composed of, and overrides.

By Hydra's own loader and its own options. Hydra, left alone, reports a bad command line or YAML over several lines (up to a
whole traceback) and ends with code 1; here it is an error whose `recipes.cli.errors.one_line` names the nearest known key.
"""

from __future__ import annotations

import operator
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from recipes.cli.config import ConfigError, nearest_key
from recipes.cli.errors import one_line

__all__ = ["CONFIG_FOLDER", "choices", "command_line", "compose", "forced"]

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "nemo_configs"
SECTIONS = ("trainer.", "model.", "data.", "exp_manager.", "pretrained_checkpoint.")
SWEEP = "a sweep (--multirun) is not supported: start one run per configuration"
# NeMo's YAML may say ${multiply:4, ${.hidden_size}}.
OmegaConf.register_new_resolver("multiply", operator.mul, replace=True)
OmegaConf.register_new_resolver("sum", operator.add, replace=True)


def forced(arguments: Sequence[str]) -> list[str]:
    """A key of ours that the YAML leaves at its default may be set like any other, where Hydra would want a `+`; one that
    does not exist is found by recipes.cli.config.build, which knows them all."""
    return [f"++{a}" if a.startswith(SECTIONS) and "=" in a else a for a in arguments]


def compose(
    name: str, overrides: Sequence[str] = (), folder: Path = CONFIG_FOLDER, may_be_unset: bool = False
) -> dict[str, Any]:
    """A YAML file with overrides, resolved, as plain data.

    Args:
        folder: where the YAML files are.
        may_be_unset: leave values of ??? as they are.

    Raises:
        ConfigError: an override of a key that is not there.
        HydraException: no such file, or an override that cannot be read.
        OmegaConfBaseException: an interpolation of nothing, a value that is not set.
    """
    return _plain(_composed(_hydra(folder), name, overrides), may_be_unset)


def choices(name: str, overrides: Sequence[str] = (), folder: Path = CONFIG_FOLDER) -> dict[str, str]:
    """What the YAML and the overrides choose of each group, such as {"model": "qwen3_8b", "cluster": "2x8"}.

    Raises:
        ConfigError, HydraException: see `compose`.
    """
    return dict(_composed(_hydra(folder), name, overrides).hydra.runtime.choices)


def command_line(
    arguments: Sequence[str], default: str, folder: Path = CONFIG_FOLDER, script: str = "app"
) -> dict[str, Any]:
    """The configuration that a script's arguments ask for: Hydra's options and overrides.

    Exits with code 0 when they ask for something else (--help, --cfg job, --info).

    Args:
        default: the file used when the arguments name none.
        folder: where the YAML files are, unless --config-path says it.
        script: its name without .py, for --help and ${hydra:job.name}.

    Raises:
        ConfigError: an unknown option, a sweep.
        HydraException, OmegaConfBaseException: see `compose`.
    """
    parser = get_args_parser()
    asked = _parsed(parser, arguments)
    hydra = _hydra(asked.config_path or folder, asked.config_dir, script)
    name = asked.config_name or default
    if asked.hydra_help:
        hydra.hydra_help(name, parser, asked)
    elif asked.shell_completion:
        hydra.shell_completion(name, asked.overrides)
    else:
        config = _composed(hydra, name, asked.overrides)
        if asked.help:
            hydra.app_help(name, parser, asked)
        elif asked.cfg:
            hydra.show_cfg(name, asked.overrides, asked.cfg, asked.package, asked.resolve)
        elif asked.info:
            hydra.show_info(asked.info, name, asked.overrides)
        else:
            return _plain(config)
    sys.exit(0)


def _parsed(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Hydra's options; what argparse would refuse is refused without its usage lines, and so is what is not done here."""

    def refuse(message: str):
        raise ConfigError(f"{message}; keys are set by key=value, without dashes, and --help lists the options")

    parser.error = refuse
    asked = parser.parse_intermixed_args(arguments)
    if asked.multirun:
        raise ConfigError(SWEEP)
    if asked.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun is not supported: name the YAML and its overrides")
    if len(commands := [c for c in ("run", "cfg", "info", "shell_completion") if getattr(asked, c)]) > 1:
        raise ConfigError(f"--{commands[0]} and --{commands[1]}: give one of them")
    if asked.resolve and not asked.cfg and not asked.help:
        raise ConfigError("--resolve is for --cfg and --help")
    return asked


def _hydra(folder: str | Path, more: str | None = None, script: str = "app") -> Hydra:
    """Hydra that finds files in a folder, and behind it in one more; a process may have several."""
    version.setbase(None)
    path = create_config_search_path(str(Path(folder).resolve()))
    if more is not None:
        if not os.path.isdir(more):
            raise ConfigError(f"--config-dir {more} does not exist, or is no folder")
        place = f"file://{os.path.abspath(more)}"
        path.prepend(provider="command-line", path=place, anchor=SearchPathQuery(provider="schema"))
    return Hydra(script, ConfigLoaderImpl(path))


def _composed(hydra: Hydra, name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration, with Hydra's own under `hydra`."""
    try:
        config = hydra.compose_config(name, list(overrides), RunMode.RUN)
    except HydraException as error:
        if not isinstance(error.__cause__, (ConfigAttributeError, ConfigKeyError)):
            raise
        raise _unknown_override(hydra, name, overrides, error) from None
    if config.hydra.mode == RunMode.MULTIRUN:
        raise ConfigError(SWEEP)
    return config


def _plain(config: DictConfig, may_be_unset: bool = False) -> dict[str, Any]:
    HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.name}
    with open_dict(config):
        del config["hydra"]
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=not may_be_unset)


def _unknown_override(hydra: Hydra, name: str, overrides: Sequence[str], error: HydraException) -> ConfigError:
    bad = _bad_override(overrides, error)
    if bad is None:
        return ConfigError(one_line(error))
    known = _known_keys(hydra, name, overrides, bad)
    if _key(bad) in known:
        return ConfigError(f"{bad} has a key that the YAML does not list; to set it all the same, write ++{bad}")
    nearest = nearest_key(_key(bad), known)
    guess = f"; did you mean {nearest}? The" if nearest else ": the"
    return ConfigError(f"unknown key {_key(bad)}{guess} YAML does not list it; to set it all the same, write +{bad}")


def _bad_override(overrides: Sequence[str], error: HydraException) -> str | None:
    """The override that Hydra could not follow."""
    quoted = re.search(r"'([^']+)'", str(error))
    return next((a for a in overrides if quoted and _key(a) == quoted[1]), None)


def _known_keys(hydra: Hydra, name: str, overrides: Sequence[str], bad: str | None) -> list[str]:
    """The keys of the same file and overrides without those that are unknown."""
    left = list(overrides)
    while bad in left:
        left.remove(bad)
        try:
            config = hydra.compose_config(name, left, RunMode.RUN)
        except HydraException as error:  # another unknown key
            bad = _bad_override(left, error)
            continue
        return [key for key in _dotted(OmegaConf.to_container(config)) if key.split(".")[0] != "hydra"]
    return []


def _dotted(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            key = f"{path}.{name}" if path else str(name)
            yield key
            yield from _dotted(value, key)


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]
