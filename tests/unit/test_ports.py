"""A free port can be bound, is none that the kernel gives away, and is not one that is spoken for."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

from megatron_ext.errors import UserError
from megatron_ext.ports import PORTS, ephemeral_ports, free_port, lasting_ports
from tests.harness import ROOT


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_it_is_one_that_the_kernel_gives_to_nobody(host):
    port = free_port(host)
    assert port in PORTS and port not in ephemeral_ports()


def test_one_that_is_held_or_spoken_for_is_not_given():
    with ExitStack() as held:
        taken = set()
        while len(taken) < 3:
            listening = held.enter_context(socket.socket())
            with suppress(OSError):  # somebody else has been given it, too
                listening.bind(("127.0.0.1", free_port(besides=taken)))
                taken.add(listening.getsockname()[1])
        assert len(taken) == 3 and not taken & {*ephemeral_ports()}
        with pytest.raises(UserError, match="^127.0.0.1: none of 3 ports is free; end what holds them"):
            free_port(besides={*PORTS} - taken)
    with pytest.raises(UserError, match="none of 0 ports"):
        free_port(besides=PORTS)


def test_an_address_of_another_machine_is_an_error_at_once():
    with pytest.raises(OSError, match="assign requested address"):
        free_port("192.0.2.1")


def test_what_the_kernel_gives_away_is_what_it_says(tmp_path):
    low = random.randrange(1024, 60_000)
    high = random.randrange(low, 65_535)  # one is left: of a kernel that gives all of them all are taken
    (tmp_path / "range").write_text(f"{low}\t{high}\n")
    given = ephemeral_ports(tmp_path / "range")
    assert (given[0], given[-1]) == (low, high)
    assert ephemeral_ports(tmp_path / "none") == range(49_152, 65_536)
    lasting = lasting_ports(given)
    assert sorted({*lasting} | ({*given} & {*PORTS})) == list(PORTS) and not {*lasting} & {*given}
    assert lasting_ports(range(1024, 65_536)) == list(PORTS)


def test_it_needs_nothing_installed():
    """Of the standard library alone: scripts ask for it with whatever python3 there is."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from megatron_ext.ports import free_port\nprint(free_port())"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.fullmatch(r"\d{5}\n", done.stdout)
