"""What every rank does with adapters: read PEFT's, answer, take gradients, write them again, train, save and go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_ext.adapters import LoraConfig, adapter_parameters, without_adapters
from megatron_ext.grouping import PackedTokens
from megatron_ext.hf import export_hf, hf_model_config, load_hf_weights
from megatron_ext.hf.adapter_files import export_adapters, load_adapter_folder, write_adapters
from megatron_ext.hf.adapter_folder import AdapterFolder
from megatron_ext.models import build_gpt
from megatron_ext.models.config import stream_multiple
from megatron_ext.models.media import pack_prompts
from megatron_ext.models.prompt_streams import text_logits
from megatron_ext.rollouts import SamplingParams
from megatron_ext.runtime.checkpoint import CheckpointSave, load_adapters, load_optimizer, read_adapters
from megatron_ext.runtime.engine import Engine, Microbatch
from megatron_ext.runtime.reference import ReferenceBase
from tests.distributed.hf_scenarios import gather
from tests.distributed.scenarios import copies, optim
from tests.edges import Edges
from tests.sampling import generate

__all__ = ["AdapterCase", "adapters", "export_gradients", "steps_are_clear"]


@dataclass
class AdapterCase:
    """
    Attributes:
        source, adapter: folders of a model and of PEFT's adapter on it.
        peft: its configuration.
        prompts, responses: a batch; factors: of each predicted token [r].
        texts: whose logits are wanted.
        folder: to write to; load: a checkpoint that another layout has left, and went on from.
    """

    source: Path
    adapter: Path
    peft: LoraConfig
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    factors: Tensor
    texts: list[list[int]]
    folder: Path
    optimizer: str = "distributed_fused_adam"
    load: Path | None = None


def adapters(device: torch.device, layout: dict, cases: list[AdapterCase]) -> list[dict[str, Any]]:
    return [_case(device, layout, case) for case in cases]


def _loss(factors: Tensor):
    return lambda microbatch, logprobs, entropy: ((logprobs * factors).sum(), {"loss": logprobs.detach().sum()})


def _build(device: torch.device, layout: dict, case: AdapterCase):
    model = build_gpt(hf_model_config(case.source, precision="32", peft=case.peft, **layout), device)
    load_hf_weights(case.source, model)
    return model


def _batch(device: torch.device, model, case: AdapterCase) -> PackedTokens:
    config = model.model_config
    scheme = config.position_embedding.scheme
    return pack_prompts(case.prompts, case.responses, scheme, stream_multiple(config), device)


def steps_are_clear(device: torch.device, case: AdapterCase) -> bool:
    """Whether rounding decides nothing of the first two steps, such as which experts a token takes. One rank asks."""
    model = _build(device, {}, case)
    load_adapter_folder(AdapterFolder.open(case.adapter), model)
    engine, batch = Engine(model, optim(case.optimizer), total_steps=10), _batch(device, model, case)
    with Edges() as edges:
        for _ in range(2):
            engine.update([Microbatch(batch)] * 2, _loss(case.factors))
    return edges.clear


def _case(device: torch.device, layout: dict, case: AdapterCase) -> dict[str, Any]:
    model = _build(device, layout, case)
    fresh = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    found: dict[str, Any] = {"base answers": [text_logits(model, text).cpu() for text in case.texts]}
    export_adapters(model, case.folder / "fresh")
    load_adapter_folder(AdapterFolder.open(case.adapter), model)
    assert any(not torch.equal(fresh[name], p) for name, p in adapter_parameters(model).items())
    found["answers"] = [text_logits(model, text).cpu() for text in case.texts]
    with without_adapters(model):
        found["without"] = [text_logits(model, text).cpu() for text in case.texts]
    found["greedy"] = generate(model, case.prompts, 2, SamplingParams(6, use_greedy=True))
    export_adapters(model, case.folder / "again", str(case.source), "hugging_face:1234")
    export_hf(model, case.folder / "merged", source=case.source)
    found["gathered"] = gather(model, torch.float32, False, 30_000)
    base = copies(model)

    engine = Engine(model, optim(case.optimizer), total_steps=10)
    batch = _batch(device, model, case)
    data = parallel_state.get_data_parallel_world_size()
    found["runs"] = max(2, data)
    microbatches = [Microbatch(batch)] * (found["runs"] // data)
    engine.zero_grad()
    engine.run(microbatches, _loss(case.factors))
    export_gradients(model, case.folder / "gradients")
    found |= _costs(engine, model)

    reference = ReferenceBase(engine)
    with reference.used():
        found["reference"] = engine.score(microbatches)[0]
    found["reference bytes"] = reference.nbytes
    found["losses"] = [engine.update(microbatches, _loss(case.factors)) for _ in range(2)]
    CheckpointSave(case.folder / "checkpoint", model, {"model": {}}, engine.optimizer).finish()
    trained = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    export_adapters(model, case.folder / "trained")
    if dist.get_world_size() == 1:  # as tools/convert_hf.py does it
        write_adapters(model.model_config, case.folder / "told", read_adapters(case.folder / "checkpoint"))
    found["losses"] += [engine.update(microbatches, _loss(case.factors)) for _ in range(2)]
    end = copies(model)
    found["base changed"] = [n for n, p in end.items() if n not in trained and not torch.equal(p, base[n])]
    found["adapters kept"] = [n for n in trained if torch.equal(end[n], base[n])]
    found["adapters"] = list(trained)

    again = _build(device, layout, case)
    load_adapters(case.folder / "checkpoint", again)
    assert all(torch.equal(p, trained[name]) for name, p in adapter_parameters(again).items())
    resumed = Engine(again, optim(case.optimizer), total_steps=10)
    load_optimizer(case.folder / "checkpoint", again, resumed.optimizer)
    resumed.scheduler.step(increment=2)
    found["resumed losses"] = [resumed.update(microbatches, _loss(case.factors)) for _ in range(2)]
    found["resumed bitwise"] = all(torch.equal(value, end[name]) for name, value in copies(again).items())
    if case.load is not None:
        load_adapters(case.load, again)
        export_adapters(again, case.folder / "moved")
    return found


@torch.no_grad()
def export_gradients(model: torch.nn.Module, folder: Path) -> None:
    """In PEFT's files, as if they were the adapters."""
    adapters = adapter_parameters(model).values()
    own = [p.clone() for p in adapters]
    for parameter in adapters:
        parameter.copy_(parameter.main_grad)
    export_adapters(model, folder)
    for parameter, value in zip(adapters, own, strict=True):
        parameter.copy_(value)


def _costs(engine: Engine, model: torch.nn.Module) -> dict[str, int]:
    """Numbers in gradient buffers and of parameters that train and that do not, on this rank."""
    buffers = [b for piece in engine.pieces for b in (*piece.buffers, *piece.expert_parallel_buffers)]
    state = (
        engine.optimizer.chained_optimizers if hasattr(engine.optimizer, "chained_optimizers") else [engine.optimizer]
    )
    return {
        "gradient numel": sum(b.grad_data.numel() for b in buffers),
        "optimized numel": sum(p.numel() for o in state for g in o.optimizer.param_groups for p in g["params"]),
        "adapter numel": sum(p.numel() for p in adapter_parameters(model).values()),
        "model numel": sum(p.numel() for p in model.parameters()),
    }
