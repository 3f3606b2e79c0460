"""How the servers of a run are reached, started and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from megatron_ext.errors import UserError

__all__ = ["KEY_VARIABLE", "TOLERANCES", "VllmOptions"]

# Where the key of servers that the run does not start is read from.
KEY_VARIABLE = "MEGATRON_EXT_VLLM_KEY"
# Mean difference of log-probabilities, in nats, between two engines on the same weights. In fp32 5e-7 was measured; 200 times
# that is far below what a wrong tensor does. In 16 bits a step of rounding is 2 ** 13 (fp16) or 2 ** 16 (bf16) times as large,
# which makes of 5e-7 4e-3 and 3e-2: a small multiple of that.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
LOCAL = "127.0.0.1"
# What the run says itself.
OURS = (
    "--model", "--served-model-name", "--host", "--port", "--dtype", "--max-model-len", "--generation-config", "--logprobs-mode",
    "--api-key", "--middleware", "--uds", "--weight-transfer-config", "--load-format",
    "--enable-return-routed-experts",
)  # fmt: skip


@dataclass(frozen=True)
class VllmOptions:
    """
    Attributes:
        urls: servers that somebody else has started.
        start: servers that the run starts, or that are started for it on each machine of `rendezvous`.
        python: interpreter that they run in.
        host: interface that they listen on.
        cuda_devices: for each server that is started what it shall see as CUDA_VISIBLE_DEVICES; empty: what the run sees.
        arguments: further ones for each server that is started.
        rendezvous: folder in which the servers' machines wait for the run, see `megatron_ext.vllm_servers.elsewhere`; None:
            servers are started on the run's own.
        weights: how new ones come to servers: "folder", which they read; "nccl", from rank 0's GPU to theirs.
        weights_dir: where new weights are left for the servers; None: `rendezvous`, or else the memory of this machine
            (/dev/shm).
        timeout: seconds for one call: the samples of one prompt.
        patience: seconds in which some server must answer, or begin to.
        max_restarts: how often each server is started again.
        tolerance: see TOLERANCES; None: by the type of the weights.
        in_flight: what becomes of requests in flight when new weights come: "keep", they go on with these; "abort", servers end
            them, and what they have said is continued by new requests.
        routes: whether servers tell which experts their routers choose.
    """

    urls: tuple[str, ...] = ()
    start: int = 0
    python: str = ".venv-vllm/bin/python"
    host: str = LOCAL
    cuda_devices: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    rendezvous: str | None = None
    weights: str = "folder"
    weights_dir: str | None = None
    timeout: float = 1800.0
    patience: float = 600.0
    max_restarts: int = 3
    tolerance: float | None = None
    in_flight: str = "keep"
    routes: bool = False
    name: str = field(default="policy", init=False)

    def __post_init__(self):
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise UserError(f"urls: {url!r} is no address of a server; give http://host:port")
        own = [a for a in self.arguments if a.split("=")[0] in OURS]
        rules = [
            (self.start < 0, f"start={self.start} must not be negative"),
            (
                bool(self.urls) == bool(self.start),
                "give either urls, of servers that run, or start, the number of servers to start",
            ),
            (len(set(self.urls)) < len(self.urls), "urls names a server twice"),
            (
                bool(self.cuda_devices) and len(self.cuda_devices) != self.start,
                f"cuda_devices has {len(self.cuda_devices)} entries for start={self.start} servers: give one for each",
            ),
            (bool(self.urls) and bool(self.arguments), "arguments are for servers that the run starts, not for urls"),
            (bool(own), f"arguments: the run says {', '.join(own)} itself; leave it out"),
            (
                self.rendezvous is not None and not self.start,
                "rendezvous is for servers that are started on other machines: say in start how many on each",
            ),
            (
                self.rendezvous is not None and self.host != LOCAL,
                f"host={self.host} and rendezvous: each machine that serves knows its own; leave host out",
            ),
            (self.timeout <= 0 or self.patience <= 0, "timeout and patience must be positive"),
            (self.max_restarts < 0, f"max_restarts={self.max_restarts} must not be negative"),
            (self.in_flight not in ("keep", "abort"), f"in_flight must be keep or abort, got {self.in_flight!r}"),
            (self.tolerance is not None and self.tolerance <= 0, f"tolerance={self.tolerance} must be positive"),
            (self.weights not in ("folder", "nccl"), f"weights must be folder or nccl, got {self.weights!r}"),
            (
                self.weights == "nccl" and self.weights_dir is not None,
                f"weights_dir={self.weights_dir} is for weights=folder: weights=nccl leaves none in a folder; give one of both",
            ),
            (
                self.weights == "folder" and bool(self.urls) and self.weights_dir is None and not self.is_local,
                "urls are of other machines, which read new weights from a folder: name one that they and this run see in "
                "weights_dir, or set weights=nccl",
            ),
        ]
        for broken, message in rules:
            if broken:
                raise UserError(message)

    @property
    def is_local(self) -> bool:
        """Whether all servers are on this machine for certain."""
        return all(urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") for url in self.urls)

    @property
    def folder(self) -> Path:
        """Where the folder of this run's weights is made."""
        return Path(self.weights_dir or self.rendezvous or "/dev/shm")

    def tolerance_of(self, dtype: str) -> float:
        """For weights of this type, e.g. "float32"."""
        return TOLERANCES[dtype] if self.tolerance is None else self.tolerance
