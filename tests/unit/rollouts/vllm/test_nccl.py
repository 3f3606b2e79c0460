"""How NCCL's functions are called, as far as that can be known without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from megatron_ext.errors import UserError
from megatron_ext.rollouts.vllm.nccl import LIBRARY, NcclBroadcasters, NcclError, NcclLibrary
from tests.harness import ROOT


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> str:
    """A library with NCCL's prototypes."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("stub") / "nccl.so"
    source = ROOT / "tests/programs/nccl_stub.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", path, source], check=True)
    return str(path)


def test_every_argument_arrives_as_the_header_has_it(stub: str):
    """Addresses and sizes of more than 32 bits, and the id by value."""
    library, communicator = NcclLibrary(stub), 0x7F0123456789
    unique = library.unique_id()
    assert unique == bytes(255 - i for i in range(128))
    assert library.join(unique, 9, 0) == communicator
    library.sum_one(0x7E0000000010, communicator, 0x55AA00000000)
    library.broadcast(0x7D0000000020, (1 << 33) + 1, communicator, 0x55AA00000000)
    library.abort(communicator)
    said = ctypes.CDLL(stub).stub_said
    said.restype = ctypes.c_char_p
    assert said().decode().splitlines() == [
        "join 9 0",
        "sum 0x7e0000000010 0x7e0000000010 1 1 0x7f0123456789 0x55aa00000000",
        "broadcast 0x7d0000000020 0x7d0000000020 8589934593 1 0 0x7f0123456789 0x55aa00000000",
        "abort 0x7f0123456789",
    ]


def test_what_nccl_refuses_is_said_in_its_words(stub: str):
    library = NcclLibrary(stub)
    with pytest.raises(NcclError, match="ncclCommInitRank: invalid usage"):
        library.join(library.unique_id(), 1, 0)


def test_the_real_library_has_all_of_it():
    """Without a GPU it can name a communicator and no more."""
    try:
        library = NcclLibrary()
    except OSError:
        pytest.skip(f"no {LIBRARY}: torch's build for CPUs brings none")
    assert len(library.unique_id()) == 128 and library.unique_id() != library.unique_id()


def test_a_run_without_a_gpu_is_refused_in_one_line():
    with pytest.raises(UserError, match="this run trains on none: set weights=folder"):
        NcclBroadcasters()
