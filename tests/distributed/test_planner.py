"""The planner's bytes are those of real ranks: state exactly, what autograd saves exactly or nearly, what is sent nearly."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_ext.adapters import LoraConfig
from megatron_ext.planner import Job
from megatron_ext.planner.activations import EAGER, StreamShape, stage_activations
from megatron_ext.planner.buffers import state_bytes
from megatron_ext.planner.communication import data_traffic, pass_traffic
from megatron_ext.planner.parameters import ParameterTensor, stage_parameters, trained_of_stage
from megatron_ext.runtime.distributed import ParallelSizes
from megatron_ext.vision import VisionConfig
from tests.distributed.planner_scenarios import (
    ActivationCase,
    Held,
    Layout,
    StateCase,
    activations,
    planned_job,
    pretended,
    states,
    traffic,
)
from tests.gpt_cases import LATENT, small_config
from tests.harness import run_ranks

pytestmark = pytest.mark.distributed

# Name -> layout. 3 ranks: lengths that do not divide by them are padded.
LAYOUTS = {
    "dp3": Layout(3, ParallelSizes()),
    "pp2 dp2": Layout(4, ParallelSizes(pipeline=2)),
    # More ranks than key/value heads.
    "tp4 dp2": Layout(8, ParallelSizes(tensor=4), [2, 7]),
    "cp3 dp2": Layout(6, ParallelSizes(context=3), [0, 5]),
    "dp4 ep2": Layout(4, ParallelSizes(expert=2), [0, 3]),
    "tp2 ep2 dp4": Layout(8, ParallelSizes(tensor=2, expert=2, expert_tensor=1), [0, 5]),
    "tp2 pp4 cp2 dp3": Layout(48, ParallelSizes(tensor=2, pipeline=4, context=2), [0, 13, 47]),
}
# Stages of other layers than an even share: these fields beside a case's.
SPLITS = {
    "pp2 dp3 uneven": (Layout(6, ParallelSizes(pipeline=2), [0, 5]), {"num_layers_in_first_pipeline_stage": 3}),
    "pp2 dp2 in pieces": (Layout(4, ParallelSizes(pipeline=2)), {"virtual_pipeline_model_parallel_size": 2}),
}
REAL = "tp2 cp2, on gloo"
LATENT_TARGETS = ["linear_q_down_proj", "q_b_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]
TARGETS = (["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ["q_proj", "v_proj", "up_proj", "o_proj"])
OPTIMIZERS = ("adam", "distributed_fused_adam")
# Rotary tables (48 bytes, of each piece of a stage) and numbers such as gradient norms.
SMALL = 256


def state_cases() -> list[StateCase]:
    """Both precisions and optimizers, tied and untied embeddings, one block alone, a media projector; odd sizes, drawn."""
    draw = random.Random()
    fields = {
        "num_layers": 4,
        "hidden_size": draw.randrange(16, 40, 2),
        "ffn_hidden_size": draw.randrange(4, 60, 4),
        "vocab_size": draw.randrange(20, 90),
    }
    print(fields)
    varied = [
        {},
        {"precision": "bf16"},
        {
            "precision": "bf16",
            "share_embeddings_and_output_weights": False,
            "add_qkv_bias": False,
            "softmax_type": "learnable",
        },  # fmt: skip
        {"precision": "bf16", "vision": VisionConfig(7)} | LATENT,
        {
            "precision": "bf16",
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": draw.randrange(4, 60, 4),
            "moe_layer_freq": 2,
            "moe_shared_expert_intermediate_size": 8,
            "moe_shared_expert_gate": True,
        },
        {"precision": "bf16", "peft": LoraConfig(dim=draw.randrange(1, 9), target_modules=draw.choice(TARGETS))},
        {
            "precision": "bf16",
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": draw.randrange(4, 60, 4),
            "moe_layer_freq": 2,
            "moe_shared_expert_intermediate_size": 8,
            "peft": LoraConfig(dim=draw.randrange(1, 9)),
        },
        {"num_moe_experts": 4, "add_bias_linear": True, "peft": LoraConfig(dim=draw.randrange(1, 9))},
        LATENT | {"precision": "bf16", "peft": LoraConfig(dim=draw.randrange(1, 9), target_modules=LATENT_TARGETS)},
    ]
    cases = [
        StateCase(fields | more, optimizer, block)
        for more in varied
        for optimizer in OPTIMIZERS
        for block in (None, 1)
        if block is None or more == varied[1]
    ]
    host, bf16 = {"optimizer_cpu_offload": True}, {"exp_avg_dtype": "bfloat16"}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    kept = [
        (0, "adam", host),
        (1, "distributed_fused_adam", host),
        # Neither none nor all of any tensor.
        (1, "distributed_fused_adam", host | bf16 | {"optimizer_offload_fraction": draw.uniform(0.1, 0.9)}),
        (0, "distributed_fused_adam", bf16 | {"exp_avg_sq_dtype": "bfloat16"} | overlap),
        (2, "adam", {"exp_avg_sq_dtype": "bfloat16"}),
    ]
    print(kept)
    return cases + [StateCase(fields | varied[number], optimizer, optim=optim) for number, optimizer, optim in kept]


def trained_of(case: StateCase, real: Held) -> list[ParameterTensor]:
    if case.block is None:
        return trained_of_stage(real.config, real.stage, blocks=0)
    of_block = [p for p in stage_parameters(real.config, real.stage) if p.layer == case.block]
    return [p for p in of_block if real.config.peft is None or p.adapter]


class Pretended:
    """Everything that one process finds out as ranks of many worlds."""

    def __init__(self):
        self.states, self.activations, self.traffic = state_cases(), activation_cases(24), traffic_cases()
        questions = [
            (states, list(LAYOUTS.values()), self.states),
            (activations, list(ACTIVATION_LAYOUTS.values()), self.activations),
            (traffic, list(TRAFFIC_LAYOUTS.values()), self.traffic),
        ]
        whole = [case for case in self.states if case.block is None]  # one block alone does not train in pieces
        self.split = {
            name: [replace(case, fields=case.fields | fields) for case in whole] for name, (_, fields) in SPLITS.items()
        }
        questions += [(states, [SPLITS[name][0]], cases) for name, cases in self.split.items()]
        (answers,) = run_ranks(pretended, 1, questions)
        names = (LAYOUTS, ACTIVATION_LAYOUTS, TRAFFIC_LAYOUTS)
        self.held, self.saved, self.sent = (
            dict(zip(n, a, strict=True)) for n, a in zip(names, answers[:3], strict=True)
        )
        self.held |= {name: answer[0] for name, answer in zip(SPLITS, answers[3:], strict=True)}
        # One layout is not pretended.
        self.held[REAL] = run_ranks(states, 4, self.states, sizes=ParallelSizes(tensor=2, context=2))

    def states_of(self, name: str) -> list[tuple[StateCase, Held]]:
        """Every case on the ranks of a layout."""
        cases = self.split.get(name, self.states)
        return [pair for rank in self.held[name] for pair in zip(cases, rank, strict=True)]


@pytest.fixture(scope="module")
def found() -> Pretended:
    return Pretended()


@pytest.fixture(params=[*LAYOUTS, *SPLITS, REAL])
def held(request, found) -> list[tuple[StateCase, Held]]:
    return found.states_of(request.param)


def test_parameters_have_the_real_names_shapes_and_order(held):
    for _, real in held:
        planned = stage_parameters(real.config, real.stage)
        assert [(p.name, p.shape) for p in planned] == [(name, shape) for name, shape, _ in real.parameters]
        if real.config.tensor_model_parallel_size > 1:
            marked = [sharded for _, _, sharded in real.parameters]
            # An expert's second bias is whole, and marked on the rank that counts it in the norm of all gradients.
            whole = {i for i, p in enumerate(planned) if p.expert and p.name.endswith("linear_fc2.bias")}
            assert all(p.sharded == marked[i] for i, p in enumerate(planned) if i not in whole)
            assert not any(planned[i].sharded for i in whole)


def test_state_bytes_are_exact(held):
    """Nothing else of any size is alive either: torch's own step counters, 4 bytes for a tensor, apart."""
    for case, real in held:
        parameters = stage_parameters(real.config, real.stage)
        trained = trained_of(case, real)
        frozen = [p for p in parameters if p not in trained]
        how = case.optimizer != "adam", case.settings.moments
        apart = [p for p in trained if p.expert and real.config.expert_model_parallel_size > 1]
        dense = [p for p in trained if p not in apart]
        planned = state_bytes(real.config, dense, frozen, real.data_ranks, real.data_rank, *how)
        planned += state_bytes(real.config, apart, [], real.expert_ranks, real.expert_rank, *how)
        found = {name: getattr(planned, name) for name in real.bytes}
        assert (found["host"] > 0) == (case.settings.moments.on_host > 0 and planned.optimizer_tensors > 0)
        assert found == real.bytes, (case, real.stage, real.data_rank)
        assert planned.optimizer_tensors == real.optimizer_tensors
        small = SMALL * real.config.pipeline_split.pieces
        if (
            real.config.num_moe_experts is not None
        ):  # routers count their tokens, and a loss; dispatchers have indices of them
            routers = sum(p.name.endswith("router.weight") for p in parameters)
            small += routers * 8 * (1 + 3 * real.config.num_moe_experts * real.config.expert_tensor_ranks)
        assert real.other_bytes <= 4 * planned.optimizer_tensors + small
        if case.block is None:
            assert sum(real.bytes.values()) > 1000  # it is not about nothing


