"""The losses of UniECS and UniCA compile to one graph, given the tokens of the image encoder.

So does that of FLUID with a BERT, whose texts are padded. test_moon2.py and test_unite.py compile
the other retrieval models.
"""

from compiling import run_python

# The models run in one process, because imports take most of the time.
COMPILED = """
import sys, torch

sys.path.insert(0, "tests")
import test_text_padding, test_uniecs, unica_equations

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


check(test_uniecs.random_model(), *test_uniecs.token_pair())
padded = test_text_padding.items(0) | {"labels": torch.arange(5)}
check(test_text_padding.fluid(test_text_padding.BERT), **padded)
check(unica_equations.random_model(), **unica_equations.token_batch())
xlm_r = {"text": unica_equations.XLM_R, "empty_text": (0, 2), "image_token_type": False}
check(unica_equations.random_model(**xlm_r, same_id="ignore"), **unica_equations.token_batch())
print("agrees")
"""


def test_training_compiles_without_a_graph_break():
    done = run_python("-W", "ignore", "-c", COMPILED)
    assert done.stdout.strip() == "agrees", done.stderr[-3000:]
