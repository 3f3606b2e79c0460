"""What the YAML of GRPO may say of where responses come from, how they are sampled, weighed and written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields

from megatron_ext.errors import UserError
from megatron_ext.kinds import Speed
from megatron_ext.losses.off_policy import OffPolicyTerms
from megatron_ext.rollouts import SamplingParams
from megatron_ext.vllm_servers.options import VllmOptions
from recipes.cli.config import at_least

__all__ = [
    "LengthSection", "OffPolicySection", "RolloutDumpSection", "RolloutSection", "SamplingSection", "ValidationSamplingSection",
]  # fmt: skip


@dataclass
class SamplingSection:
    # Must be false: greedy responses of a group are all alike and teach nothing.
    use_greedy: bool = False
    # Divides the logits, of rollouts and of the log-probabilities that are trained; above 0. Higher: responses vary
    # more.
    temperature: float = 1.0
    # Sample among so many likeliest tokens; 0: among all. Keep 0 unless the tail spoils responses: log-probabilities
    # are those of the unfiltered distribution, so a filter biases the gradient.
    top_k: int = 0
    # Sample among the likeliest tokens that together have this probability; 1: among all. A filter biases the gradient
    # like top_k.
    top_p: float = 1.0
    # Leave out tokens less likely than this share of the likeliest one; 0: none. A filter biases the gradient like top_k.
    min_p: float = 0.0
    # Divides the logits of tokens that are in the prompt or the response already (multiplies negative ones); 1: none. It
    # comes before the temperature, and biases the gradient like a filter.
    repetition_penalty: float = 1.0
    # Tokens that end a response, beside the tokenizer's eos_token and those of the model's generation_config.json.
    stop_token_ids: list[int] = field(default_factory=list)
    # Texts that end a response, with the token that completes them.
    stop_strings: list[str] = field(default_factory=list)
    # true: no token ends a response, only length_params.max_length and stop_strings.
    ignore_eos: bool = False

    def params(self, section: str, max_new_tokens: int, stop_token_ids: Sequence[int]) -> SamplingParams:
        """
        Args:
            section: dotted name, for messages.
            stop_token_ids: end a response, too.

        Raises:
            UserError: impossible values.
        """
        try:
            return SamplingParams(
                max_new_tokens=max_new_tokens,
                stop_token_ids=tuple(dict.fromkeys((*stop_token_ids, *self.stop_token_ids))),
                stop_strings=tuple(self.stop_strings),
                **{
                    f.name: getattr(self, f.name)
                    for f in fields(self)
                    if f.name not in ("stop_token_ids", "stop_strings")
                },
            )
        except UserError as error:
            raise UserError(f"trainer.grpo.{section} / length_params: {error}") from error


@dataclass
class ValidationSamplingSection(SamplingSection):
    # Take the likeliest token each time; then temperature, top_k, top_p and min_p must be left alone.
    use_greedy: bool = True

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "min_p"):
            value, default = getattr(self, name), getattr(type(self), name)
            if self.use_greedy and value != default:
                raise UserError(
                    f"trainer.grpo.validation_sampling_params.{name}={value} does nothing beside "
                    "use_greedy=true: set that to false"
                )


@dataclass
class ValidationSetSection:
    # JSONL rows of the form of data.train_path.
    path: str
    # Answers to each prompt. Of several it is logged how many are right, pass_at_k and what most of them say.
    samples: int = 1
    # How they are sampled; null: as trainer.grpo.validation_sampling_params says.
    sampling_params: ValidationSamplingSection | None = None
    # The least reward of an answer that is right.
    right_from: float = 1.0

    def check(self, name: str, otherwise: ValidationSamplingSection) -> None:
        """
        Raises:
            UserError: several answers that would be the same.
        """
        at_least(f"data.validation_sets.{name}", self, 1, "samples")
        if self.samples > 1 and (self.sampling_params or otherwise).use_greedy:
            raise UserError(
                f"data.validation_sets.{name}.samples={self.samples}: greedy answers to a prompt are all the same; set "
                f"data.validation_sets.{name}.sampling_params={{use_greedy: false}}, or samples=1"
            )


@dataclass
class LengthSection:
    # Longest response, in tokens; it is cut off there. Raise it where train_rollouts/truncated is high.
    max_length: int = 1024


@dataclass
class OffPolicySection:
    # token: each token has a weight of its own, exp(trainer's - sampler's log-probability); sequence: the product over the
    # response; geometric: its geometric mean.
    level: str = "token"
    # truncate: weights above `high` become `high`. mask: tokens whose weight is outside [low, high] are not trained.
    form: str = "truncate"
    # The lowest weight that mask leaves, at most 1.
    low: float = 0.5
    # The largest weight, at least 1.
    high: float = 2.0
    # Leave out a whole response where trainer and sampler differ in a token's log-probability by more than so many nats;
    # null: none.
    reject_above: float | None = None

    def __post_init__(self):
        self.terms  # noqa: B018  raises on bad ones
        if self.reject_above is not None and not self.reject_above > 0:
            raise UserError(f"trainer.grpo.off_policy.reject_above={self.reject_above} must be above 0 nats, or null")

    @property
    def terms(self) -> OffPolicyTerms:
        try:
            return OffPolicyTerms(self.level, self.form, self.low, self.high)
        except UserError as error:
            raise UserError(f"trainer.grpo.off_policy: {error}") from error


@dataclass
class RolloutSection:
    # Who samples: megatron, the model that is trained; vllm, servers that get its weights after every update; or file,
    # nobody: responses are read with their rewards (docs/rollouts.md compares). With vllm a run that goes on is not, bit by
    # bit, the run that was stopped.
    source: str = "megatron"
    # For source=file: JSONL of trajectories, .jsonl.zst too, in the order of their use; or the folder of a run with
    # trainer.grpo.rollout_dump={}, which is replayed.
    path: str | None = None
    # http://host:port of vLLM servers that run already; their key is read from MEGATRON_EXT_VLLM_KEY. Or start some.
    urls: Speed[list[str]] = field(default_factory=list)
    # vLLM servers that the run starts beside rank 0, keeps alive and ends; 0: none. With rendezvous: on each machine there.
    start: Speed[int] = 0
    # The interpreter that they run in; `make vllm` makes this one.
    python: Speed[str] = VllmOptions.python
    # Interface that they listen on; ranks on other nodes need one that they reach.
    host: Speed[str] = VllmOptions.host
    # CUDA_VISIBLE_DEVICES of each server that is started, one text each, e.g. ["6", "7"]: GPUs that no rank trains on.
    # Empty: what the run sees.
    cuda_devices: Speed[list[str]] = field(default_factory=list)
    # Further arguments of each server that is started, e.g. [--tensor-parallel-size, "2"].
    arguments: Speed[list[str]] = field(default_factory=list)
    # Folder on a disk that all nodes share, in which launch/serve_vllm.py waits on machines of the servers' own; on Slurm
    # launch/submit.py --vllm-nodes sets it. null: servers are started beside rank 0.
    rendezvous: Speed[str | None] = None
    # How new weights come to servers. folder: through weights_dir. nccl (not yet run): by NCCL from rank 0's GPU to the servers'
    # own, without a disk that both see; the memory of rank 0's host must hold a copy of the model. Servers that run already
    # need --weight-transfer-config '{"backend": "nccl"}'.
    weights: Speed[str] = VllmOptions.weights
    # For weights=folder: folder in which new weights are left for the servers, which must see it too: on a disk that all nodes
    # share. null: rendezvous, or else the memory of this machine, /dev/shm, which must hold two copies of the model.
    weights_dir: Speed[str | None] = None
    # Seconds for one call, which samples all responses of a prompt.
    timeout: Speed[float] = VllmOptions.timeout
    # Seconds in which a server must begin to answer, and in which a call that failed is tried again: as long as a server
    # needs to start.
    patience: Speed[float] = VllmOptions.patience
    # How often a server that has died is started again.
    max_restarts: Speed[int] = VllmOptions.max_restarts
    # How far log-probabilities of the canary may be from the trainer's, in nats on average, before the run is stopped;
    # null: 1e-4 in fp32, 0.01 in fp16, 0.1 in bf16.
    tolerance: Speed[float | None] = None
    # With trainer.grpo.max_staleness, what becomes of responses in flight when new weights come. keep: servers go on with
    # them; abort: servers end them, and what they have said is continued by new requests. Each token is of one version.
    in_flight: Speed[str] = VllmOptions.in_flight

    def __post_init__(self):
        if self.source not in ("megatron", "vllm", "file"):
            raise UserError(f"trainer.grpo.rollout.source must be megatron, vllm or file, got {self.source!r}")
        if (self.source == "file") != (self.path is not None):
            raise UserError(
                f"trainer.grpo.rollout.path={self.path}, and trainer.grpo.rollout.source={self.source}: source=file reads a "
                "path, and no other source does; set both or neither"
            )
        if self.source == "vllm":
            self.options  # noqa: B018  raises on bad ones
            return
        defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in self._of_servers()}
        if said := [name for name, default in defaults.items() if getattr(self, name) != default]:
            raise UserError(
                f"trainer.grpo.rollout.{said[0]} is for servers, and trainer.grpo.rollout.source={self.source} has none: set "
                "source=vllm, or leave it out"
            )

    def check(self, nodes: int, train_path: str | None, video: bool) -> None:
        """Against the rest of the configuration.

        Args:
            nodes: trainer.num_nodes.
            train_path: data.train_path.
            video: whether data.video is set.

        Raises:
            UserError: the source and something else do not go together.
        """
        if self.source == "vllm":
            self._check_servers(nodes, video)
        if self.source == "file":
            if train_path is not None:
                raise UserError(
                    f"data.train_path={train_path}, and trainer.grpo.rollout.source=file brings its own prompts: set "
                    "data.train_path=null"
                )
            if video:
                raise UserError(
                    "trainer.grpo.rollout.source=file reads text alone, and data.video is set: leave data.video out, or sample"
                )
        elif train_path is None:
            raise UserError("data.train_path is null: name the file with the prompts to train on")

    def _check_servers(self, nodes: int, video: bool) -> None:
        if video:
            raise UserError(
                "trainer.grpo.rollout.source=vllm samples text alone, and data.video is set: use source=megatron, or leave "
                "data.video out"
            )
        if self.rendezvous is not None:
            return
        if self.weights == "nccl" and self.start and not self.cuda_devices:
            raise UserError(
                "trainer.grpo.rollout.weights=nccl cannot send from a GPU to itself: name the servers' own in "
                "trainer.grpo.rollout.cuda_devices"
            )
        if nodes > 1 and self.start and self.host in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"trainer.grpo.rollout.host={self.host} is reached from its own node alone, and trainer.num_nodes={nodes}: "
                "name an interface of the nodes' network"
            )
        if nodes > 1 and self.weights == "folder" and self.weights_dir is None:
            raise UserError(
                f"trainer.grpo.rollout.weights_dir is not set, and trainer.num_nodes={nodes}: name a folder on a disk that all "
                "nodes and servers see, or set weights=nccl"
            )

    def _of_servers(self) -> list[Field]:
        return [f for f in fields(self) if f.name not in ("source", "path")]

    @property
    def options(self) -> VllmOptions:
        """
        Raises:
            UserError: settings that do not go together.
        """
        values = {f.name: getattr(self, f.name) for f in self._of_servers()}
        try:
            return VllmOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except UserError as error:
            raise UserError(f"trainer.grpo.rollout: {error}") from error


@dataclass
class RolloutDumpSection:
    # Write the first step and every n-th behind it; 1: every step, which a replay needs.
    every_n_steps: int = 1
    # Prompts of a step that are written, with all their responses: the first ones, which are drawn at random. null: all,
    # which a replay needs.
    prompts: int | None = None
    # Bytes that rollouts/ may have: files of the oldest steps are removed, the newest one stays. A token takes about 10
    # bytes. null: no limit.
    max_bytes: int | None = None

    def __post_init__(self):
        at_least("trainer.grpo.rollout_dump", self, 1, "every_n_steps", "prompts", "max_bytes")
