"""The pytest plugin of tools/peers.py: insert this library into other suites, record each test.

``--peers-insert fuse`` fuses every module before its first call, and every loss when it is made,
because methods of a loss are called without the module being called. ``experts`` sets
``experts_implementation="mmfused"`` in models that have this option.
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
tests: dict[str, dict] = {}  # node id -> outcome, calls of our ops, the last failure
calls = 0  # calls of our ops in this process


def pytest_addoption(parser):
    group = parser.getgroup("peers")
    group.addoption("--peers-insert", default="nothing", choices=("nothing", "fuse", "experts"))
    group.addoption("--peers-out", type=Path, required=True)


def pytest_configure(config):
    how = config.getoption("--peers-insert")
    if how != "nothing":
        import mmfused  # here, because a plain run must not import it

        count_ops()
        at_first_call(mmfused.fuse if how == "fuse" else choose_experts(mmfused))


def count_ops():
    """Count the calls of functions in mmfused.ops by the forwards that fuse inserts."""

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


def at_first_call(insert):
    """Call ``insert(module)`` before a module's first call, unless a module seen before has it."""
    seen, original = weakref.WeakSet(), nn.Module.__call__

    def call(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and self not in seen:
            seen.update(self.modules())
            insert(self)
        return original(self, *args, **kwargs)

    nn.Module.__call__ = call


def choose_experts(mmfused):
    mmfused.register_experts()

    def choose(module):
        for model in module.modules():
            can_set = getattr(model, "_can_set_experts_implementation", None)  # of the class
            if can_set is not None and can_set():
                model.set_experts_implementation("mmfused")

    return choose


def fuse_new_losses():
    """Fuse losses of the classes imported so far as soon as they are created, but no subclasses."""
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
    """Seed each test: the same random numbers with and without the library, in any test order."""
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
    if not hasattr(session.config, "workerinput"):  # not in a worker of pytest-xdist
        session.config.getoption("--peers-out").write_text(json.dumps(tests))
