"""A matrix product kernel with a race on sm_90: the loop also sums the second operand.

test_races.py runs this file as a script. The script prints the races of several variants.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmfused.cli.races import find_races


@triton.jit
def product_kernel(
    a_ptr,  # (64, K)
    b_ptr,  # (K, 64)
    out_ptr,  # (64, 64)
    sum_ptr,  # (64,)
    K,
    SUM: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Compute out = a @ b in steps of 64 along K.

    SUM: also sum b over its rows. WAIT: add exp2 of the product of each step to out, so that the
    loop waits for the product.
    """
    i = tl.arange(0, 64)
    acc = tl.zeros([64, 64], tl.float32)
    total = tl.zeros([64], tl.float32)
    for start in range(0, K, 64):
        k = start + i
        a = tl.load(a_ptr + i[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * 64 + i[None, :])
        if SUM:
            total += tl.sum(b.to(tl.float32), 0)
        if WAIT:
            acc += tl.exp2(tl.dot(a, b))
        else:
            acc = tl.dot(a, b, acc)
    tl.store(out_ptr + i[:, None] * 64 + i[None, :], acc)
    if SUM:
        tl.store(sum_ptr + i, total)


def races(summed: bool, wait: bool, num_stages: int, arch: int) -> list[str]:
    pointers = {
        "a_ptr": "*bf16",
        "b_ptr": "*bf16",
        "out_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "K": "i32",
    }
    source = ASTSource(
        fn=product_kernel,
        signature=pointers | {"SUM": "constexpr", "WAIT": "constexpr"},
        constexprs={(5,): summed, (6,): wait},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(5)},
    )
    options = {"num_warps": 4, "num_stages": num_stages}
    return find_races(
        triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ttgir"]
    )


if __name__ == "__main__":
    cases = {
        "summed": (True, False, 3, 90),
        "summed, one stage": (True, False, 1, 90),
        "summed after each product": (True, True, 3, 90),
        "not summed": (False, False, 3, 90),
        "summed, sm_80": (True, False, 3, 80),
    }
    print(json.dumps({name: races(*case) for name, case in cases.items()}))
