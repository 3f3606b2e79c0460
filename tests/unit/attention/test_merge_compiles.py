"""The Triton merge, compiled ahead to machine code for the GPUs it is meant for. No GPU and no driver is needed: the assembler
comes with Triton."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}


@pytest.mark.parametrize(("rows", "dtype"), list(itertools.product(["slice", "index", "sinks"], ["bf16", "fp32"])))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merge_compiles(name, rows, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset it is this, with a warning
    import triton
    from triton.backends.compiler import GPUTarget

    from megatron_ext.attention.merge_triton import _merge_kernel, _sink_kernel

    constants = {"INDEXED": rows == "index", "N": 16, "D": 128}
    types = {"out": f"*{dtype}", "lse": "*fp32", "part": f"*{dtype}", "part_lse": "*fp32", "sinks": f"*{dtype}"}
    types["rows"] = "*i64" if rows == "index" else "*fp32"  # a slice has no index, and the lse takes its place
    kernel = _merge_kernel
    if rows == "sinks":
        kernel = _sink_kernel
        del constants["INDEXED"]
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[name], 32))
    assert f".target {name}" in made.asm["ptx"] and len(made.asm["cubin"]) > 1000
