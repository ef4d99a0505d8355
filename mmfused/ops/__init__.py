"""The fused operators, a folder each.

    reference.py    the equations in plain PyTorch: the specification
    composed.py     plain PyTorch with better algebra: the path without a GPU
    autograd.py     the registered operators and the autograd function around the kernels
    functional.py   the public function: picks one of the three
    modules.py      the nn.Modules
    checks.py       input validation

The kernels of an operator lie in ``mmfused.kernels.<op>``, its benchmark in
``mmfused.benchmarks.<op>``.
"""

# Every operator, and those that it calls. This is the only list: commands, benchmarks and tools
# read it.
OPS: dict[str, tuple[str, ...]] = {
    "query_pooling": (),
    "masked_info_nce": (),
    "gated_cross_attention": (),
    "topk_routing": (),
    "grouped_mlp": ("topk_routing",),
}
