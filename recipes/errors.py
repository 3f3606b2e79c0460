"""Reading the command line through NeMo's `hydra_runner`, and telling a user's mistake from a bug of ours."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

__all__ = ["UserError", "compose", "is_user_error"]

ROOT = Path(__file__).resolve().parent.parent
OUR_CODE = (str(ROOT / "megatron_ext"), str(ROOT / "recipes"))
SECTIONS = ("trainer.", "model.", "data.", "exp_manager.", "pretrained_checkpoint.")


class UserError(ValueError):
    """One line: what is wrong with the command line or the YAML."""


def is_user_error(error: BaseException) -> bool:
    """Whether `error` was raised by our own code on purpose, as opposed to by a library, which would be a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(OUR_CODE)


def compose(folder: Path, default_config: str) -> dict[str, Any]:
    """The configuration that the command line asks for, resolved, as plain data.

    Overrides of our sections may add keys that the YAML leaves at their default (Hydra would want a `+`); keys that
    do not exist are found out by `recipes.config.build`, which knows them all.

    Raises:
        UserError: whatever Hydra or OmegaConf refuse, in one line.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing a stack and exiting
    sys.argv[1:] = [f"++{a}" if a.startswith(SECTIONS) and "=" in a else a for a in sys.argv[1:]]
    sys.argv.append("hydra.job.chdir=false")
    import yaml
    from hydra.errors import HydraException
    from nemo.core.config import hydra_runner
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    composed: dict[str, Any] = {}

    @hydra_runner(config_path=str(folder), config_name=default_config)
    def keep(cfg) -> None:
        composed.update(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))

    try:
        keep()
    except MissingMandatoryValue as error:
        key = str(error).splitlines()[0].rsplit(":", 1)[-1].strip()
        raise UserError(f"{key} is not set: give it on the command line as {key}=...") from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(" ".join(lines[:2])) from None
    return composed
