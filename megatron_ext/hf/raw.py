"""Values of a JSON file that somebody else wrote, checked one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_ext.errors import UserError

__all__ = ["integer", "number", "read_json", "switch"]


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: not there, or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): name the folder of a Hugging Face model") from error
    except (ValueError, RecursionError) as error:  # brackets of thousands of levels
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return found


def integer(config: dict[str, Any], key: str, where: str, least: int = 1) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}: {key} must be an integer of at least {least}, got {value!r}; fetch the file again")
    return value


def number(config: dict[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"{where}: {key} must be a number of at least 0, got {value!r}; fetch the file again")
    return value


def switch(config: dict[str, Any], key: str, where: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, got {value!r}; fetch the file again")
    return value
