"""What this machine is, what is installed, and how fast its memory and its products are."""

from __future__ import annotations

import shutil
import subprocess

import torch
from bench_common import interleave, spread

from megatron_ext.attention.kernels import KERNELS
from megatron_ext.runtime.install_check import check_installation
from tools.gpu.runner import Findings
from tools.gpu.wheels import version_of
from tools.gpu.worlds import device_of

__all__ = ["run"]

PACKAGES = ("torch", "triton", "numpy", "megatron-core", "transformer-engine", "transformer-engine-torch", "flash-attn",
            "flash-attn-3", "transformers", "pytest")  # fmt: skip
# Read before and after work: a GPU that runs below its clocks is found by them.
QUERIES = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
           "clocks_throttle_reasons.active", "ecc.errors.uncorrected.volatile.total")  # fmt: skip
GIB = 1 << 30


def run(findings: Findings) -> None:
    device = device_of(findings)
    for name in PACKAGES:
        findings.row("packages", package=name, version=version_of(name) or "not installed")
    with findings.attempt("the installation works together"):
        check_installation()
    for name, kernel in KERNELS.items():
        findings.row("attention kernels", kernel=name, lacks=kernel.missing() or "nothing")
    if not findings.tiny:
        _card(findings)
    _speed(findings, device, 256 if findings.tiny else 8192)
    if not findings.tiny:
        _clocks(findings, "after work")


def _card(findings: Findings) -> None:
    card = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    for what, value in (
        ("GPU", card.name),
        ("GPUs", torch.cuda.device_count()),
        ("compute capability", f"{card.major}.{card.minor}"),
        ("multiprocessors", card.multi_processor_count),
        ("memory, GiB", card.total_memory / GIB),
        ("CUDA of torch", torch.version.cuda),
        ("cuDNN", torch.backends.cudnn.version()),
        ("NCCL", nccl),
    ):
        findings.row("GPU", what=what, value=value)
    _clocks(findings, "before work")


def _clocks(findings: Findings, when: str) -> None:
    if shutil.which("nvidia-smi") is None:
        findings.note("nvidia-smi is not there: neither driver nor clocks are known")
        return
    for query in QUERIES:  # one by one: a driver refuses a whole list for one name that it does not know
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0:
            findings.row(f"nvidia-smi, {when}", what=query, value=done.stdout.strip())


def _speed(findings: Findings, device: torch.device, size: int) -> None:
    """A copy and a product: what all other times are to be held against."""
    dtype = torch.float32 if findings.tiny else torch.bfloat16
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones((1 << 20) if findings.tiny else (1 << 32), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 10, device)
    copied, product = (spread(times[name]).median for name in ("copy", "product"))
    findings.row("speed", what="copy, TB/s read and written", value=2 * source.numel() / copied / 1e12)
    findings.row("speed", what=f"product of {size} x {size}, TFLOP/s", value=2 * size**3 / product / 1e12)
