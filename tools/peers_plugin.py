"""pytest plugin of tools/peers.py: insert mmfused into a test suite and record each test.

``--peers-insert fuse`` applies ``mmfused.fuse`` to every module before its first call. Losses are
fused when they are created, because some tests call only methods of a loss.
``--peers-insert experts`` sets ``experts_implementation="mmfused"`` in models with that option.
"""

import functools
import json
import random
import sys
import weakref
from pathlib import Path
from types import FunctionType

import pytest
import torch
from torch import nn

RANK = ("passed", "skipped", "failed")
tests: dict[str, dict] = {}  # node id -> outcome, number of mmfused op calls, last failure
calls = 0  # mmfused op calls so far in this process


def pytest_addoption(parser):
    group = parser.getgroup("peers")
    group.addoption("--peers-insert", default="nothing", choices=("nothing", "fuse", "experts"))
    group.addoption("--peers-out", type=Path, required=True)


def pytest_configure(config):
    insert = config.getoption("--peers-insert")
    if insert != "nothing":
        import mmfused  # not at the top: a plain run must not import mmfused

        count_ops()
        call_before_first_call(mmfused.fuse if insert == "fuse" else experts_setter(mmfused))


def count_ops():
    """Wrap the functions of mmfused.ops that mmfused.fuse imports, to count their calls."""

    def counted(op):
        @functools.wraps(op)
        def call(*args, **kwargs):
            if not torch.compiler.is_compiling():
                global calls
                calls += 1
            return op(*args, **kwargs)

        return call

    for path, module in list(sys.modules.items()):
        if path.startswith("mmfused.fuse."):
            for name, op in list(vars(module).items()):
                if isinstance(op, FunctionType) and op.__module__.startswith("mmfused.ops."):
                    setattr(module, name, counted(op))


def call_before_first_call(insert):
    """Patch nn.Module to call ``insert(module)`` before a module's first call.

    ``insert`` also changes the submodules, so it is not called for them.
    """
    seen, original = weakref.WeakSet(), nn.Module.__call__

    def call(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and self not in seen:
            seen.update(self.modules())
            insert(self)
        return original(self, *args, **kwargs)

    nn.Module.__call__ = call


def experts_setter(mmfused):
    mmfused.register_experts()

    def set_experts(module):
        for model in module.modules():
            can_set = getattr(model, "_can_set_experts_implementation", None)  # a class method
            if can_set is not None and can_set():
                model.set_experts_implementation("mmfused")

    return set_experts


def fuse_new_losses():
    """Patch the loss classes imported so far to fuse their new instances.

    Instances of subclasses are not fused.
    """
    import mmfused
    from mmfused.fuse.base import KINDS

    def fusing(cls, original):
        @functools.wraps(original)
        def __init__(self, *args, **kwargs):
            original(self, *args, **kwargs)
            if type(self) is cls:
                mmfused.fuse(self)

        __init__.fuses = True
        return __init__

    for path in KINDS:
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        if "loss" in path and cls is not None and not hasattr(cls.__init__, "fuses"):
            cls.__init__ = fusing(cls, cls.__init__)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed each test, so that its random numbers depend neither on mmfused nor on test order."""
    if item.config.getoption("--peers-insert") == "fuse":
        fuse_new_losses()
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    before = calls
    try:
        return (yield)
    finally:
        item.user_properties.append(("calls of ops", calls - before))


def pytest_runtest_logreport(report):
    test = tests.setdefault(report.nodeid, {"outcome": "passed", "calls": 0, "failure": ""})
    test["outcome"] = max(test["outcome"], report.outcome, key=RANK.index)
    test["calls"] = dict(report.user_properties).get("calls of ops", test["calls"])
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        test["failure"] = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # only workers of pytest-xdist have it
        session.config.getoption("--peers-out").write_text(json.dumps(tests))
