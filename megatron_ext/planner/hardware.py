"""GPUs and their links, as their makers publish them, and what is assumed to be reached of that.

Sources, of the SXM versions: NVIDIA's data sheets of A100, H100, H200 and of the B200 in DGX B200 (dense bf16, half of
what is given with sparsity); NICs as in the DGX reference systems, one for each GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_ext.errors import UserError

__all__ = ["HARDWARE", "Assumptions", "Hardware", "find_hardware", "hardware_of"]

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in a node of several.

    Attributes:
        memory: bytes that a process can allocate.
        flops: dense bf16 operations per second.
        memory_bandwidth: bytes per second.
        node_link, network_link: bytes per second that one GPU sends, within a node and out of it.
        host_link: bytes per second from the host's memory.
        source: where the numbers are from.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    node_link: float
    network_link: float
    host_link: float
    source: str


HARDWARE = {
    h.name: h
    for h in (
        Hardware(
            "A100", 79.2 * GIB, 312e12, 2.039e12, 300e9, 25e9, 32e9, "A100 80GB SXM data sheet; DGX A100, HDR 200 Gb/s"
        ),
        Hardware(
            "H100", 79.2 * GIB, 989e12, 3.35e12, 450e9, 50e9, 64e9, "H100 SXM5 data sheet; DGX H100, NDR 400 Gb/s"
        ),
        Hardware("H200", 139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9, 64e9, "H200 SXM data sheet; DGX H200, NDR 400 Gb/s"),
        Hardware("B200", 178.0 * GIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9, "DGX B200 data sheet; NDR 400 Gb/s"),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. None of it has been measured here: this project has never run on these machines."""

    # Of the GPU's peak, reached by large products, and by attention kernels forward and backward.
    linear_efficiency: float = 0.55
    attention_efficiency: float = 0.40
    # How many times as fast layers' products are in FP8: their peak is twice that of bf16, and numbers must be turned into it.
    fp8_gain: float = 1.5
    # Of memory and links.
    memory_efficiency: float = 0.75
    link_efficiency: float = 0.75
    # Seconds for a collective to start, and per rank of a ring.
    collective_latency: float = 20e-6
    ring_latency: float = 3e-6
    # Sampling runs one token at a time, without CUDA graphs: kernels of a layer, and seconds to launch one.
    decode_kernels: int = 40
    kernel_launch: float = 5e-6
    # Patches of a frame, of vision towers whose frames have any size: 448 x 448 pixels of Qwen2-VL's.
    frame_patches: int = 1024
    # Numbers that the host updates in a second for one rank, where Adam's moments lie in its memory.
    host_updates: float = 1e9
    # Bytes that CUDA, NCCL and the allocator's gaps take.
    reserve: float = 5 * GIB
    # Growth only. How far the work of a step differs between data-parallel ranks (a standard deviation, relative): all
    # wait for the last. Hours between failures of one GPU and what hangs on it: 419 of 16,384 in 54 days (Llama 3, arXiv
    # 2407.21783, section 3.3.4). After one: seconds to start again, and half of the steps between checkpoints are lost.
    spread: float = 0.03
    hours_between_failures: float = 50_000.0
    restart: float = 600.0
    steps_between_checkpoints: int = 50

    def lines(self) -> list[str]:
        """Printed with every estimate."""
        return [
            f"products reach {self.linear_efficiency:.0%} of the peak, attention {self.attention_efficiency:.0%}",
            f"products in FP8 are {self.fp8_gain:g} times as fast, where model.fp8 is set",
            f"memory and links reach {self.memory_efficiency:.0%} and {self.link_efficiency:.0%} of their bandwidth",
            f"a collective takes {1e6 * self.collective_latency:.0f} us to start and {1e6 * self.ring_latency:.0f} us per "
            "rank of its ring; nothing overlaps with computation",
            "rings are laid node by node, and every GPU has a NIC: a group with k members in a node leaves it through k NICs",
            f"decoding a token launches {self.decode_kernels} kernels per layer, {1e6 * self.kernel_launch:.0f} us each",
            f"the host updates {self.host_updates:.0e} numbers a second for each rank, where optimizer_cpu_offload is on",
            f"a frame has {self.frame_patches} patches, where a vision tower takes any size; of a frozen one nothing is kept "
            "from an epoch before",
            f"{self.reserve / GIB:.0f} GiB of every GPU go to CUDA, NCCL and gaps between allocations",
            "model.transformer_impl=auto is Transformer Engine: norms keep their input and one number per row, SwiGLU its input",
            "all prompts and responses are of the given length, and all ranks equally busy",
        ]

    def growth_lines(self) -> list[str]:
        """Printed with a simulation of growth."""
        return [
            f"the work of data-parallel ranks differs by {self.spread:.0%} (standard deviation), and all wait for the last",
            f"a GPU fails every {self.hours_between_failures:,.0f} hours; then {self.restart:.0f} s and half of "
            f"{self.steps_between_checkpoints} steps are lost",
            "a network whose links do not share bandwidth, however many there are",
        ]


def find_hardware(name: str) -> Hardware:
    """Raises UserError for a name that is not in the table."""
    if name not in HARDWARE:
        raise UserError(f"hardware {name!r} is not known; there are: {', '.join(HARDWARE)}")
    return HARDWARE[name]


def hardware_of(device: str) -> Hardware | None:
    """By what CUDA calls a GPU, such as "NVIDIA H100 80GB HBM3"; None: it is not in the table, as versions for PCIe are not."""
    words = set(re.split(r"[\s-]+", device))
    return None if words & {"PCIe", "PCIE", "NVL"} else next((h for name, h in HARDWARE.items() if name in words), None)
