"""Compile the kernel of racy_kernel.py to PTX, without an assembler.

test_ptx_mutants.py runs this file as a script. The script prints the PTX and the bytes of dynamic
shared memory of several variants.
"""

import json
from dataclasses import replace

import triton
from racy_kernel import product_kernel
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfused.tools.ptx.driver import PtxBackend


def compiled(arch: int, summed: bool) -> tuple[str, int]:
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "out_ptr": "*fp32", "sum_ptr": "*fp32"}
    source = ASTSource(
        fn=product_kernel,
        signature=pointers | {"K": "i32", "SUM": "constexpr", "WAIT": "constexpr"},
        constexprs={(5,): summed, (6,): False},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    options = {"num_warps": 4, "num_stages": 3}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return kernel.asm["ptx"], kernel.metadata.shared


if __name__ == "__main__":
    backends["nvidia"] = replace(backends["nvidia"], compiler=PtxBackend)
    cases = {"sm_80": (80, False), "sm_90": (90, False), "sm_90, summed": (90, True)}
    print(json.dumps({name: compiled(*case) for name, case in cases.items()}))
