"""Checkpoints of a run in the making: written, beside training where that is asked for, linked to when they are whole."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_ext.hf.adapter_files import export_adapters
from megatron_ext.hf.export import export_hf
from megatron_ext.models.config import GPTModelConfig
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.runtime.checkpoint import CheckpointSave
from megatron_ext.runtime.collectives import broadcast_object, together
from megatron_ext.runtime.engine import Engine
from megatron_ext.runtime.progress import PROGRESS
from recipes.run.adapters import BASE_KEY
from recipes.run.contents import DELTA, Contents
from recipes.run.inputs import Inputs
from recipes.run.pretrained import START_KEY

__all__ = ["CheckpointSaver"]


class CheckpointSaver:
    """
    Args:
        inputs, contents: of the run.
        say: tells whoever watches.
        best: of what `monitor` names, in all checkpoints that the run has saved before it went on; None: none.
    """

    def __init__(self, inputs: Inputs, contents: Contents, say: Callable[[str], None], best: float | None):
        self.inputs, self.config, self.checkpoints = inputs, inputs.config, inputs.checkpoints
        self._contents, self._say, self._best = contents, say, best
        self._is_main = dist.get_rank() == 0
        self._saving: CheckpointSave | None = None
        self._saved: tuple[int, bool] | None = None  # the step being saved, and whether it is the last

    def save(
        self,
        engine: Engine,
        step: int,
        state: dict,
        metrics: dict[str, float],
        ended: bool,
        tensors: dict[str, dict] | None = None,
    ) -> Path:
        """Save all that the run needs to go on after this step, as `<run>/checkpoints/step-<n>`, once the last one is finished.

        Args:
            state: the trainer's own, JSON-serialisable; `Session.restore` gives it back.
            metrics: of this step, for `best`.
            ended: whether this is the run's last checkpoint.
            tensors: the trainer's own, see `save_checkpoint`.
        """
        engine.gather_weights()
        folder = self.checkpoints.path(step)
        fields = {f.name for f in dataclasses.fields(GPTModelConfig)}
        model = {k: v for k, v in dataclasses.asdict(self.config.model).items() if k in fields}
        is_best = self._is_best(metrics, ended)
        trainer = {
            "step": step, "scheduler_steps": engine.scheduler.num_steps, "metrics": metrics, "best": self._best, "state": state,
        }  # fmt: skip
        info = {
            "model": model, "trainer": trainer, "config": self.inputs.resolved, "contents": self._contents.found,
            "versions": self._contents.versions(),
        }  # fmt: skip
        if self.config.model.peft is not None:
            info[BASE_KEY] = self._base()
        is_new = not broadcast_object(folder.exists())
        if self.config.exp_manager.save_hf and is_new and is_best:
            self._save_hf(engine.module, step)
        if is_new:  # the last step of a run that is started again when it had ended
            in_background = self.config.exp_manager.checkpoint_callback_params.async_save and not ended
            with PROGRESS.bounded():  # a large one may take long, and a disk that hangs is torch's to find
                self._saving = CheckpointSave(
                    folder, engine.module, info, engine.optimizer, self._save_companions, tensors, in_background
                )
        self._saved = step, ended
        if self._saving is None or not self._saving.in_background:
            self.finish()
        return self.checkpoints.folder / "final" if ended else folder

    def finish(self, wait: bool = True) -> None:
        """See whether the checkpoint in the making is whole, and if so link to it."""
        if self._saved is None:
            return
        if self._saving is not None:
            if wait:
                with PROGRESS.bounded():
                    self._saving.finish()
            elif not self._saving.is_finished():
                return
        with together():
            if self._is_main:
                self.checkpoints.arrange(*self._saved)
        self._saving = self._saved = None

    def _is_best(self, metrics: dict[str, float], ended: bool) -> bool:
        """Whether these weights are better than all that the run has saved, or as good; without a metric to tell by, whether they
        are the last."""
        monitor = self.checkpoints.settings.monitor
        if monitor is None:
            return ended
        self._best = self.checkpoints.best_of(metrics, self._best)
        return broadcast_object(self._best is not None and metrics.get(monitor) == self._best)

    def _save_hf(self, model: PrefixGroupedGPT, step: int) -> None:
        """The weights as they are, for transformers and for servers; or the adapters alone, for PEFT."""
        target, pretrained = self.checkpoints.hf(step), self.inputs.pretrained
        peft = self.config.model.peft
        if peft is not None and peft.saved_as == "adapter":
            self.save_adapters(model, target)
            with together():
                if self._is_main:
                    self.checkpoints.point_at_hf(step)
            self._say(f"the adapters of step {step} are in {target}")
            return
        tokenizer = self.inputs.log_dir / ".tokenizer"
        with together():
            if self._is_main:
                shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its checkpoint was whole
                self.inputs.tokenizer.save(tokenizer)
        source = pretrained.folder if pretrained is not None and pretrained.hugging_face else None
        try:
            export_hf(model, target, source, tokenizer)
        finally:
            if self._is_main:
                shutil.rmtree(tokenizer, ignore_errors=True)
        with together():
            if self._is_main:
                self.checkpoints.point_at_hf(step)
        self._say(f"a Hugging Face folder of step {step} is in {target}")

    def save_adapters(self, model: PrefixGroupedGPT, folder: Path) -> None:
        """As a folder of PEFT's, in place of one that a run left which was killed; every rank calls it."""
        with together():
            if self._is_main:
                shutil.rmtree(folder, ignore_errors=True)
        export_adapters(model, folder, str(self.inputs.pretrained.folder), self._base())

    def _base(self) -> str | None:
        """Which weights adapters stand on; known on rank 0, which writes it."""
        found = self._contents.found
        if START_KEY not in found:
            return None
        return self.inputs.pretrained.identity(found[START_KEY]["weights"], found.get(DELTA, {}).get("weights"))

    def _save_companions(self, checkpoint: Path) -> None:
        self.inputs.tokenizer.save(checkpoint / "tokenizer")
        if self.inputs.pretrained is not None:
            self.inputs.pretrained.copy_source(checkpoint)
