"""tools/peers.py reports tests of other packages that mmfused breaks, and missing checkouts."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"

LOSS = """
from torch import nn

class ClipLoss(nn.Module):
    world_size = local_loss = gather_with_grad = get_logits = 1

    def forward(self, image_features, text_features, logit_scale):
        return (image_features - text_features).sum()
"""

TESTS = """
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import nn

def pooled(module):
    x = torch.randn(2, 5, 8)
    return module(x[:, :1], x, x, need_weights=False)[0]

def test_shape():
    assert pooled(nn.MultiheadAttention(8, 2, batch_first=True)).shape == (2, 1, 8)

def test_class_inside_a_called_model():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = attention
        def forward(self):
            return pooled(self.pool)
    Model()()
    assert type(attention) is nn.MultiheadAttention

@pytest.mark.parametrize("size", [3])
def test_loss_that_is_never_called(size):
    assert type(ClipLoss()).__module__ == "open_clip.loss"

def test_fails_plain():
    assert type(nn.Linear(2, 2)) is None
"""


@pytest.fixture
def peers(monkeypatch):
    spec = importlib.util.spec_from_file_location("peers", TOOLS / "peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers", module)  # its dataclass looks up the module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkouts(tmp_path):
    files = {
        "src/open_clip/__init__.py": "",
        "src/open_clip/loss.py": LOSS,
        "tests/test_it.py": TESTS,
    }
    for name, text in files.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_broken_test_is_a_fault_unless_exceptions_list_it(peers, checkouts, monkeypatch, capsys):
    suites = [
        peers.Suite("small", "checkout", ("tests",)),
        peers.Suite("other", "lost", ("tests",)),
    ]
    exceptions = {"*::test_loss_that_is_never_called*": "looks at its class", "*::test_old": "none"}
    monkeypatch.setattr(peers, "SUITES", suites)
    monkeypatch.setattr(peers, "EXCEPTIONS", exceptions)
    assert peers.main(["--checkouts", str(checkouts), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert f"{checkouts / 'lost'} is missing" in out
    row = next(line for line in out.splitlines() if line.startswith("small, fuse  "))
    # Columns: tests that passed without mmfused, passed with it, ran an op, are broken, and are
    # broken if the listed exceptions are counted too.
    assert row.split()[2:] == ["3", "1", "2", "1", "2"], out
    faults = [line for line in out.splitlines() if line.startswith("FAULT")]
    assert len(faults) == 1 and "::test_class_inside_a_called_model: AssertionError" in faults[0]
    assert "exception *::test_loss_that_is_never_called*: looks at its class" in out
    assert "exception (not used) *::test_old" in out


def test_a_missing_checkout_prints_what_to_clone(peers, tmp_path, capsys):
    names = "sentence-transformers, open_clip, transformers"
    for arguments, where in (([], "one folder"), (["--checkouts", str(tmp_path)], str(tmp_path))):
        assert peers.main(arguments) == 2
        out = capsys.readouterr().out.splitlines()
        assert len(out) == 1 and f"clone {names} into {where}" in out[0]


def test_running_no_op_and_passing_no_test_are_faults(peers, monkeypatch, tmp_path):
    passed = {"outcome": "passed", "calls": 0, "failure": ""}
    suite = peers.Suite("small", "checkout", ("tests",))
    cases = (({"t": passed}, "no test ran an mmfused op."), ({}, "no test passes plain."))
    for tests, fault in cases:
        monkeypatch.setattr(peers, "run", lambda *args, tests=tests: tests)
        assert peers.compare(suite, tmp_path, tmp_path, 0)[1] == [f"small, fuse: {fault}"]


def test_a_test_that_fails_only_once_does_not_count_as_broken(peers, monkeypatch, tmp_path):
    suite, runs = peers.Suite("small", "checkout", ("tests",)), iter(["passed", "failed", "passed"])
    record = lambda outcome: {"outcome": outcome, "calls": 1, "failure": ""}  # noqa: E731
    monkeypatch.setattr(peers, "run", lambda *args: {"t": record(next(runs))})
    rows, faults, _ = peers.compare(suite, tmp_path, tmp_path, 0)
    assert rows[0][4] == "0" and not faults