@pytest.mark.parametrize("name", ["dp3", "pp2 dp2", "pp2 dp2 in pieces", REAL])
def test_the_fullest_rank_is_found(name, found):
    """Layouts of which every rank was looked at."""
    by_stage: dict = {}
    for case, real in found.states_of(name):
        by_stage.setdefault((repr(case), real.stage), []).append((case, real))
    for ranks in by_stage.values():
        case, real = ranks[0]
        parameters = stage_parameters(real.config, real.stage)
        trained = trained_of(case, real)
        frozen = [p for p in parameters if p not in trained]
        sharded = case.optimizer != "adam"
        moments = case.settings.moments
        fullest = state_bytes(real.config, trained, frozen, real.data_ranks, None, sharded, moments)
        # A share of each tensor is rounded.
        slack = 4 * max(r.optimizer_tensors for _, r in ranks) if 0 < moments.on_host < 1 else 0
        for kind in ("optimizer", "host"):
            assert abs(getattr(fullest, kind) - max(r.bytes[kind] for _, r in ranks)) <= slack


ACTIVATION_LAYOUTS = {
    "one": Layout(1, ParallelSizes()),
    "tp2": Layout(2, ParallelSizes(tensor=2)),
    "tp2 pp2": Layout(4, ParallelSizes(tensor=2, pipeline=2)),
    "tp4": Layout(4, ParallelSizes(tensor=4), [1]),
    "cp2": Layout(2, ParallelSizes(context=2)),
}


