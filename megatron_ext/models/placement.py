"""How a model is run: in which precision, on which ranks, by which kernels. Nothing of it is in the weights.

A configuration does not ask the machine that reads it, which may be a login node: `auto` stays until `on` or `here`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch

from megatron_ext.attention.context import CP_COMM_TYPES
from megatron_ext.attention.forms import ATTENTION_PLANS
from megatron_ext.attention.kernels import KERNELS, check_kernel
from megatron_ext.errors import UserError
from megatron_ext.kinds import Layout, Speed, Training
from megatron_ext.models.fp8 import FP8_ROWS, check_fp8
from megatron_ext.runtime.distributed import ParallelSizes, local_device

__all__ = ["PRECISIONS", "Placement"]

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
IMPLEMENTATIONS = ("auto", "local", "transformer_engine")


@dataclass(kw_only=True)
class Placement:
    # "32", "bf16", or "auto": bf16 on a GPU, whose attention kernels need it, and fp32 on a CPU.
    precision: Training[str] = "auto"
    # Products of the layers' linears in numbers of 8 bits: "e4m3", "hybrid" (e5m2 for gradients), or null: in `precision`, as
    # weights, attention, embedding and vocabulary are in any case. It needs bf16 and Transformer Engine. Not yet run.
    fp8: Training[str | None] = None
    # What shares a scale there: "tensorwise", the numbers of a tensor (GPUs from Ada on); "blockwise", of 1 x 128 or 128 x 128
    # (Hopper); "mxfp8", of 32 (Blackwell). Without meaning where fp8 is null.
    fp8_recipe: Training[str] = "tensorwise"
    # Ranks that share every matrix. Raise it, within a machine, until the weights fit.
    tensor_model_parallel_size: Layout[int] = 1
    # Ranks that share the layers, a stage for each. Raise it where tensor parallelism has reached the
    # machine's edge and weights still do not fit; stages idle unless a step has several streams.
    pipeline_model_parallel_size: Layout[int] = 1
    # Layers of the first stage; null: as many as of the others. Set it, the next key or both where the number of layers does
    # not divide by the stages: what they leave must divide by the stages between. Fewer in the first and the last make room
    # for the embedding and the vocabulary.
    num_layers_in_first_pipeline_stage: Layout[int | None] = None
    # Layers of the last stage; null: as many as of the others.
    num_layers_in_last_pipeline_stage: Layout[int | None] = None
    # Pieces of a stage, Megatron's interleaved schedule: with 2, stage 0 of 4 runs the layers of the first and the fifth
    # eighth. Stages idle so many times less, and send so many times more; null: one piece. It must divide the layers of every
    # stage; a step should have at least as many streams as there are stages, and more streams are in memory at a time. What
    # trains one block alone cannot have it.
    virtual_pipeline_model_parallel_size: Layout[int | None] = None
    # Ranks that share each stream: prefixes are cut, responses stay whole where they can. Raise it where long prompts
    # do not fit.
    context_parallel_size: Layout[int] = 1
    # What context-parallel ranks exchange: "all_gather", keys and values of the prefixes, with any number of heads;
    # "a2a" (Ulysses), so that each has all rows of some heads: heads and key/value heads must divide by tensor x
    # context ranks.
    cp_comm_type: Layout[str] = "all_gather"
    # Ranks that share the experts of a layer (docs/experts.md): tokens travel to them and back. They are taken from ranks that
    # share nothing else in an MLP: data-, context- and, with expert_tensor_parallel_size below it, tensor-parallel ones.
    expert_model_parallel_size: Layout[int] = 1
    # Ranks that share each matrix of an expert; null: tensor_model_parallel_size. 1 where experts are narrow.
    expert_tensor_parallel_size: Layout[int | None] = None
    # Norms and residuals cut over tensor-parallel ranks, too: less memory at the same traffic. Needs more than one of them.
    sequence_parallel: Layout[bool] = False
    # "auto": the first that can run on the ranks' machines. Or cpu, blockwise, torch_flash, flash_attn_2, flash_attn_3.
    attention_kernel: Speed[str] = "auto"
    # "levels": a call for the prompts and one for each level below, merged. "one_call": shared keys copied for each
    # response. "auto": the faster by a measured rule, logged once.
    attention_plan: Speed[str] = "auto"
    # "local", "transformer_engine", or "auto": Transformer Engine where the ranks' machines have it.
    transformer_impl: Speed[str] = "auto"

    def __post_init__(self):
        self.precision = str(self.precision)
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "expert_model_parallel_size", "expert_tensor_parallel_size",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"model.{name}={value} must be at least 1")
        for broken, message in self._rules():
            if broken:
                raise UserError(message)
        try:
            check_kernel(self.attention_kernel, self._capped)
        except UserError as error:
            raise UserError(f"model.attention_kernel={self.attention_kernel}: {error}") from error

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """(whether it is broken, what is said then)."""
        choices = (
            ("precision", ("auto", *PRECISIONS)), ("attention_kernel", ("auto", *KERNELS)), ("attention_plan", ATTENTION_PLANS),
            ("transformer_impl", IMPLEMENTATIONS), ("cp_comm_type", CP_COMM_TYPES), ("fp8", (None, "e4m3", "hybrid")),
        )  # fmt: skip
        for name, known in choices:
            value = getattr(self, name)
            said = ", ".join("null" if x is None else x for x in known)
            yield value not in known, f"model.{name} must be one of {said}, got {value!r}"
        yield from self._fp8_rules()
        yield (
            self.sequence_parallel and self.tensor_model_parallel_size == 1,
            "model.sequence_parallel=true needs model.tensor_model_parallel_size > 1",
        )
        yield (
            self.attention_plan == "one_call" and self.context_parallel_size > 1 and self.cp_comm_type == "all_gather",
            "model.attention_plan=one_call needs model.cp_comm_type=a2a: gathered keys are not copied for each response",
        )

    def _fp8_rules(self) -> Iterator[tuple[bool, str]]:
        on, recipe = self.fp8 is not None, self.fp8_recipe
        yield (
            recipe == "delayed",
            "model.fp8_recipe=delayed takes scales from earlier passes, and would mix those of the policy, of the reference and "
            "of sampling; set it to one of " + ", ".join(FP8_ROWS),
        )
        yield recipe not in FP8_ROWS, f"model.fp8_recipe must be one of {', '.join(FP8_ROWS)}, got {recipe!r}"
        yield on and self.precision == "32", f"model.fp8={self.fp8} needs model.precision=bf16, got 32"
        yield (
            on and self.transformer_impl == "local",
            f"model.fp8={self.fp8} is Transformer Engine's, and model.transformer_impl=local does without; set it to auto",
        )

    @property
    def sizes(self) -> ParallelSizes:
        """How ranks are divided."""
        return ParallelSizes(
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
            self.expert_model_parallel_size,
            self.expert_tensor_parallel_size,
        )

    @property
    def expert_tensor_ranks(self) -> int:
        """Ranks that share each matrix of an expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def row_multiple(self) -> int:
        """What the rows of a linear's input on each tensor-parallel rank are a multiple of."""
        return 1 if self.fp8 is None else FP8_ROWS[self.fp8_recipe]

    @property
    def _capped(self) -> bool:
        """Whether attention scores have a soft cap."""
        return False

    def on(self, device_type: str) -> Self:
        """A copy for ranks on "cuda" or "cpu", in whose precision nothing is `auto`.

        Raises:
            UserError: what no such device runs.
        """
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if device_type == "cuda" else "32"
        try:
            check_kernel(self.attention_kernel, self._capped, device_type)
        except UserError as error:
            raise UserError(f"model.attention_kernel={self.attention_kernel}: {error}") from error
        if self.fp8 is not None and device_type != "cuda":
            raise UserError(f"model.fp8={self.fp8} cannot run on {device_type}: it needs a GPU; set it to null")
        return dataclasses.replace(self, precision=precision)

    def here(self) -> Self:
        """`on` this rank's device.

        Raises:
            UserError: also for a kernel whose library is not installed here, and for more ranks than GPUs.
        """
        found = self.on(local_device().type)
        lacking = self.attention_kernel != "auto" and KERNELS[self.attention_kernel].missing()
        if lacking:
            raise UserError(f"model.attention_kernel={self.attention_kernel} needs {lacking}; use auto")
        if self.fp8 is not None:
            check_fp8(self.fp8_recipe)
        return found

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations; for a configuration that `on` or `here` has made."""
        assert self.precision != "auto", "model.precision=auto has not been resolved: call on(device_type)"
        return PRECISIONS[self.precision]
