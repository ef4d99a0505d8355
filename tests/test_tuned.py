"""Tests of tuned plans: which calls they replace, the file that holds them, and who reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import warnings

import pytest
import torch
import triton

import mmfused
from mmfused import tuned_file
from mmfused.kernels import tuned
from mmfused.kernels.grouped_mlp import plans as experts
from mmfused.kernels.masked_info_nce import plans as losses
from mmfused.kernels.query_pooling import plans as pooling
from mmfused.ops.query_pooling import composed
from mmfused.switch import constant_when_traced
from mmfused.tuned_file import Tuned

BF16, CARD, TRITON = torch.bfloat16, "NVIDIA H200", triton.__version__.partition("+")[0]


def pooling_plan(length=197, dtype=BF16, **options):
    return pooling.plan(32, 768, dtype, 80, False, length=length, **options)


def reached_by(call):
    with tuned.forced(()), tuned.observed() as reached:
        call()
    return reached


def slower(plan):
    """Return the plan with another number of warps in the forward."""
    tile = dataclasses.replace(plan.forward["onepass"], num_warps=8)
    return dataclasses.replace(plan, forward={"onepass": tile})


def entry_for(call, change):
    (reached,) = reached_by(call)
    return tuned.Entry(reached.op, reached.arguments, reached.default, change(reached.default))


def forget():
    """Let files be read again."""
    tuned_file.of_device.cache_clear()
    tuned_file._read_once.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """Pretend that this process launches on an H200, whose files are in a folder; return it."""
    monkeypatch.setenv("MMFUSED_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: CARD)
    monkeypatch.setattr(tuned.tiles, "INTERPRETED", False)
    monkeypatch.setattr(tuned.tiles, "pretended_arch", None)
    forget()
    yield tmp_path
    forget()


def written(folder, *entries, **settings):
    """Write the H200's file with sources that are current."""
    sources = {op: tuned_file.sources_of(op) for op in tuned_file.OPS}
    found = Tuned(CARD, TRITON, **({"sources": sources, "entries": list(entries)} | settings))
    tuned_file.write(folder / tuned_file.file_name(CARD, TRITON), found)
    return found


# ---- plans ---------------------------------------------------------------------------------------


def test_a_tuned_plan_replaces_the_library_s_for_its_arguments_only():
    usual = pooling_plan()
    entry = entry_for(pooling_plan, slower)
    with tuned.forced([entry]):
        assert pooling_plan() == slower(usual) != usual
        assert pooling_plan(padded=True) == usual
        assert pooling_plan(dtype=torch.float16) == usual
    assert pooling_plan() == usual


def test_lengths_of_one_power_of_two_share_a_plan():
    entry = entry_for(pooling_plan, slower)
    with tuned.forced([entry]):
        assert pooling_plan(129) == pooling_plan(256) == entry.plan
        assert pooling_plan(128) != entry.plan != pooling_plan(257)
    rows = dict(entry_for(lambda: experts.plan("rows", 1000, 4, 64, 64, BF16, 90), lambda p: p)[1])
    assert rows["rows"] == 1024 and rows["experts"] == 4
    assert [tuned.bucket(size) for size in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]


def test_an_entry_has_no_effect_if_the_library_s_plan_has_changed():
    entry = entry_for(pooling_plan, slower)
    other = dataclasses.replace(entry.default, partials=7)
    with tuned.forced([entry._replace(default=other)]):
        assert pooling_plan() == entry.default
    # Sizes of one bucket can have different plans of the library.
    with tuned.forced([entry._replace(default=other), entry]):
        assert pooling_plan() == entry.plan


def test_observed_lists_each_call_once_with_both_plans_in_all_threads():
    entry = entry_for(pooling_plan, slower)

    def calls():
        pooling_plan(150), pooling_plan(197), pooling_plan(padded=True)

    with tuned.forced([entry]), tuned.observed() as reached:
        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
    assert [dict(call.arguments)["padded"] for call in reached] == [False, True]
    assert reached[0][:3] == entry[:3] and reached[0].plan == entry.plan
    assert reached[1].plan == reached[1].default


def test_arguments_may_be_given_by_name_or_position():
    first = reached_by(lambda: losses.plan(64, BF16, 90, True, False))
    named = dict(dim=64, dtype=BF16, arch=90, columns=True, everything=False, logits=False)
    assert first == reached_by(lambda: losses.plan(**named))
    assert dict(first[0].arguments)["dtype"] == "bfloat16"


