"""Rollouts from vLLM servers, which get the weights that are trained after every update.

Works under tensor, sequence, pipeline, context and data parallelism. The first rank of each model-parallel group alone talks to
servers about responses and tells its peers; rank 0 alone starts servers and gives them weights, but for servers that were
started again while all ranks wait for responses.

Weights come to servers in one of two ways (`VllmOptions.weights`). folder: every rank writes its part of a folder, which servers
read; whichever rank finds that a server has lost them names the folder again. nccl: rank 0 gathers them in its host's memory and
sends them from there, to a server that was started again, too: then no other rank is at a point where it could take part.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.hf.export import describe_hf, export_hf
from megatron_ext.hf.gather import HostTensors, gather_hf
from megatron_ext.hf.mapping import hf_shapes
from megatron_ext.models.gpt import PrefixGroupedGPT
from megatron_ext.rollouts.requests import Request
from megatron_ext.rollouts.responses import Decode
from megatron_ext.rollouts.trajectories import Trajectory
from megatron_ext.rollouts.vllm.canary import CANARY_TOKENS, Canary
from megatron_ext.rollouts.vllm.checks import Probe
from megatron_ext.rollouts.vllm.fleet import Fleet, Weights
from megatron_ext.rollouts.vllm.flight import Flight, Keeper
from megatron_ext.rollouts.vllm.nccl import Broadcasters, NcclBroadcasters
from megatron_ext.rollouts.vllm.protocol import check_request
from megatron_ext.rollouts.vllm.sender import CHUNK_BYTES, Sender
from megatron_ext.rollouts.vllm.spans import FIRST
from megatron_ext.runtime.collectives import broadcast_object, together
from megatron_ext.runtime.progress import PROGRESS
from megatron_ext.vllm_servers import KEY_VARIABLE, ServerProcesses, ServersElsewhere, VllmOptions

__all__ = ["Begun", "Home", "VllmSource"]

# The samples of each request, on the rank that asks for them; None elsewhere.
Begun = Future[list[list[Trajectory]]] | None


@dataclass(frozen=True)
class Home:
    """What a source needs of the run around it.

    Attributes:
        logs: folder for what servers say; it must be there when weights are first given.
        save_tokenizer: writes the tokenizer to a folder.
        text, ids: the same in letters and in tokens, without special ones; servers must agree.
        canary: tokens of a text like those that are sampled, at least 2.
        gather_weights: waits until this rank has all of its weights.
        decode: for stop strings of responses that are sampled ahead.
    """

    logs: Path
    save_tokenizer: Callable[[Path], None]
    text: str
    ids: tuple[int, ...]
    canary: tuple[int, ...]
    gather_weights: Callable[[], None] = lambda: None
    decode: Decode | None = None


class VllmSource:
    """
    Args:
        model: this rank's pipeline stage, without a DDP wrapper.
        options: of the servers. Nothing is started, and nobody asked, before `update_weights`.
        home: what belongs to the run.
        ahead: whether responses may be in flight when new weights come, see `begin`.
        broadcasters: of weights=nccl; None: NCCL's.

    Raises:
        UserError: weights=nccl, and no GPU is here.
    """

    def __init__(
        self,
        model: PrefixGroupedGPT,
        options: VllmOptions,
        home: Home,
        ahead: bool = False,
        broadcasters: Broadcasters | None = None,
    ):
        self.model, self.options, self.home, self.ahead = model, options, home, ahead
        self.sends = options.weights == "nccl"
        if self.sends and broadcasters is None:
            broadcasters = NcclBroadcasters()
        self.dtype = str(model.model_config.dtype).removeprefix("torch.")
        self.max_length = model.model_config.encoder_seq_length
        tolerance = options.tolerance_of(self.dtype)
        routes = model.model_config.route_shape if options.routes else None
        self._probe = Probe(home.text, home.ids, self.max_length, tolerance, ahead, routes)
        self._is_first = dist.get_rank() == 0
        self._sender = Sender(broadcasters) if self.sends and self._is_first else None
        self._tensors: HostTensors | None = None  # rank 0's, of weights=nccl
        self._processes: ServerProcesses | ServersElsewhere | None = None
        self._fleet: Fleet | None = None
        self._flight: Flight | None = None  # of the first rank of a model-parallel group
        self._keeper: Keeper | None = None  # rank 0's
        self._weights: Weights | None = None
        self._root: Path | None = None
        self._has_environments = False

    @property
    def processes(self) -> ServerProcesses | ServersElsewhere | None:
        """The servers that were started for this run, by this rank; None: none."""
        return self._processes

    def update_weights(self, version: int) -> None:
        """Give all servers the model's weights as they are, and see that they have them. Every rank calls it.

        Raises:
            VllmError: no server has them.
            WrongWeightsError: the canary died.
            OSError: there is no room for the weights.
        """
        if self._weights is not None and self._weights.version == version:
            return
        self.home.gather_weights()
        if self._root is None:
            self._make_root()
        with self._giving():
            weights = self._collect(version)
            with PROGRESS.bounded(), together():
                if self._is_first:
                    self._give(weights)
        self._tell_others()
        old, self._weights = self._weights, weights
        if self._is_first and old is not None and old.folder != weights.folder:
            shutil.rmtree(old.folder, ignore_errors=True)

    def sample(self, requests: Sequence[Request]) -> list[list[Trajectory]]:
        """
        Raises:
            UserError: a request that a server cannot answer, or one of `Fleet.complete`.
        """
        if self.ahead:
            return self.finish(self.begin(requests, self._weights.version))
        self._check(requests)
        group = parallel_state.get_model_parallel_group()
        found = None
        with self._waiting(), together(group), self._kept():
            if group.rank() == 0 and requests:
                found = self._fleet.complete(requests, self._weights)
        return broadcast_object(found, 0, group) or []

    def begin(self, requests: Sequence[Request], oldest: int, priority: int = FIRST) -> Begun:
        """Have the samples of each request made while this process goes on. Updates of the weights may come meanwhile, see
        `VllmOptions.in_flight`; every token is told the version of its own.

        Args:
            oldest: no token is of weights with fewer updates.
            priority: lower numbers come first, over all ranks.

        Raises:
            UserError: a request that a server cannot answer.
        """
        assert self.ahead, "it was not made to sample ahead"
        self._check(requests)
        if parallel_state.get_model_parallel_group().rank() != 0 or not requests:
            return None
        if self._flight is None:
            self._flight = Flight(self._fleet, self.home.decode, _replica())
        return self._flight.begin(requests, oldest, priority)

    def finish(self, begun: Begun) -> list[list[Trajectory]]:
        """Wait for what has begun. Every rank of a model-parallel group calls it, in one order.

        Raises:
            VllmError: no server answers, or not what was asked.
            WrongWeightsError: the canary died on a server that was started again.
        """
        group, found = parallel_state.get_model_parallel_group(), None
        with self._waiting(), together(group), self._kept():
            if begun is not None:
                found = begun.result()
        return broadcast_object(found, 0, group) or []

    def close(self) -> None:
        """End the servers that were started, and remove the weights. Not every rank need call it, nor at the same time."""
        if self._flight is not None:
            self._flight.close()
        if self._processes is not None:
            self._processes.close()
        if self._sender is not None:
            self._sender.close()
        if self._keeper is not None:  # it does not wait for servers that have ended
            self._keeper.close()
        if self._is_first and self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _waiting(self) -> contextlib.AbstractContextManager:
        """Servers have limits of their own; environments, which are asked meanwhile, have none."""
        return contextlib.nullcontext() if self._has_environments else PROGRESS.bounded()

    def _check(self, requests: Sequence[Request]) -> None:
        self._has_environments = any(request.environment is not None for request in requests)
        assert self._weights is not None, "update_weights comes first"
        for request in requests:
            check_request(request, self.max_length)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What the keeper could not do is why the rest could not be done."""
        try:
            yield
        finally:
            if self._keeper is not None:
                self._keeper.check()

    def _make_root(self) -> None:
        with together():
            if self._is_first:
                root = self.options.folder.absolute() / f"megatron-ext-{os.getpid()}-{secrets.token_hex(4)}"
                root.mkdir(mode=0o700, parents=True)
                self._root = root
                self.home.save_tokenizer(root / "tokenizer")
        self._root = broadcast_object(self._root)

    @contextlib.contextmanager
    def _giving(self) -> Iterator[None]:
        """From when rank 0 gathers weights to when servers have them, the keeper gives none."""
        with contextlib.ExitStack() as held:
            if self.sends:
                with PROGRESS.bounded(), together():
                    pass  # a rank that is not here yet may wait for what the keeper gives
            if self._sender is not None and self._fleet is not None:
                with PROGRESS.bounded():
                    held.enter_context(self._fleet.giving)
            yield

    def _collect(self, version: int) -> Weights:
        """The model's weights as they are, where servers get them from."""
        model, tokenizer = self.model, self._root / "tokenizer"
        # vLLM 0.32 leaves the output layer of tied embeddings as it was when it reloads weights, on a CPU at least.
        untied = True
        if self.sends:
            folder = self._root / "model"
            with together():
                if self._is_first and self._tensors is None:
                    shapes = hf_shapes(model.model_config, untied)
                    self._tensors = HostTensors(shapes, model.model_config.dtype, CHUNK_BYTES)
                    folder.mkdir()
                    describe_hf(model.model_config, folder, tokenizer, untied)
            gather_hf(model, self._tensors, model.model_config.dtype, untied)
            with together():
                if self._is_first:
                    self._tensors.check_finite()
        else:
            folder = self._root / f"v{version:06}"
            export_hf(model, folder, tokenizer=tokenizer, untied=untied)
        canary = Canary.of(model, self.home.canary[: min(CANARY_TOKENS, self.max_length - 1)])
        return Weights(folder, version, canary, self._tensors)

    def _give(self, weights: Weights) -> None:
        """On rank 0."""
        if self._fleet is None:
            self._begin(weights.folder)
        elif self._processes is not None:
            self._processes.newest = weights.folder
        self._fleet.update(weights, self.options.in_flight if self.ahead else "abort")
        if (self.ahead or self.sends) and self._keeper is None:
            self._keeper = Keeper(self._fleet)
        if self._processes is not None:
            self._processes.have_answered = True

    def _begin(self, folder: Path) -> None:
        urls, key = self.options.urls, os.environ.get(KEY_VARIABLE, "")
        if self.options.rendezvous is not None:
            self._processes = ServersElsewhere(self.options, folder, self.dtype, self.max_length)
        elif self.options.start:
            self._processes = ServerProcesses(
                self.options, folder, self.dtype, self.max_length, self.home.logs, self._root
            )
        if self._processes is not None:
            urls, key = self._processes.urls, self._processes.key
        self._fleet = Fleet(self.options, urls, key, self._probe, self._hopeless, self._sender)
        self._fleet.introduce()

    def _hopeless(self) -> str | None:
        """Why no server will have the newest weights any more; None: one may."""
        reason = None if self._processes is None else self._processes.hopeless()
        return reason or (None if self._keeper is None else self._keeper.failure)

    def _tell_others(self) -> None:
        """Who the servers are, and which weights they have, to all that ask them."""
        fleet = self._fleet
        told = None if not self._is_first else (fleet.urls, fleet.key, fleet.run, fleet.names, fleet.tags, fleet.down)
        urls, key, run, names, tags, down = broadcast_object(told)
        if self._is_first:
            return
        if fleet is None:
            fleet = self._fleet = Fleet(self.options, urls, key, self._probe)
        fleet.run, fleet.names, fleet.tags, fleet.down = run, names, tags, down


def _replica() -> int:
    """Of this rank's model-parallel group."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)
