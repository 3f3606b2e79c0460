"""Code for CUDA, run on tensors without memory: what the host reads, what lies on the wrong side, what has the wrong type.

    with pretended_gpu() as device, DryRun() as run:
        ...                      # raises Fault where a GPU would wait, be handed a tensor of the host, or compute in fp64
    assert run.reads == {...}    # values that the host must have: `NECESSARY` says which may be read at all

Shapes and types follow PyTorch's own rules for such tensors; flash attention and collectives are held to what theirs leave out.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron_ext.runtime.megatron_versions import VERSION
from tests.dry.flash_attn import check_backward, check_forward
from tests.dry.known import Known, routing

__all__ = ["NECESSARY", "DryRun", "Fault"]

ROOT = Path(__file__).parents[2]
CODE = ("megatron_ext/", "recipes/", "megatron/core/", "tests/")
OWN = (*(f"tests/dry/{x}.py" for x in ("run", "machine", "flash_attn", "known")), "megatron_ext/runtime/cpu.py")
# Where the host must know a value of the device, how it gets it ("value": one number; "copy": a tensor; "shape": it waits to be
# told how large a result is; "index": one that lies on the host is sent along), and why. How often in
# which step stands beside the steps (tests/dry/steps.py, recipes.py). Whatever is not here fails, and so does what is here and is
# read no more.
CHOOSE, METRICS = (
    "megatron_ext/rollouts/sampler.py:_Turn._take_tokens",
    "megatron_ext/runtime/engine.py:Engine.reduce_metrics",
)
NORM = "megatron_ext/runtime/engine.py:Engine.step"
SUM, STOP = "recipes/run/session.py:Session.sum_over_data", "recipes/run/session.py:Session.must_stop"
REWARDS = "recipes/grpo/trainer.py:GRPOTrainer"
SAMPLED = "recipes/grpo/refilling.py:RefillingSampler._round"
SHOWN, RECORDED = "recipes/grpo/samples.py:shown", "recipes/grpo/recorder.py:Recorder._groups"
SCORES = "recipes/grpo/recorder.py:old_logprobs"
OPTIONS = "recipes/video_eval/scoring.py:ask_all"
REJECTED = "recipes/grpo/batches.py:BatchMaker.without_rejected"
PAIRS, TEXTS, SHARED = (
    f"recipes/bias/scorers.py:MegatronScorer.{x}" for x in ("pair_probabilities", "token_logprobs", "_over_data")
)
SHAPES = "megatron/core/pipeline_parallel/p2p_communication.py:P2PCommunicator._communicate_shapes"
HOST_STEP, KEPT = (
    f"megatron_ext/runtime/{x}" for x in ("lean_adam.py:LeanAdamW._on_host", "reference.py:ReferenceWeights._kept")
)
ROUTED = "megatron_ext/models/router.py:ExpertRouter.forward"
ROWS, COUNTS = (
    "megatron/core/transformer/moe/moe_utils.py:permute",
    "megatron/core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
)
LOAD, STREAMS, TOKENS = (
    f"megatron_ext/runtime/expert_load.py:{x}" for x in ("finish_step", "most_of_experts", "share_out")
)
BACKWARD = "megatron/core/pipeline_parallel/schedules.py:custom_backward"
PATCHES = "megatron_ext/vision/kinds.py:_of_patches"
INPUTS = "megatron_ext/runtime/activation_offload.py:LayerInputs.pack"
IMPORTANCE, BLOCK = "megatron_ext/blocks/importance.py", "megatron_ext/blocks/delta.py:place_weights"
ENTERS, ASKED = (
    "megatron_ext/blocks/inputs.py:BlockInputs.written_down.<locals>.keep", "recipes/bias/streams.py:RowStreams.ask",
)  # fmt: skip
NEEDLES = "recipes/niah/trainer.py:NiahTrainer._right"
SEEN, SPREAD = (f"megatron_ext/vision/tower.py:VisionTower.{x}" for x in ("_on_host", "_shared"))
# 0.19 knows how many rows there are in all, and asks no more.
WAITS_FOR_ROWS = [(ROWS, "shape")] if VERSION < (0, 17) else []
NECESSARY: dict[tuple[str, str], str] = {
    (SEEN, "copy"): "what a frozen tower has computed of a clip, once, for the host to keep",
    (SPREAD, "copy"): "the same where ranks share a stream: one of them has run the tower",
    **{
        (PATCHES, x): "transformers' towers of Qwen ask how large each picture is"
        for x in ("value", "copy", "shape", "index")
    },
    (BACKWARD, "index"): "what these towers have put into windows, put back",
    (NORM, "value"): "a step that is not finite must not be taken; the norm is logged, and gradients are scaled by it",
    (METRICS, "copy"): "numbers for the log, all at once",
    (CHOOSE, "copy"): "tokens with their log-probabilities, once a step: some end their response",
    (SHAPES, "copy"): "how long a neighbouring stage's stream is: they are of different lengths",
    (HOST_STEP, "copy"): "optimizer_cpu_offload: weights and gradients to where Adam's moments are",
    (INPUTS, "copy"): "activation_offload: layers' inputs, for the host to keep",
    **dict.fromkeys(WAITS_FOR_ROWS, "which rows go to which expert, and their weights, in every layer with experts"),
    (COUNTS, "copy"): "how many rows each expert and each rank has, to cut them",
    (LOAD, "copy"): "how busy experts were, for the log",
    (STREAMS, "value"): "how many streams ranks run that share experts",
    (TOKENS, "value"): "how many tokens a step has: what the auxiliary loss of a stream weighs",
    (KEPT, "copy"): "offload_reference_policy: the reference's weights, once, before the first step",
    (SUM, "copy"): "counts that normalise a loss, and what is logged of the rollouts",
    (STOP, "value"): "whether any rank has been asked to stop, once a step",
    (SHOWN, "copy"): "rewards of the responses that a table shows",
    (SAMPLED, "copy"): "max_sampling_rounds: rewards, of which the groups that are trained are chosen",
    (RECORDED, "copy"): "rewards and advantages that are written down",
    (SCORES, "copy"): "old log-probabilities that are written down",
    (REJECTED, "copy"): "off_policy.reject_above: how many tokens and responses are left, which normalise the loss",
    (f"{REWARDS}._rollout_metrics", "value"): "how many groups learn anything, for the log",
    (f"{REWARDS}._reward_means", "copy"): "the sum and the number of each reward, for the log",
    (PAIRS, "copy"): "an evaluation's answers, a stream at a time",
    (OPTIONS, "copy"): "log-probabilities of options, a stream at a time",
    (SHARED, "copy"): "those of all data-parallel ranks",
    (TEXTS, "copy"): "log-probabilities of texts, a stream at a time",
    **{
        (f"{IMPORTANCE}:{x}", "copy"): "scores of all blocks, once, before training"
        for x in ("similarity", "gradient", "intervention")
    },
    (BLOCK, "copy"): "the weights of the block that trains, for its digest, once",
    (ENTERS, "copy"): "what enters the block that trains, a stream at a time, once for each row",
    (ASKED, "copy"): "what the model says of rows, a stream at a time, and of all data-parallel ranks'",
    (NEEDLES, "copy"): "which answers were right, a stream at a time",
}
# Where sums or shares need more digits than fp32 has.
WIDE: dict[str, str] = {
    "megatron_ext/rollouts/choosing.py:choose_tokens": "the cumulative distribution of a large vocabulary",
    METRICS: "sums over microbatches and ranks",
    **dict.fromkeys(
        ("recipes/grpo/rollouts.py:RolloutSampler._rewards", "tests/dry/steps.py:advantages"), "rewards of any size"
    ),
    **dict.fromkeys(
        ("megatron_ext/models/router.py:ExpertRouter._observe", LOAD, TOKENS), "counts of tokens, of many streams"
    ),
    **{
        f"{IMPORTANCE}:{x}": "differences of blocks that hardly differ"
        for x in ("_difference", "_gradient_squares", "_gradients", "_zeros", "similarity.<locals>.measure")
    },
}
# Their shape is known when the device has computed them: the host waits.
SHAPED_BY_VALUES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::bincount", "aten::equal", "aten::is_nonzero", "aten::histc",
}  # fmt: skip
# Collectives that PyTorch knows no form of without memory: the fake process group is given empty tensors of the host.
WITHOUT_META = tuple(
    f"c10d::{name}_coalesced_" for name in ("reduce_scatter_tensor", "allgather_into_tensor", "allreduce")
)
NUMBERS = {
    getattr(Tensor, name)
    for name in (
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
    )
}
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put")
INNER = ".<locals>.<"  # an expression with a loop counts as the function that it stands in
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object")


class Fault(AssertionError):
    """What would be wrong, or slow, on a GPU."""


class _Numbers(TorchFunctionMode):
    """Where Python asks a tensor of the device for its number: below this PyTorch refuses, without asking anybody."""

    def __init__(self, told: Callable[[str, Tensor], Tensor], known: Known):
        super().__init__()
        self._told, self._known = told, known

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in NUMBERS and args[0].is_meta:
            return function(self._told("copy" if function is Tensor.tolist else "value", args[0]), *args[1:])
        name = getattr(function, "__name__", None)
        if name in ("tensor", "as_tensor", "arange"):  # of a list with tensors, or up to one: each is read
            args = tree_map_only(Tensor, lambda x: self._told("value", x) if x.is_meta else x, args)
        if name == "tensor":
            return self._made(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _made(self, function, args: tuple, kwargs: dict) -> Tensor:
        """What the host has written down is known."""
        made = function(*args, **kwargs)
        if isinstance(made, Tensor) and made.is_meta and not made.is_floating_point():
            self._known.declare(made, function(*args, **kwargs | {"device": "cpu"}))
        return made


class DryRun(TorchDispatchMode):
    """
    Args:
        shapes: what a neighbouring pipeline stage says of the tensor that it sends.

    Attributes:
        reads: how often the host has read what of `NECESSARY`.
        operations: how often each operation has run on the device.
        places: functions in which one has, and their callers.
    """

    def __init__(self, shapes: tuple[int, ...] = ()):
        super().__init__()
        self._shapes = shapes
        self.reads: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self._seen: dict[int, CodeType] = {}
        self._known = Known()
        self._numbers = _Numbers(self._told, self._known)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        here = [x for x in tensors if x.is_meta]
        if name.startswith("c10d::"):
            self._check_collective(name, tensors)
            if name in WITHOUT_META:
                return function(*tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), args))
        elif here:
            self.operations[name] += 1
            self._look()
            given = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
            if (read := self._read(name, function, given, here)) is not None:
                return read
            self._check_sides(name, tensors)
            self._check_attention(name, given)
        out = function(*args, **kwargs)
        if here:
            self._known.follow(function, args, kwargs, out)
            if name == "aten::scatter_" and place() == ROUTED and out.dtype == torch.bool:
                self._known.declare(out, routing(out.shape, args[2].size(1)))
        if _wide(_tensors((out,))) and not _wide(here):
            if (where := place()) not in WIDE:
                raise Fault(f"{where}: {name} gives fp64 on the device, which `WIDE` does not know")
        return out

    def __enter__(self) -> DryRun:
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._numbers.__exit__(*exception)

    @property
    def places(self) -> set[str]:
        return {where for code in self._seen.values() if (where := _place(code))}

    def _look(self) -> None:
        """Who is at work; a function that has been seen has been so with its callers."""
        frame = sys._getframe(2)
        while frame is not None and not _place(frame.f_code):
            frame = frame.f_back
        if frame is None or id(frame.f_code) in self._seen:
            return
        while frame is not None:
            self._seen[id(frame.f_code)] = frame.f_code
            frame = frame.f_back

    def _read(self, name: str, function, given: dict, here: list[Tensor]):
        """What the host is told where it may read; None: it does not."""
        if name == "aten::_to_copy" and _is_host(given.get("device")):
            told = self._told("copy", here[0])
            return told if given.get("dtype") is None else told.to(given["dtype"])
        if name == "aten::copy_" and not given["self"].is_meta:
            return given["self"].copy_(self._told("copy", given["src"]))
        counted = name == "aten::repeat_interleave" and given.get("output_size") is None
        # x[mask] = number is filled without counting.
        number = "values" in given and not given["values"].dim()
        masked = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) and not number for x in given["indices"]
        )
        if counted or masked or name in SHAPED_BY_VALUES:
            if (where := (place(), "shape")) in NECESSARY:
                self.reads[where] += 1
                return self._shaped(name, function, given)
            raise Fault(f"{place()}: {name} waits for the device, because its result's shape depends on values")
        return None

    def _shaped(self, name: str, function, given: dict):
        """Results as large as values say."""
        if name == "aten::masked_select" and self._known.values(given["self"]) is None:
            return given["self"].new_empty(int(self._known.values(given["mask"]).sum()))
        found = self._known.computed(function, (), given)

        def made(values: Tensor) -> Tensor:
            out = torch.empty(values.shape, dtype=values.dtype, device="meta")
            self._known.declare(out, values)
            return out

        return tree_map_only(Tensor, made, found)

    def _told(self, how: str, x: Tensor) -> Tensor:
        where = place()
        if (where, how) not in NECESSARY:
            raise Fault(
                f"{where}: the host reads a {how} {tuple(x.shape)} of the device, which `NECESSARY` does not know"
            )
        self.reads[where, how] += 1
        if where == SHAPES:
            return torch.tensor(self._shapes)
        if (values := self._known.values(x)) is not None:
            return values.clone()
        # 1: a gradient norm that is clipped. 0.25: a probability. 0: a token, and "not finished".
        answer = (1 if how == "value" else 0.25) if x.is_floating_point() else 0
        return torch.full(x.shape, answer, dtype=x.dtype, device="cpu")

    def _check_sides(self, name: str, tensors: list[Tensor]) -> None:
        """A number on the host goes along with a launch; a tensor does not."""
        if name in COPIES or not (stray := [x for x in tensors if not x.is_meta and x.dim()]):
            return
        where = place()
        if name not in INDEXING or (where, "index") not in NECESSARY:
            raise Fault(f"{where}: {name} is given a tensor of the host, {stray[0].dtype} {tuple(stray[0].shape)}")
        self.reads[where, "index"] += 1

    @staticmethod
    def _check_collective(name: str, tensors: list[Tensor]) -> None:
        """NCCL has the device's tensors only, and contiguous ones. Objects are moved by PyTorch, to the device if need be."""
        if any(frame.f_code.co_name in OBJECTS for frame in _frames()):
            return
        for x in tensors:
            if not x.is_meta or not x.is_contiguous():
                raise Fault(
                    f"{place()}: {name} of {x.device.type} {tuple(x.shape)} {x.stride()}: not contiguous on the device"
                )

    @staticmethod
    def _check_attention(name: str, given: dict) -> None:
        """PyTorch's own flash attention: its rules for tensors without memory look at nothing."""
        if name not in ("aten::_flash_attention_forward", "aten::_flash_attention_backward"):
            return
        q, k, v = (given[x] for x in ("query", "key", "value"))
        try:
            check_forward(q, k, v, given["cum_seq_q"], given["cum_seq_k"], (given["max_q"], given["max_k"]))
            if name.endswith("backward"):
                check_backward(given["grad_out"], q, given["out"], given["logsumexp"])
        except AssertionError as error:
            raise Fault(f"{place()}: {name}: {error}") from error


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """In arguments or results, which may be lists of them."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _wide(tensors: Iterable[Tensor]) -> bool:
    return any(x.is_meta and x.dtype == torch.float64 for x in tensors)


def _is_host(device) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _frames() -> Iterator:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def place() -> str:
    """The innermost line of ours or Megatron's: "folder/file.py:Class.function"."""
    return next((where for frame in _frames() if (where := _place(frame.f_code))), "nowhere")


@cache
def _place(code: CodeType) -> str | None:
    for start in CODE:
        _, found, rest = code.co_filename.rpartition(f"/{start}")
        if found:
            return None if (file := start + rest).startswith(OWN) else f"{file}:{code.co_qualname.partition(INNER)[0]}"
    return None