@pytest.mark.parametrize("op", tuned_file.OPS)
def test_every_plan_of_an_op_survives_the_file(op, tmp_path):
    from mmfused.cli.compiling import cases_of
    from mmfused.kernels.recording import launches_for

    with tuned.forced(()), tuned.observed() as reached:
        for case in cases_of(op).CASES.values():
            with launches_for(90):
                cases_of(op).launch(case)
    entries = [tuned.Entry(*call) for call in reached]
    assert entries and {entry.op for entry in entries} <= {op, *tuned_file.OPS[op]}
    found = Tuned("some card", "3.8.0", {op: "0"}, entries, 1.5, "cuda", [{"case": "x"}])
    tuned_file.write(tmp_path / "a" / "file.json", found)
    again = tuned_file.read(tmp_path / "a" / "file.json")
    assert dataclasses.asdict(again) == dataclasses.asdict(found)
    assert again.entries == entries
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file.json"]


# ---- the file ------------------------------------------------------------------------------------


def test_the_file_of_the_gpu_is_used_and_another_one_is_not(on_gpu):
    entry = entry_for(pooling_plan, slower)
    path = on_gpu / "nvidia-h200-triton-3.6.0.json"
    assert tuned_file.file_name(CARD, "3.6.0") == path.name
    written(on_gpu, entry)
    tuned_file.write(on_gpu / "nvidia-h100-triton-3.6.0.json", Tuned("NVIDIA H100", "3.6.0"))
    assert pooling_plan() == entry.plan
    with tuned.forced(()):
        assert pooling_plan() == entry.default
    with tuned.from_file():
        assert pooling_plan() == entry.plan


def test_kernels_on_a_cpu_and_other_gpus_have_the_library_s_plans(on_gpu, monkeypatch):
    entry = entry_for(pooling_plan, slower)
    written(on_gpu, entry)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    assert pooling_plan() == entry.default
    monkeypatch.undo()
    assert pooling_plan() == entry.default


def test_off_ignores_the_file(on_gpu, monkeypatch):
    entry = entry_for(pooling_plan, slower)
    written(on_gpu, entry)
    monkeypatch.setenv("XDG_CACHE_HOME", str(on_gpu))
    assert tuned_file.default_path(CARD, "3.6.0").parent == on_gpu / "mmfused" / "tuned"
    monkeypatch.setenv("MMFUSED_TUNED", "off")
    assert pooling_plan() == entry.default


def test_plans_of_changed_kernels_are_not_used_and_this_is_told_once(on_gpu):
    entry = entry_for(pooling_plan, slower)
    sources = {"query_pooling": "0" * 16, "topk_routing": tuned_file.sources_of("topk_routing")}
    settings = {"absorbed_must_save": 9.0, "router": "cuda"}
    written(on_gpu, entry, sources=sources, **settings)
    with pytest.warns(UserWarning, match=r"with other kernels of query_pooling, so .* tune query"):
        assert pooling_plan() == entry.default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pooling_plan() == entry.default
        found = tuned_file.current()
    assert (found.absorbed_must_save, found.router) == (None, "cuda")


def damaged(text):
    def write(path):
        path.write_text(text)

    return write


def with_(**changes):
    """Return a function that writes a file with changed values."""

    def write(path):
        tuned_file.write(path, Tuned(CARD, TRITON))
        data = json.loads(path.read_text())
        for name, value in changes.items():
            place = data["settings"] if name in data["settings"] else data
            place[name] = value
        path.write_text(json.dumps(data))

    return write


