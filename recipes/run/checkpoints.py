"""The folder `checkpoints/` of a run: whose it is, where to go on, and which checkpoints stay.

They are `step-<n>`; `latest`, `best` and, when the run has ended, `final` are links to one of them. `hf` is one to the
Hugging Face folder `hf-step-<n>`, where the run writes one.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import UserError
from megatron_ext.models.config import without_idle
from megatron_ext.runtime.checkpoint import has_optimizer, read_checkpoint_info
from recipes.run.settings import CheckpointCallbackSection

__all__ = ["RUN_FILE", "Checkpoints", "read_run_file"]

# Whose folder it is: the resolved configuration, where NeMo's exp_manager, which moves files of the folder itself, leaves it.
RUN_FILE = Path("checkpoints", "run.yaml")


def read_run_file(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run in a folder; None: there is none, or it is damaged."""
    try:
        found = yaml.safe_load((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(found, dict):
        return None
    return found | ({"model": without_idle(found["model"])} if isinstance(found.get("model"), dict) else {})


class Checkpoints:
    """The folder `checkpoints/` of a run. Only `path` and `newest` are for every rank; the rest is rank 0's."""

    def __init__(self, run: Path, settings: CheckpointCallbackSection):
        self.folder, self.settings = run / "checkpoints", settings

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def complete(self) -> dict[int, dict[str, Any]]:
        """Descriptions of the complete checkpoints by step, oldest first."""
        found = {}
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            number = path.name.removeprefix("step-")
            if number.isdecimal():
                try:
                    found[int(number)] = read_checkpoint_info(path)
                except UserError as error:
                    raise UserError(
                        f"{path} is no complete checkpoint: move it away, and the run goes on from the newest of the others"
                    ) from error
        return dict(sorted(found.items()))

    def newest(self) -> Path | None:
        """Where to go on: the last checkpoint that has the optimizer's state."""
        steps = [step for step in self.complete() if has_optimizer(self.path(step))]
        return self.path(steps[-1]) if steps else None

    def arrange(self, last: int, ended: bool) -> None:
        """Set the links after step `last` has been saved, and remove what save_top_k does not keep."""
        known = self.complete()
        ranked, k = self._best_first(known), self.settings.save_top_k
        kept = set(known) if k < 0 else set((ranked or sorted(known, reverse=True))[:k]) | {last}
        best = next((step for step in ranked if step in kept), None)
        self._link("latest", self.path(last))
        self._link("best", None if best is None else self.path(best))
        self._link("final", self.path(last) if ended else None)  # a run that is made longer has not ended any more
        for step in known.keys() - kept:
            # Renamed first: a kill in the midst of it leaves nothing that looks like a checkpoint.
            going = self.path(step).with_name(f"step-{step}.unfinished-removal")
            self.path(step).rename(going)
            shutil.rmtree(going)

    def best_of(self, metrics: dict[str, float], best: float | None) -> float | None:
        """The better of what `monitor` says in these metrics and the best before; None: nothing to tell by."""
        value = metrics.get(self.settings.monitor, math.nan)
        if not math.isfinite(value):
            return best
        return value if best is None else (min if self.settings.mode == "min" else max)(value, best)

    def best_known(self, info: dict[str, Any]) -> float | None:
        """The best before a run went on from a checkpoint: of all that it had saved, whether they are still there or not.

        Args:
            info: of that checkpoint. One from before it was kept there says nothing: then those that are there do.
        """
        if "best" in info["trainer"]:
            return info["trainer"]["best"]
        known = self.complete()
        return next(
            (known[step]["trainer"]["metrics"][self.settings.monitor] for step in self._best_first(known)), None
        )

    def hf(self, step: int) -> Path:
        """Where the Hugging Face folder of a step is."""
        return self.folder / f"hf-step-{step}"

    def point_at_hf(self, step: int) -> None:
        """The link `hf` follows this step's; older folders go."""
        self._link("hf", self.hf(step))
        for old in self.folder.glob("hf-step-*"):
            if old != self.hf(step):
                shutil.rmtree(old)

    def _best_first(self, known: dict[int, dict]) -> list[int]:
        """Steps whose checkpoint knows the monitored metric, and a number for it; of equal ones the later first."""
        name = self.settings.monitor
        sign = 1 if self.settings.mode == "min" else -1
        values = {s: info["trainer"]["metrics"].get(name, math.nan) for s, info in known.items() if "trainer" in info}
        return sorted((s for s, v in values.items() if math.isfinite(v)), key=lambda s: (sign * values[s], -s))

    def _link(self, name: str, target: Path | None) -> None:
        if target is None:
            (self.folder / name).unlink(missing_ok=True)
            return
        beside = self.folder / f".{name}"
        beside.unlink(missing_ok=True)
        beside.symlink_to(target.name, target_is_directory=True)
        os.replace(beside, self.folder / name)
