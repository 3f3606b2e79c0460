"""The filter of system calls, run by hand: what it allows on each machine."""

from __future__ import annotations

import errno
import struct

import pytest

from megatron_ext.errors import UserError
from recipes.rewards.seccomp import MACHINES, SHARED, syscall_filter

ALLOWED = 0x7FFF0000


def verdict(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What the kernel would do with a call: an interpreter of the five instructions that the filter is made of."""
    shown = struct.pack("=IIQQ", number, architecture, 0, argument)  # the second word: the place of the call
    instructions = list(struct.iter_unpack("=HBBI", program))
    place = value = 0
    while True:
        code, yes, no, k = instructions[place]
        place += 1
        if code == 0x06:
            return k
        if code == 0x20:
            value = struct.unpack_from("=I", shown, k)[0]
            continue
        place += yes if {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[code] else no


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_denied_and_what_is_not(machine):
    program, (architecture, numbers) = syscall_filter(machine), MACHINES[machine]
    denied = 0x00050000 | errno.EPERM
    for number in (*SHARED, *(n for name, n in numbers.items() if name != "clone")):
        assert verdict(program, architecture, number) == denied
    assert verdict(program, architecture, 435) == 0x00050000 | errno.ENOSYS
    found = {flags: verdict(program, architecture, numbers["clone"], flags) for flags in (0x11, 0x3D0F00, 0x10000011)}
    assert found == {0x11: ALLOWED, 0x3D0F00: ALLOWED, 0x10000011: denied}
    others = set(range(450)) - {435, *SHARED, *numbers.values()}
    assert {verdict(program, architecture, number) for number in others} == {ALLOWED}
    assert verdict(program, 0x40000003, 1) == denied and verdict(program, architecture, 0x40000001) == denied


def test_a_machine_without_numbers():
    with pytest.raises(UserError, match="there is no filter of system calls for mips, only for x86_64 and aarch64"):
        syscall_filter("mips")