def activation_cases(count: int) -> list[ActivationCase]:
    """Drawn: grouped and repeated, with and without recomputation, sequence parallelism, bf16."""
    draw, cases = random.Random(), []
    for number in range(count):
        heads = draw.choice([4, 8])
        fields = {
            "num_layers": draw.choice([2, 4]),
            "hidden_size": draw.randrange(16, 80, 8),
            "ffn_hidden_size": draw.randrange(16, 120, 8),
            "num_attention_heads": heads,
            "num_query_groups": draw.choice([2, heads]),
            "kv_channels": draw.choice([4, 8]),
            "qk_layernorm": draw.random() < 0.5,
            "precision": draw.choice(["32", "bf16"]),
            "activations_checkpoint_granularity": (None, "selective", "full")[number % 3],
        }
        if number % 3 == 2:
            fields["activation_offload"] = draw.random() < 0.5
        if draw.random() < 0.5:
            fields["sequence_parallel"] = False
        if number % 8 > 5:
            fields |= LATENT
        groups = [(draw.randint(0, 40), [draw.randint(1, 20) for _ in range(4)]) for _ in range(draw.randint(1, 3))]
        cases.append(ActivationCase(fields, groups, share_prefix=number % 2 == 0))
    print(cases)
    return cases


@pytest.mark.parametrize("name", ACTIVATION_LAYOUTS)
def test_activation_bytes_are_what_autograd_saves(name, found):
    """Exactly without sequence parallelism, whose index tables are counted for the fullest rank; of latent attention nearly."""
    sizes = ACTIVATION_LAYOUTS[name].sizes
    for rank in found.saved[name]:
        for case, real in zip(found.activations, rank, strict=True):
            config = small_config(**({"sequence_parallel": sizes.tensor > 1} | case.fields | sizes.named)).on("cpu")
            stream = StreamShape(real["tokens"], real["predicted"], gathered=real["gathered"])
            planned = stage_activations(config, real["stage"], stream, EAGER)
            # What is computed again holds the tables of rotary positions, not autograd.
            seen = planned.kept - (planned.shared if config.activations_checkpoint_granularity else 0)
            near = config.sequence_parallel or sizes.context > 1
            bound = 0.1 if near else 0.03 if config.multi_latent_attention else 1e-12
            assert seen == pytest.approx(real["saved"], rel=bound), (case, real)
            assert planned.host * planned.layers == real["host"]
            assert (real["host"] > 0) == case.fields.get("activation_offload", False)


# One kind of parallelism each, so that every collective's kind is known. The pipeline's needs real ranks, see below.
TRAFFIC_LAYOUTS = {
    "tensor": Layout(4, ParallelSizes(tensor=4), [0]),
    "context": Layout(2, ParallelSizes(context=2), [0]),
    "data": Layout(3, ParallelSizes(), [0]),
}


