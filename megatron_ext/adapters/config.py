"""Which linears have adapters, and of which size: NeMo's keys.

A linear of ours may be several of Hugging Face's in one, its parts. An adapter is a matrix A that reads the linear's input and a
matrix B for each part that it writes to:

| target_modules | parts | A |
|---|---|---|
| linear_qkv | q_proj, k_proj, v_proj | one for all |
| q_proj, k_proj, v_proj | itself | one for each, as PEFT has it |
| linear_proj or o_proj | o_proj | its own |
| linear_q_proj or q_proj | q_proj of latent attention | its own |
| linear_q_down_proj or q_a_proj, linear_q_up_proj or q_b_proj | q_a_proj, q_b_proj | its own |
| linear_kv_down_proj or kv_a_proj_with_mqa, linear_kv_up_proj or kv_b_proj | kv_a_proj_with_mqa, kv_b_proj | its own |
| linear_fc1 | gate_proj, up_proj | one for both |
| gate_proj, up_proj | itself | one for each, as PEFT has it |
| linear_fc2 or down_proj | down_proj | its own |

Each expert has its own of these, and so has a shared one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_ext.errors import UserError
from megatron_ext.kinds import Record, Start

__all__ = ["INITS", "LINEARS", "NEMO_TARGETS", "PARTS", "LoraConfig"]

# The linears of a layer, with the parts of each in their order there.
LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    # Of latent attention, in place of the one before.
    "linear_q_proj": ("q_proj",),
    "linear_q_down_proj": ("q_a_proj",),
    "linear_q_up_proj": ("q_b_proj",),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa",),
    "linear_kv_up_proj": ("kv_b_proj",),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
NEMO_TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PARTS = tuple(dict.fromkeys(part for parts in LINEARS.values() for part in parts))
INITS = ("kaiming", "gaussian", "xavier")
SAVED_AS = ("adapter", "merged")


@dataclass
class LoraConfig:
    """Adapters of rank `dim` on a frozen model (arXiv 2106.09685): y = W x + alpha / dim x B A x."""

    # "lora": the one kind there is.
    name: str = "lora"
    # Rank of an adapter: rows of A, columns of B.
    dim: int = 32
    # What an adapter adds is taken times alpha / dim.
    alpha: float = 32.0
    # Linears with an adapter: NeMo's linear_qkv, linear_proj, linear_fc1, linear_fc2; or PEFT's q_proj, k_proj, v_proj, o_proj,
    # gate_proj, up_proj, down_proj. linear_qkv has one A for queries, keys and values, q_proj, k_proj and v_proj have three;
    # so have linear_fc1 on one side, gate_proj and up_proj on the other. In a model with experts linear_fc1 and linear_fc2 are
    # those of every expert as well, and gate_proj and up_proj are refused. Of latent attention linear_q_down_proj and
    # linear_q_up_proj (or linear_q_proj), linear_kv_down_proj, linear_kv_up_proj, linear_proj; or q_a_proj and q_b_proj (or
    # q_proj), kv_a_proj_with_mqa, kv_b_proj, o_proj.
    target_modules: list[str] = field(default_factory=lambda: list(NEMO_TARGETS))
    # Must be 0: what is dropped in a shared prompt would be so once per group, not once per response.
    dropout: float = 0.0
    # Take alpha / sqrt(dim) instead (arXiv 2312.03732), which keeps its size where dim is large.
    rslora: bool = False
    # How A is drawn, B is 0: "kaiming" (PEFT's default, uniform up to 1 / sqrt(inputs)), "gaussian" (PEFT's, of deviation
    # 1 / dim) or "xavier" (NeMo's, normal).
    init: Start[str] = "kaiming"
    # Adapter to begin with: a folder of PEFT's (adapter_config.json, adapter_model.safetensors) or a checkpoint of a run with
    # adapters. null: a new one.
    restore_from_path: str | None = None
    # What exp_manager.save_hf writes: "adapter", a folder of PEFT's, or "merged", the whole model with the adapters in it.
    saved_as: Record[str] = "adapter"

    def __post_init__(self):
        self.target_modules = list(self.target_modules)
        for broken, message in self._rules():
            if broken:
                raise UserError(message)

    def _rules(self):
        yield (
            self.name != "lora",
            f"model.peft.name must be lora, got {self.name!r}; set model.peft=null to train all weights",
        )
        yield self.dim < 1, f"model.peft.dim={self.dim} must be at least 1"
        yield not self.alpha > 0, f"model.peft.alpha={self.alpha} must be above 0"
        yield (
            self.dropout != 0,
            f"model.peft.dropout={self.dropout}: a shared prefix would be dropped once per group, not once per response, so "
            "grouping and repeating would differ; set it to 0",
        )
        for key, known in (("init", INITS), ("saved_as", SAVED_AS)):
            value = getattr(self, key)
            yield value not in known, f"model.peft.{key} must be one of {', '.join(known)}, got {value!r}"
        known = tuple(dict.fromkeys((*NEMO_TARGETS, *LINEARS, *PARTS)))
        yield not self.target_modules, f"model.peft.target_modules is empty: name some of {', '.join(known)}"
        for target in self.target_modules:
            yield (
                target not in known,
                f"model.peft.target_modules: {target!r} is no linear of a layer; there are {', '.join(known)}",
            )
        named = [part for target in self.target_modules for part in LINEARS.get(target, (target,))]
        for part in PARTS:
            targets = [t for t in self.target_modules if part in LINEARS.get(t, (t,))]
            yield (
                named.count(part) > 1,
                f"model.peft.target_modules: {' and '.join(targets)} both adapt {part}; name one of them",
            )

    @property
    def scale(self) -> float:
        """What B A x is taken times."""
        return self.alpha / (math.sqrt(self.dim) if self.rslora else self.dim)

    @property
    def parts(self) -> tuple[str, ...]:
        """Hugging Face's linears that are adapted, in a layer's order."""
        return tuple(part for part in PARTS if any(part in LINEARS.get(t, (t,)) for t in self.target_modules))

    def branches(self, linear: str) -> dict[str, tuple[str, ...]]:
        """Of a linear of ours, the name of each A and the parts whose B reads it; empty: it has no adapter."""
        if linear in self.target_modules:
            return {linear: LINEARS[linear]}
        return {part: (part,) for part in LINEARS[linear] if part in self.target_modules}
