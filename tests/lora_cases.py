"""Adapters that PEFT makes on small models of transformers, and what PEFT computes with them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ext.adapters import adapter_parameters
from tests.hf_models import all_in_fp64

__all__ = [
    "EXPERT_TARGETS",
    "LATENT_TARGETS",
    "SHARED",
    "TARGETS",
    "adapter_tensors",
    "difference",
    "draw_adapters",
    "least_gap",
    "make_peft_adapter",
    "peft_gradients",
    "peft_greedy",
    "peft_logits",
    "shared_gradients",
]

# (target_modules of ours, PEFT's names, whether use_rslora).
TARGETS: dict[str, tuple[list[str], list[str], bool]] = {
    "nemo": (
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        False,
    ),
    "peft": (["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], True),
    "some": (["v_proj", "q_proj", "up_proj", "down_proj"], ["q_proj", "v_proj", "up_proj", "down_proj"], False),
}
# Of latent attention, in place of some of these.
LATENT_TARGETS: dict[str, tuple[list[str], list[str], bool]] = {
    "latent": (
        ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"],
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        False,
    ),
    "latent, some": (["q_proj", "kv_b_proj"], ["q_proj", "kv_b_proj"], True),
}
# Of models with experts also these.
EXPERT_TARGETS = (
    TARGETS
    | LATENT_TARGETS
    | {
        "outer": (["q_proj", "down_proj"], ["q_proj", "down_proj"], False),
        "latent, outer": (
            ["kv_a_proj_with_mqa", "linear_kv_up_proj", "down_proj"],
            ["kv_a_proj_with_mqa", "kv_b_proj", "down_proj"],
            False,
        ),
        "inner": (["o_proj", "linear_fc1"], ["o_proj", "gate_proj", "up_proj"], True),
    }
)
SIZE = 0.4  # of random adapters: they change what is said, and do not make of rounding a difference
SHARED = {"linear_qkv": ("q_proj", "k_proj", "v_proj"), "linear_fc1": ("gate_proj", "up_proj")}


def draw_adapters(model: torch.nn.Module, rng: torch.Generator) -> None:
    """Adapters that change what the model says: B is not 0."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.size(1) ** 0.5)


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Of a folder of PEFT's."""
    return load_file(str(folder / "adapter_model.safetensors"))


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert found.keys() == expected.keys()
    gap = sum((found[n].double() - e.double()).square().sum() for n, e in expected.items())
    return (gap / sum(e.double().square().sum() for e in expected.values())).sqrt().item()


def _load(source: Path, adapter: Path | None = None, **how):
    from transformers import AutoModelForCausalLM

    how = {"dtype": torch.float32, "attn_implementation": "eager"} | how
    model = AutoModelForCausalLM.from_pretrained(str(source), **how).eval()
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()


def make_peft_adapter(source: Path, folder: Path, name: str, rng: torch.Generator, dim: int = 4, **changes) -> None:
    """What PEFT saves, with a B that is not 0; parts that share an A here have the same."""
    from peft import LoraConfig, get_peft_model

    targets, theirs, rslora = EXPERT_TARGETS[name]
    base = _load(source)
    modules, parameters = _in_peft(base, theirs)
    config = LoraConfig(
        r=dim, lora_alpha=6, target_modules=modules, target_parameters=parameters, use_rslora=rslora, task_type="CAUSAL_LM",
        **changes,
    )  # fmt: skip
    model = get_peft_model(base, config)
    with torch.no_grad():
        for module in model.modules():
            if not hasattr(module, "lora_A") or "default" not in getattr(module, "lora_A", {}):
                continue
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            for matrix, width in ((a, a.size(1)), (b, dim)):
                matrix.copy_(SIZE * torch.randn(matrix.shape, generator=rng) / width**0.5)
        for parts in (SHARED[target] for target in targets if target in SHARED):
            for around in model.modules():
                if all(hasattr(around, part) for part in parts):
                    first, *rest = (getattr(around, part).lora_A["default"].weight for part in parts)
                    for other in rest:
                        other.copy_(first)
    model.save_pretrained(str(folder))


def _in_peft(model: torch.nn.Module, parts: list[str]) -> tuple[list[str], list[str] | None]:
    """(target_modules, target_parameters). Those of MLPs are parameters in a model with experts, whose own are packed."""
    names = [re.sub(r".*layers\.\d+\.", "", name) for name, _ in model.named_parameters()]
    if not any(name.startswith("mlp.experts.") for name in names):
        return parts, None
    packed = {"gate_up_proj" if part in SHARED["linear_fc1"] else part for part in parts}
    found = {
        name
        for name in names
        if (name.startswith("mlp.experts.") and name.rpartition(".")[2] in packed)
        or (
            name.startswith("mlp.")
            and name.removesuffix(".weight").rpartition(".")[2] in parts
            and name.endswith(".weight")
        )
    }
    return [part for part in parts if part[0] in "qkvo"], sorted(found) or None


@torch.no_grad()
def peft_logits(source: Path, adapter: Path, texts: list[list[int]]) -> list[Tensor]:
    model = _load(source, adapter)
    return [model(torch.tensor([text])).logits[0] for text in texts]


@torch.no_grad()
def least_gap(source: Path, adapter: Path, texts: list[list[int]]) -> float:
    """Of all tokens and layers, between the router's logits of the last expert that is taken and of the first that is not."""
    model, found = _load(source, adapter), []
    for text in texts:
        for logits in model(torch.tensor([text]), output_router_logits=True).router_logits:
            last, first = logits.topk(model.config.num_experts_per_tok + 1).values[:, -2:].unbind(-1)
            found.append((last - first).min().item())
    return min(found)


@torch.no_grad()
def peft_greedy(source: Path, adapter: Path, prompts: list[list[int]], length: int) -> list[list[int]]:
    """The likeliest tokens behind each prompt, one after the other."""
    model, found = _load(source, adapter), []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(length):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        found.append(text[len(prompt) :])
    return found


def shared_gradients(gradients: dict[str, Tensor], targets: list[str]) -> dict[str, Tensor]:
    """PEFT's as ours are, by the same names: of an A that several parts of a target share, the sum of theirs."""
    found = dict(gradients)
    for parts in (SHARED[target] for target in targets if target in SHARED):
        for name in [n for n in found if f"{parts[0]}.lora_A" in n]:
            alike = [name.replace(parts[0], part) for part in parts]
            found |= dict.fromkeys(alike, sum(gradients[n] for n in alike))
    return found


def peft_gradients(
    source: Path, adapter: Path, rows: list[tuple[list[int], list[int]]], factors: Tensor
) -> tuple[dict[str, Tensor], float]:
    """Of the sum of factor x log-probability over the tokens of (prompt, response) rows, one sequence at a time; by the names
    in PEFT's file, in fp64. And what fp32 makes of them, the norm of its difference over theirs.

    Args:
        factors: [r], in the order of the rows' responses.
    """
    single = _gradients(_load(source, adapter), rows, factors)
    double = _load(source, adapter, experts_implementation="eager").double()
    with all_in_fp64():
        exact = _gradients(double, rows, factors.double())
    return exact, difference(single, exact)


def _gradients(model, rows: list[tuple[list[int], list[int]]], factors: Tensor) -> dict[str, Tensor]:
    done = 0
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0]
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found = logprobs.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)
        (found * factors[done : done + len(response)]).sum().backward()
        done += len(response)
    assert done == len(factors)
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