def traffic_cases() -> list[ActivationCase]:
    draw = random.Random()
    sizes = {"num_query_groups": 4, "hidden_size": 8 * draw.randint(8, 16), "ffn_hidden_size": 96, "num_layers": 4}
    group = (draw.randint(30, 60), [draw.randint(10, 30)] * 4)
    longer = (draw.randint(100, 140), [draw.randint(40, 60)] * 4)  # an all-to-all sends no pad: let it be small
    a2a = {"cp_comm_type": "a2a"}
    full = {"activations_checkpoint_granularity": "full"}
    cases = [
        ActivationCase(sizes | more, [groups] * 3, share_prefix=share)
        for more, groups in (
            ({}, group),
            ({"sequence_parallel": False}, group),
            (full, group),
            ({"num_query_groups": 2} | full, group),
            (a2a, longer),
            (a2a | full, longer),
        )
        for share in (True, False)
    ]
    print(cases)
    return cases


@pytest.mark.parametrize("kind", TRAFFIC_LAYOUTS)
def test_bytes_sent_are_those_of_the_collectives_called(kind, found):
    """Within 5 %: padding of buffers and of gathered rows is not counted, that of a stream is."""
    layout = TRAFFIC_LAYOUTS[kind]
    for case, real in zip(found.traffic, found.sent[kind][0], strict=True):
        job = planned_job(case, layout)
        (microbatch,) = job.microbatches
        passes = {
            backward: sum(t.sent for t in pass_traffic(job, microbatch, backward) if t.kind == kind)
            for backward in (False, True)
        }
        summed = sum(t.sent for t in data_traffic(job, 0))
        forward, both, step = (sum(real[name].values()) for name in ("forward", "both", "step"))
        if kind == "data":
            assert (forward, passes[True]) == (0, 0)
            assert summed == pytest.approx(both + step, rel=0.05) and summed > 0
        else:
            ring = data_ring(job) if kind == "context" else 0.0  # gradients are summed over these ranks, too
            both -= ring
            assert passes[False] == pytest.approx(forward, rel=0.05)
            assert passes[True] == pytest.approx(both, rel=0.05, abs=0.05 * ring)
            # Responses stay whole on a rank: of repeated prompts nothing is gathered.
            exchanged = job.model.cp_comm_type == "a2a"
            assert (forward > 0) == (kind == "tensor" or case.share_prefix or exchanged)
            assert (real["forward"]["exchange"] > 0) == (kind == "context" and exchanged)


PIPELINE = Layout(4, ParallelSizes(pipeline=4))


def test_bytes_sent_along_the_pipeline_are_those_of_real_stages(found):
    """Four ranks: those in the middle send what is planned, the first no gradients and the last only them."""
    ranks = run_ranks(traffic, PIPELINE.world, found.traffic, sizes=PIPELINE.sizes)
    for number, case in enumerate(found.traffic):
        job = planned_job(case, PIPELINE)
        (microbatch,) = job.microbatches
        forward, both = (
            sum(t.sent for t in pass_traffic(job, microbatch, backward) if t.kind == "pipeline")
            for backward in (False, True)
        )
        assert both == 2 * forward > 0
        sent = [rank[number] for rank in ranks]
        assert [rank["forward"]["send"] for rank in sent] == [forward] * 3 + [0]
        assert [rank["both"]["send"] for rank in sent] == [forward, both, both, forward]
        assert all(rank["step"]["send"] == 0 for rank in sent)


EXPERTS = Layout(2, ParallelSizes(expert=2))


def test_bytes_sent_to_experts_are_those_of_real_ranks():
    """Two ranks whose experts are equally busy, as the planner has it; weights of tokens, which travel with them, are little."""
    draw = random.Random()
    sizes = {
        "num_query_groups": 4, "hidden_size": 8 * draw.randint(8, 16), "num_layers": 4, "num_moe_experts": 4,
        "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": draw.choice([1, 2, [0, 1, 1, 1]]),
    }  # fmt: skip
    groups = [(draw.randint(30, 60), [draw.randint(10, 30)] * 4)] * 3
    full = {"activations_checkpoint_granularity": "full"}
    cases = [ActivationCase(sizes | more, groups, share_prefix=share) for more in ({}, full) for share in (True, False)]
    print(cases)
    ranks = run_ranks(traffic, EXPERTS.world, cases, sizes=EXPERTS.sizes)
    for number, case in enumerate(cases):
        job = planned_job(case, EXPERTS)
        for backward, name in ((False, "forward"), (True, "both")):
            (planned,) = (t for t in pass_traffic(job, job.microbatches[0], backward) if t.kind == "expert")
            for rank in ranks:
                assert planned.sent == pytest.approx(rank[number][name]["exchange"], rel=0.05) and planned.sent > 0
        assert all(rank[number]["step"]["exchange"] == 0 for rank in ranks)


def data_ring(job: Job) -> float:
    """What the scatter of gradients sends, without the gather of parameters."""
    (found,) = data_traffic(job, 0)
    return found.sent / 2  # fp32 both