PLAN = {"op": "query_pooling", "arguments": {}, "default": {"type": "os"}, "plan": None}
DAMAGED = {
    "no JSON": (damaged("{"), "truncated or corrupt"),
    "no object": (damaged("[]"), "expected an object"),
    "another format": (with_(format=2), "format: got 2, expected 1"),
    "no format": (damaged("{}"), "format: got None, expected 1"),
    "nothing else": (
        damaged('{"format": 1}'),
        r"no file of `mmfused tune`: KeyError\('settings'\)",
    ),
    "a number as card": (with_(card=1), "got 1, expected a string"),
    "an unknown class": (with_(plans=[PLAN]), "has no class 'os'"),
    "plans that are no list": (with_(plans=3), "no file of `mmfused tune`"),
    "an unknown router": (with_(router="rocm"), "router: got 'rocm'"),
    "a negative factor": (with_(absorbed_must_save=-1.0), "absorbed_must_save: got -1.0"),
    "a factor in words": (with_(absorbed_must_save="2"), "absorbed_must_save: got '2'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_if_named_and_else_told_and_ignored(name, on_gpu, monkeypatch):
    write, message = DAMAGED[name]
    path = on_gpu / tuned_file.file_name(CARD, TRITON)
    write(path)
    with pytest.warns(UserWarning, match=message):
        assert tuned_file.current() is None
    forget()
    monkeypatch.setenv("MMFUSED_TUNED", str(path))
    with pytest.raises(
        ValueError, match=rf"^MMFUSED_TUNED: got '.*', expected .* or off: .*{message}"
    ):
        tuned_file.current()


@pytest.mark.parametrize(
    ("card", "version"), [("NVIDIA H100", TRITON), (CARD, "3.5.0")], ids=["card", "Triton"]
)
def test_a_named_file_of_another_gpu_or_triton_is_refused(card, version, on_gpu, monkeypatch):
    path = on_gpu / "mine.json"
    tuned_file.write(path, Tuned(card, version))
    monkeypatch.setenv("MMFUSED_TUNED", str(path))
    message = rf"for {card} and Triton {version}, expected a file for {CARD} and Triton {TRITON}"
    with pytest.raises(ValueError, match=message):
        pooling_plan()


def changed_by_hand(**changes):
    """Return a function that writes a file whose plan has other values in its forward."""

    def write(path):
        path = written(path.parent, entry_for(pooling_plan, slower)) and path
        data = json.loads(path.read_text())
        data["plans"][0]["plan"]["forward"]["onepass"] |= changes
        path.write_text(json.dumps(data))

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_warps": "8"}, "num_warps: got '8', expected a power of two"),
        ({"num_warps": 3}, "num_warps: got 3, expected a power of two"),
        ({"num_stages": 2.0}, "num_stages: got 2.0, expected an integer"),
        ({"BR": True}, "BR: got True, expected a power of two"),
        ({"BN": 128}, "onepass: expected 16 to 64 tokens"),
        ({"num_warps": None}, "num_warps: got None, expected a power of two"),
    ],
)
def test_plans_that_no_launcher_takes_are_not_used(changes, message, on_gpu):
    path = on_gpu / tuned_file.file_name(CARD, TRITON)
    changed_by_hand()(path)
    assert pooling_plan().forward["onepass"].num_warps == 8
    forget()
    changed_by_hand(**changes)(path)
    with pytest.warns(UserWarning, match=message):
        assert pooling_plan().forward["onepass"].num_warps == 4


def test_plans_without_the_hash_of_their_sources_are_not_used(on_gpu):
    written(on_gpu, entry_for(pooling_plan, slower), sources={})
    with pytest.warns(UserWarning, match="was made with other kernels of query_pooling"):
        assert pooling_plan().forward["onepass"].num_warps == 4


def test_launches_work_without_a_home_and_with_one_that_may_not_be_read(on_gpu, monkeypatch):
    def refuse(*args, **named):
        raise PermissionError("not yours")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MMFUSED_TUNED")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tuned_file.Path, "home", homeless)
    assert pooling_plan().forward["onepass"].num_warps == 4
    forget()
    monkeypatch.setattr(tuned_file.Path, "home", lambda: on_gpu)
    monkeypatch.setattr(tuned_file.os, "stat", refuse)  # as in a home of another user
    assert pooling_plan().forward["onepass"].num_warps == 4


def test_a_named_file_that_is_missing_is_refused(on_gpu, monkeypatch):
    monkeypatch.setenv("MMFUSED_TUNED", str(on_gpu / "none.json"))
    with pytest.raises(ValueError, match=r"MMFUSED_TUNED: got .*/none\.json is missing"):
        pooling_plan()


def test_without_a_gpu_a_named_file_serves_launches_that_are_only_recorded(on_gpu, monkeypatch):
    entry = entry_for(pooling_plan, slower)
    written(on_gpu, entry)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with tuned.from_file():  # a folder does not say which GPU
        assert pooling_plan() == entry.default
    forget()
    monkeypatch.setenv("MMFUSED_TUNED", str(on_gpu / tuned_file.file_name(CARD, TRITON)))
    with tuned.from_file():
        assert pooling_plan() == entry.plan


