"""vLLM servers on this machine: they live as long as the process that starts them, and are started again when they die."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.ports import free_port
from megatron_ext.vllm_servers.options import KEY_VARIABLE, VllmOptions

__all__ = ["ServerProcesses"]

logger = logging.getLogger(__name__)

INSIDE = Path(__file__).parent / "inside"
PAUSE = 0.5  # seconds between looks at a server
END = 10.0  # seconds for a server to end by itself
# Environment of a server beside the run's own. Without VLLM_CPU_KVCACHE_SPACE (GiB) the build for CPUs takes half the memory.
ALWAYS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
UNLESS_SET = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# vLLM 0.32 tells routes with this one alone, which needs Triton.
TELLS_ROUTES = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
# A rank's place among its peers, which vLLM would take for its own.
NOT_FOR_SERVERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK",
    "PYTHONPATH",
)  # fmt: skip


class ServerProcesses:
    """Start servers and a thread that looks after them.

    Args:
        options: see there.
        model: Hugging Face folder that they begin with, whose weights are not read where they get them by NCCL; `newest` names a
            later one for those that are started again.
        dtype: "float32" and the like.
        max_length: tokens of prompt and response.
        logs: folder for what they say.
        remove: folder that goes when this process is killed; None: none.
        key: that they ask for; None: one that nobody else knows.

    Attributes:
        have_answered: set it once they have: one that ends before is not started again.

    Raises:
        UserError: no such interpreter.
    """

    def __init__(
        self,
        options: VllmOptions,
        model: Path,
        dtype: str,
        max_length: int,
        logs: Path,
        remove: Path | None = None,
        key: str | None = None,
    ):
        self.options, self.newest, self.dtype, self.max_length, self.remove = options, model, dtype, max_length, remove
        self._python = options.python if os.sep not in options.python else str(Path(options.python).absolute())
        if os.sep in options.python and not os.access(self._python, os.X_OK):
            raise UserError(
                f"trainer.grpo.rollout.python={options.python} is no program: `make vllm` makes .venv-vllm, or name the "
                "interpreter of an environment with vLLM in it"
            )
        self.key = key or secrets.token_hex(32)
        self._ports: list[int] = []
        for _ in range(options.start):
            self._ports.append(free_port(options.host, besides=self._ports))
        self._logs = [logs / f"vllm-{number}.log" for number in range(options.start)]
        self._restarts = [0] * options.start
        self._given_up: dict[int, str] = {}
        self._closing = threading.Event()
        self.have_answered = False
        self._guards: list[subprocess.Popen] = []
        self._thread = threading.Thread(target=self._look_after, name="vllm servers", daemon=True)
        try:
            for number in range(options.start):
                self._guards.append(self._start(number))
            self._thread.start()
        except BaseException:
            self.close()
            raise

    @property
    def urls(self) -> list[str]:
        host = f"[{self.options.host}]" if ":" in self.options.host else self.options.host
        return [f"http://{host}:{port}" for port in self._ports]

    @property
    def pids(self) -> list[int]:
        """Of the processes that watch the servers; each leads the group of its own."""
        return [guard.pid for guard in self._guards]

    def hopeless(self) -> str | None:
        """Why no server will answer any more; None: one may."""
        if len(self._given_up) < self.options.start:
            return None
        return "; ".join(self._given_up.values())

    def close(self) -> None:
        """End all of them, whatever they do."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        for guard in self._guards:
            if guard.poll() is None:
                guard.terminate()
        for guard in self._guards:
            try:
                guard.wait(END)
            except subprocess.TimeoutExpired:
                _kill_group(guard)
                guard.wait()
            _kill_group(guard)

    def __enter__(self) -> ServerProcesses:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def command(self, number: int) -> list[str]:
        """What starts a server; the key is not in it, which everybody on the machine can read."""
        options = self.options
        # Without weights: they get the newest before they are asked for anything, and whoever forgets that hears noise.
        takes = ["--load-format", "dummy", "--weight-transfer-config", '{"backend": "nccl"}'] * (
            options.weights == "nccl"
        )
        tells = ["--enable-return-routed-experts"] * options.routes
        return [
            self._python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.newest),
            "--served-model-name", options.name, "--host", options.host, "--port", str(self._ports[number]),
            "--dtype", self.dtype, "--max-model-len", str(self.max_length), "--generation-config", "vllm",
            "--logprobs-mode", "processed_logprobs", "--middleware", "megatron_ext_key.KeyOnEveryRoute",
            "--enable-scale-out", "--scheduling-policy", "priority", "--uvicorn-log-level", "warning", *takes, *tells,
            *options.arguments,
        ]  # fmt: skip

    def _environment(self, number: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in NOT_FOR_SERVERS}
        own = {"PYTHONPATH": str(INSIDE), KEY_VARIABLE: self.key, "VLLM_API_KEY": self.key}
        if self.options.cuda_devices:
            own["CUDA_VISIBLE_DEVICES"] = self.options.cuda_devices[number]
        return UNLESS_SET | kept | ALWAYS | (TELLS_ROUTES if self.options.routes else {}) | own

    def _start(self, number: int) -> subprocess.Popen:
        guard = [sys.executable, "-I", str(INSIDE / "guard.py"), str(os.getpid()), str(self.remove or "")]
        with self._logs[number].open("ab") as log:
            return subprocess.Popen(
                [*guard, *self.command(number)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=self._environment(number), start_new_session=True,
            )  # fmt: skip

    def _look_after(self) -> None:
        while not self._closing.wait(PAUSE):
            for number, guard in enumerate(self._guards):
                if number in self._given_up or guard.poll() is None or self._closing.is_set():
                    continue
                _kill_group(guard)
                if self._restarts[number] >= (self.options.max_restarts if self.have_answered else 0):
                    times = f"{self._restarts[number] + 1} times" if self.have_answered else "before it answered"
                    self._given_up[number] = (
                        f"vLLM server {number} has ended {times}: {_last_words(self._logs[number])}"
                    )
                    logger.error("%s", self._given_up[number])
                    continue
                self._restarts[number] += 1
                logger.warning(
                    "vLLM server %d has ended; it is started again (%d of %d times) with %s",
                    number, self._restarts[number], self.options.max_restarts, self.newest.name,
                )  # fmt: skip
                self._guards[number] = self._start(number)


def _kill_group(guard: subprocess.Popen) -> None:
    try:
        os.killpg(guard.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended


def _last_words(log: Path, lines: int = 3) -> str:
    """The ends of a log that say most."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors: Sequence[str] = [line for line in text if "Error" in line] or [line for line in text if line.strip()]
    said = " | ".join(line.strip()[-200:] for line in errors[-lines:]) or "it said nothing"
    return f"{said} ({log})"
