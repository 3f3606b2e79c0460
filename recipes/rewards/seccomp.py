"""A filter of system calls for programs that nobody trusts.

What it denies: namespaces and mounts of their own, in which a program would be root; memory that no limit counts (files in
memory, shared segments); tracing, and calls that have most often let one out. It is a classic BPF program, as `man 2 seccomp` has
it.
"""

from __future__ import annotations

import errno
import platform
import struct

from megatron_ext.errors import UserError

__all__ = ["syscall_filter"]

# Per machine: its number in the audit interface, and its numbers of calls that not all machines number alike.
MACHINES = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "memfd_create": 319, "shmget": 29, "ptrace": 101, "bpf": 321,
            "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298, "userfaultfd": 323,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "memfd_create": 279, "shmget": 194, "ptrace": 117, "bpf": 280,
            "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "userfaultfd": 282,
        },
    ),
}  # fmt: skip
# io_uring_setup, open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, mount_setattr, memfd_secret: the same everywhere.
SHARED = (425, 428, 429, 430, 431, 432, 433, 442, 447)
CLONE3 = 435
X32 = 0x40000000
NEW_USER = 0x10000000  # the flag of clone
LOAD, EQUAL, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # places in what the filter is shown
ALLOW, FAIL = 0x7FFF0000, 0x00050000


def syscall_filter(machine: str | None = None) -> bytes:
    """Instructions for PR_SET_SECCOMP.

    Args:
        machine: as `platform.machine()` says; None: this one.

    Raises:
        UserError: no numbers of its calls are known.
    """
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise UserError(f"there is no filter of system calls for {machine}, only for {' and '.join(MACHINES)}")
    architecture, numbers = MACHINES[machine]
    denied, unknown = FAIL | errno.EPERM, FAIL | errno.ENOSYS
    program = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, denied),  # 32-bit calls have other numbers
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, denied),
    ]  # fmt: skip
    for number in (*SHARED, *(n for name, n in numbers.items() if name != "clone")):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, denied)]
    # The flags of clone3 are in memory, where a filter does not look; libraries then take clone.
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, unknown)]
    program += [(EQUAL, 0, 3, numbers["clone"]), (LOAD, 0, 0, FIRST_ARGUMENT), (HAS_BITS, 0, 1, NEW_USER)]
    program += [(RETURN, 0, 0, denied), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *each) for each in program)