def test_line_ends_do_not_change_the_hash_of_the_sources_and_code_does(monkeypatch, tmp_path):
    from mmfused.kernels import query_pooling

    folder = tmp_path / "query_pooling"
    folder.mkdir()
    for name in ("tiles", "gluon"):
        (tmp_path / f"{name}.py").write_bytes(b"a\n")
    monkeypatch.setattr(query_pooling, "__path__", [str(folder)])

    def hashed(text, name="plans.py"):
        (folder / name).write_bytes(text)
        return tuned_file.sources_of("query_pooling")

    first = hashed(b"one\ntwo\n")
    assert hashed(b"one\r\ntwo\r\n") == first
    assert hashed(b"any", "inspect_cases.py") == first
    assert hashed(b"one\n") != first


# ---- settings ------------------------------------------------------------------------------------


def test_the_tuned_factor_decides_which_form_auto_picks(on_gpu):
    x, q, w = (
        torch.empty(shape, device="meta") for shape in ((64, 197, 768), (32, 768), (768, 768))
    )
    assert composed.cheaper_form(x, q, w, w, 1) == "absorbed"
    assert composed.absorbed_must_save("cuda") == composed.ABSORBED_MUST_SAVE["cuda"]
    forget()
    written(on_gpu, absorbed_must_save=50.0)
    assert composed.cheaper_form(x, q, w, w, 1) == "projected"
    assert composed.cheaper_form(x, q, w, w, 1, explicit=True) == "absorbed"
    assert composed.absorbed_must_save("cpu") == composed.ABSORBED_MUST_SAVE["cpu"]


def test_the_tuned_router_is_used_if_it_can_run(on_gpu, monkeypatch):
    from mmfused.ops.topk_routing import functional

    monkeypatch.setattr(functional, "KERNELS_ON_CPU", False)
    written(on_gpu, router="cuda")
    for reasons, expected in (([], "cuda"), (["nvcc not found"], "triton")):
        functional._cpp_can_run.cache_clear()
        monkeypatch.setattr(functional.extension, "why_not", lambda reasons=reasons: reasons)
        assert functional._faster_router() == expected
    functional._cpp_can_run.cache_clear()
    assert mmfused.library.current_router() == "auto"


@constant_when_traced
def value_in_a_file():
    with open(os.devnull) as file:  # torch.compile cannot trace this
        return 2.0 + len(file.read())


def test_torch_compile_takes_what_a_file_says_as_a_constant():
    torch._dynamo.reset()
    traced = torch.compile(lambda x: x * value_in_a_file(), backend="eager", fullgraph=True)
    assert traced(torch.ones(1)).item() == 2.0


def test_torch_compile_traces_the_choices_as_constants():
    torch._dynamo.reset()
    pool, moe = mmfused.QueryPooling(16, 2), mmfused.TopKMoE(16, 16, 4)

    def step(x):
        routing = mmfused.topk_routing(x[:, 0], 2)
        return moe(pool(x))[0], routing.weights

    traced = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        x = torch.randn(3, length, 16)
        torch.testing.assert_close(traced(x), step(x))
    torch._dynamo.reset()


# ---- what is told about it -----------------------------------------------------------------------


def test_env_tells_what_is_tuned_or_why_it_is_not(on_gpu, monkeypatch):
    from mmfused.cli import env

    device = torch.device("cuda", 0)
    assert env._tuned(device).startswith("nothing (`mmfused tune` has not run on this GPU")
    forget()
    entry = entry_for(pooling_plan, slower)
    found = written(on_gpu, entry, entry, router="cuda")
    expected = "plans: query_pooling 2; absorbed_must_save: as usual; router: cuda; in "
    assert env._tuned(device) == f"{expected}{found.path}"
    forget()
    monkeypatch.setenv("MMFUSED_TUNED", "nowhere")
    assert env._tuned(device).startswith("MMFUSED_TUNED: got 'nowhere'")


def test_a_benchmark_records_the_tuned_file_and_is_not_resumed_with_another(on_gpu):
    from mmfused.benchmarks import report

    device = torch.device("cuda", 0)
    assert report.tuned_facts(device) is None
    names = set()
    for factor in (1.0, 2.0):
        forget()
        written(on_gpu, absorbed_must_save=factor)
        names.add(report.tuned_facts(device))
    assert len(names) == 2
    assert all(name.startswith(tuned_file.file_name(CARD, TRITON) + ", ") for name in names)
