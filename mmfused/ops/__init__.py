"""The fused operators, one folder each.

    reference.py    the equations in plain PyTorch: the specification
    composed.py     plain PyTorch with better algebra: the path without a GPU
    autograd.py     the registered operators and the autograd function around the kernels
    functional.py   the public functions; each call picks the reference, composed or fused path
    modules.py      the nn.Modules, if there are any
    checks.py       input validation

The kernels of an operator are in ``mmfused.kernels.<op>``, its benchmark in
``mmfused.benchmarks.<op>``.
"""

# Name of each operator -> names of the operators that it needs. Commands, benchmarks and tools read
# this table.
OPS: dict[str, tuple[str, ...]] = {
    "query_pooling": (),
    "masked_info_nce": (),
    "gated_cross_attention": (),
    "topk_routing": (),
    "grouped_mlp": ("topk_routing",),
}
