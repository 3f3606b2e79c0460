"""Ports for servers that are started a moment later, perhaps again and again."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection
from pathlib import Path

from megatron_ext.errors import UserError

__all__ = ["PORTS", "ephemeral_ports", "free_port", "lasting_ports"]

PORTS = range(10_000, 65_536)
KERNELS_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def ephemeral_ports(file: Path = KERNELS_RANGE) -> range:
    """Those that the kernel gives to whoever asks for any and to the near ends of connections; IANA's where no file says."""
    if not file.exists():
        return range(49_152, 65_536)
    lowest, highest = map(int, file.read_text().split())
    return range(lowest, highest + 1)


def lasting_ports(ephemeral: range) -> list[int]:
    """Those that the kernel gives to nobody, so that they stay free until their server is there; all if it gives all."""
    return [port for port in PORTS if port not in ephemeral] or list(PORTS)


def free_port(host: str = "127.0.0.1", besides: Collection[int] = ()) -> int:
    """A port of `lasting_ports`, drawn, at which nobody listened a moment ago.

    Args:
        host: an address of this machine's.
        besides: ports that are spoken for.

    Raises:
        UserError: there is none.
        OSError: the address is not this machine's.
    """
    ports = [port for port in lasting_ports(ephemeral_ports()) if port not in besides]
    start = random.SystemRandom().randrange(len(ports)) if ports else 0
    for port in ports[start:] + ports[:start]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
            else:
                return port
    raise UserError(f"{host}: none of {len(ports)} ports is free; end what holds them, or take another address")
