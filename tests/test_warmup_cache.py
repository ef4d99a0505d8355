"""Tests that launches find what warmup compiled, and that the ranks of a node divide the work."""

import os
import socket
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compiling import run_python
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmfused
from mmfused.warmup import node
from mmfused.warmup.api import _Call

# The mask is packed by a kernel in Triton's language, the pooling kernel is in Gluon.
MODEL = """
import torch, mmfused
pool = mmfused.QueryPooling(64, num_queries=4).bfloat16()
"""
COMPILE = f"""
{MODEL}
shapes = ((8, 50, 64), ((8, 50), torch.bool))
for _ in range(2):
    report = mmfused.warmup(pool, shapes, backward=False, arch="sm_90", workers=1)
    print(len(report.kernels), report.compiled, report.cached, report.ran, report.notes)
    assert all(k.outcome.registers > 0 and k.outcome.seconds > 0 for k in report.kernels), report
    assert not report.faults
"""
# A driver for sm_90 that loads and launches nothing, under Triton's own launcher and compiler.
LAUNCH = f"""
{MODEL}
import triton
from triton import knobs
from mmfused.tools.ptx import driver

class Utils(driver.Utils):
    def load_binary(self, name, binary, shared, device):
        return name, name, 0, 0, 1024

class Driver(driver.PtxDriver):
    def __init__(self):
        super().__init__(driver.Session(90, "plain", ()))
        self.utils = Utils(90)
        self.launcher_cls = lambda source, metadata: lambda *args: None

triton.runtime.driver.set_active(Driver())
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.name, cache_hit))
with mmfused.backend("fused"), torch.no_grad():
    pool(torch.randn(8, 50, 64, dtype=torch.bfloat16), torch.zeros(8, 50, dtype=torch.bool))
print(len(found), all(hit for _, hit in found), [name for name, hit in found if not hit])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_launches_of_another_process_find_all_that_a_dry_run_compiled(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "sitecustomize.py").write_text("print('hello', end='')")  # as tools do at the start
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    dry = run_python("-W", "error::RuntimeWarning", "-c", COMPILE, **cache, **path)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.removeprefix("hello").splitlines() == ["2 2 0 False []", "2 0 2 False []"]
    launched = run_python("-c", LAUNCH, MMFUSED_PTX_ARCH="90", **cache)
    assert launched.stdout.splitlines() == ["2 True []"], launched.stderr


def _work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    keys = [{"a", "b", "c"}, {"b", "c", "d", "e"}][rank]
    own = node.own_part(lambda: keys)
    parts = node.all_ranks(lambda: own)
    assert parts[rank] <= keys and parts[0] | parts[1] == {"a", "b", "c", "d", "e"}
    assert not parts[0] & parts[1] and min(map(len, parts)) > 1

    def fail():
        if rank == 1:
            raise ValueError("no space")

    with pytest.raises((ValueError, RuntimeError)) as raised:
        node.all_ranks(fail)
    assert str(raised.value) == ["rank 1 failed: no space", "no space"][rank]

    # The loss gathers over ranks. Its kernels see the candidates of both.
    loss = mmfused.MaskedInfoNCE(gather="global")
    model = DistributedDataParallel(nn.Linear(8, 16))
    report = mmfused.warmup(lambda x: loss(model(x), model(x)), ((32, 8),), arch="sm_90", workers=0)
    assert {kernel.op for kernel in report.kernels} == {"masked_info_nce"}
    call = _Call(model, ((4, 8),), None, True, False, "sm_90", 0)
    call.run_once(call.batches[0], torch.device("cpu"))
    for _ in range(2):  # the hooks of DDP still work
        model(torch.full((4, 8), float(rank))).sum().backward()
    grads = node.all_ranks(lambda: [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    dist.destroy_process_group()


def test_ranks_divide_the_work_and_share_errors():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (f"{folder}/store",), nprocs=2)


def test_without_ranks_all_keys_are_own(monkeypatch):
    assert node.own_part(lambda: {"a", "b"}) == {"a", "b"}
    monkeypatch.setattr(node, "all_ranks", lambda work: [work(), ("elsewhere", {"c"})])
    assert node.own_part(lambda: {"a", "b"}) == {"a", "b"} and socket.gethostname() != "elsewhere"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    assert node.cores() >= 1
    monkeypatch.setattr(node, "in_group", lambda: True)
    assert node.cores() == 1
