"""The race that Triton's pipeliner creates in kernels that multiply and sum the same tile."""

import json
import sys
from pathlib import Path

import pytest
from compiling import oldest_triton, run_python  # noqa: F401 (a fixture)

KERNEL = str(Path(__file__).parent / "racy_kernel.py")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
@pytest.mark.parametrize("release", ["installed", "oldest"])
def test_only_a_pipelined_loop_that_multiplies_and_sums_a_tile_has_a_race(release, request):
    env = (
        {"PYTHONPATH": str(request.getfixturevalue("oldest_triton"))} if release == "oldest" else {}
    )
    done = run_python("-W", "ignore", KERNEL, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    races = json.loads(done.stdout)
    assert len(races.pop("summed")) == 1  # the ring buffer of b, the only tile that is summed
    assert races == {
        name: []
        for name in (
            "summed, one stage",
            "summed after each product",
            "not summed",
            "summed, sm_80",
        )
    }
