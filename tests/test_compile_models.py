"""A training step of UniECS and of UniCA compiles to one graph, from precomputed tokens.

The hosted models are compiled in their own tests.
"""

from compiling import run_python

# One process for both, without Triton's interpreter, because imports take most of the time.
COMPILED = """
import sys, torch

sys.path.insert(0, "tests")
import test_uniecs, unica_equations

torch.set_num_threads(1)


def check(model, *args, **options):
    results = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        model.zero_grad()
        output = call(*args, **options)
        output.loss.backward()
        results.append(
            [output.loss.detach(), *output.losses.values(), *(p.grad for p in model.parameters())]
        )
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


check(test_uniecs.random_model(), *test_uniecs.token_pair())  # adaptive weights included
check(unica_equations.random_model(), **unica_equations.token_batch())  # with the whole host
print("agrees")
"""


def test_training_compiles_without_a_graph_break():
    done = run_python("-W", "ignore", "-c", COMPILED)
    assert done.stdout.strip() == "agrees", done.stderr[-3000:]
