"""Tests of fuse(model): `only` and `skip`, and the texts and the table of the report."""

import copy
import re

import pytest
from fuse_models import (
    D,
    H,
    K,
    cross,
    latent,
    library,
    open_clip_pool,
    open_clip_tower,
    siglip,
    torch_attention,
)
from torch import nn

from mmfused import fuse, unfuse
from mmfused.fuse import base, counts
from mmfused.fuse.base import FAMILIES, KINDS


def experts():
    """Create Mixtral's experts: 4 experts, 2 for each token, width 32."""
    sizes = dict(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config = library("transformers.models.mixtral.configuration_mixtral.MixtralConfig", **sizes)
    return library("transformers.models.mixtral.modeling_mixtral.MixtralExperts", config)


class Model(nn.Module):
    """A model with every family of known modules.

    Some heads contain an attention module, and one module has two names.
    """

    def __init__(self):
        super().__init__()
        self.vision = nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.ModuleDict({"attn": torch_attention()}) for _ in range(3))}
        )
        self.vision["pool"] = open_clip_pool()
        self.text = nn.ModuleDict({"head": siglip().head, "cross": torch_attention()})
        self.experts = experts()
        self.losses = library("open_clip.loss.ClipLoss")
        self.other = nn.ModuleDict({"shared": self.text["cross"]})


BLOCKS = {f"vision.blocks.{i}.attn" for i in range(3)}
ATTENTION, POOLING = {*BLOCKS, "text.cross"}, {"vision.pool", "text.head"}
ALL = ATTENTION | POOLING | {"experts", "losses"}


@pytest.fixture(scope="module")
def model():
    return Model()


def fuse_and_unfuse(model, **options):
    dry = fuse(model, dry_run=True, **options)
    report = fuse(model, **options)
    assert report == dry and set(unfuse(model)) == set(report.swapped)
    assert (
        report.classes.keys() == report.swapped.keys() | report.left.keys()
        and report.expected.keys() == report.swapped.keys()
    )
    return report


CHOICES = [
    (dict(), ALL),
    (dict(only="pooling"), POOLING),
    (dict(only="attention"), ATTENTION),
    (dict(only=["experts", "losses"]), {"experts", "losses"}),
    (dict(skip="pooling"), ALL - POOLING),
    (dict(skip=("attention", "losses")), POOLING | {"experts"}),
    (dict(only="text"), {"text.head", "text.cross"}),
    (dict(only="vision.blocks"), BLOCKS),
    (dict(skip="vision"), {"text.head", "text.cross", "experts", "losses"}),
    (dict(skip="vision.blocks.1"), ALL - {"vision.blocks.1.attn"}),
    # * also matches dots. The pattern does not match vision.pool, which contains vision.pool.attn.
    (
        dict(only="vision.*.attn"),
        {*BLOCKS, "vision.pool.attn"},
    ),
    (dict(only="vision.blocks.*.attn"), BLOCKS),
    (dict(only="vision.blocks.[02]"), BLOCKS - {"vision.blocks.1.attn"}),
    (dict(only="vision", skip="attention"), {"vision.pool"}),
    (dict(only="vision", skip="pooling"), BLOCKS),
    (dict(skip=["vision", "pooling"]), {"text.cross", "experts", "losses"}),
    (dict(only=""), ALL),
    (dict(skip=""), set()),
    (dict(only=[]), set()),
    (dict(skip=[]), ALL),
    (dict(only=(name for name in ("text.cross", "experts"))), {"text.cross", "experts"}),
    (dict(only="other.shared"), {"text.cross"}),  # the second name of text.cross
    (dict(skip="other"), ALL - {"text.cross"}),
    (dict(only="[l]osses"), {"losses"}),
    (dict(only="vision.pool.attn"), {"vision.pool.attn"}),  # inside vision.pool
    (dict(only=["vision.pool.attn", "vision.pool"]), {"vision.pool"}),
    (dict(only="text.head.attention", skip="attention"), set()),
]


# Without memory addresses, which differ between processes.
CHOICE_IDS = [re.sub(" at 0x[0-9a-f]+", "", str(list(options.items()))) for options, _ in CHOICES]


@pytest.mark.parametrize(("options", "names"), CHOICES, ids=CHOICE_IDS)
def test_only_and_skip_choose_modules(options, names, model):
    options = {
        key: list(value) if not isinstance(value, str) else value for key, value in options.items()
    }
    report = fuse_and_unfuse(model, **options)
    assert set(report.swapped) == names, report
    assert set(report.left) >= ALL - names, "a known module is missing from the report"
    assert set(report.left) <= (ALL - names) | {"vision.pool.attn", "text.head.attention"}
    assert all(
        re.fullmatch(r"Not chosen: (`skip` has '.*'|`only` does not include it)\.", text)
        for text in report.left.values()
    )


def test_only_and_skip_apply_to_the_root():
    for options, swapped in (
        (dict(only="pooling"), [""]),
        (dict(only=""), [""]),
        (dict(skip=""), []),
        (dict(only="attention"), []),
    ):
        assert list(fuse_and_unfuse(latent(), **options).swapped) == swapped
    assert fuse_and_unfuse(latent(), only="losses").left == {
        "": "Not chosen: `only` does not include it."
    }


def test_attention_inside_a_left_head_is_left_unchanged(model):
    report = fuse_and_unfuse(model, only=["attention", "experts"])
    assert "vision.pool.attn" not in report.swapped and "vision.pool.attn" not in report.left
    assert report.left["vision.pool"] == "Not chosen: `only` does not include it."


@pytest.mark.parametrize("argument", ["only", "skip"])
@pytest.mark.parametrize(
    "entry", ["visual", "poolings", "vision.attn", "vision.?", "text.cross.", "attn"]
)
def test_entry_that_matches_no_module_raises(argument, entry, model):
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError) as error:
        fuse(model, **{argument: ["pooling", entry]})
    assert str(error.value) == (
        f"fuse: {argument}: got {entry!r}, expected 'pooling', 'attention', 'experts', 'losses', "
        "or the name of a module in this model or a pattern of names"
    )
    assert [type(module) for module in model.modules()] == types
    for wrong, message in (
        (3, "fuse: {}: got a int, expected a str or an iterable of strs"),
        ([3], "fuse: {}: got a int in it, expected only strs"),
    ):
        with pytest.raises(TypeError) as error:
            fuse(model, **{argument: wrong})
        assert str(error.value) == message.format(argument)


def test_second_fuse_keeps_swapped_modules():
    model = Model()
    fuse(model, only="pooling")
    report = fuse(model, only="losses", skip="pooling")
    assert set(report.swapped) == POOLING | {"losses"}
    assert all(report.swapped[name].startswith("already swapped: ") for name in POOLING)
    assert set(unfuse(copy.deepcopy(model))) == POOLING | {"losses"}


def test_every_family_has_a_known_kind():
    assert {kind.family for kind in KINDS.values()} == set(FAMILIES)


# ---- expected benefits ---------------------------------------------------------------------------


def expected_ratio(dim, queries, width, heads):
    """Return the FLOPs per token with keys and values, divided by the FLOPs of query pooling."""
    return (12 * dim * width + 14 * queries * width) / (14 * heads * queries * dim)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (lambda: latent(), (D, 1, D, H)),
        (lambda: latent(latent_len=3), (D, 3, D, H)),
        (lambda: siglip().head, (D, 1, D, H)),
        (lambda: open_clip_pool(), (K, 4, D, H)),
    ],
    ids=["timm", "timm, 3", "siglip", "open_clip"],
)
def test_expected_benefit_is_the_ratio_of_flops_if_the_number_of_queries_is_known(make, sizes):
    text, ratio = fuse(make()).expected[""], expected_ratio(*sizes)
    assert ratio > 1.25 and "by count" in text
    assert f"takes {ratio:.3g} times fewer FLOPs" in text
    assert ("no benefit on a GPU" in text) == (ratio < 2)


def test_no_benefit_is_expected_if_keys_and_values_cost_less():
    text = fuse(library("open_clip.transformer.AttentionalPooler", 64, 64, 8, 256)).expected[""]
    times = f"{1 / expected_ratio(64, 256, 64, 8):.3g} times as much without keys and values"
    assert text == (
        f"no benefit by count: with 256 queries of 8 heads a token would cost {times}, so they are "
        "computed as before"
    )


@pytest.mark.parametrize(("dim", "width", "heads"), [(768, 768, 12), (32, 64, 2), (64, 64, 1)])
def test_expected_benefit_names_the_largest_number_of_queries(dim, width, heads):
    for times, index in ((1.25, 0), (2.0, 1)):
        most = int(
            re.findall(
                r"up to (\d+) queries on a CPU, (\d+) on a GPU",
                counts.pooling_benefit(dim, None, width, width, heads),
            )[0][index]
        )
        assert (
            expected_ratio(dim, most, width, heads)
            >= times
            > expected_ratio(dim, most + 1, width, heads)
        )


def test_expected_benefit_of_attention_experts_and_losses():
    texts = fuse(Model(), dry_run=True).expected
    assert (
        "no benefit with few tokens, nor in a call that runs the original forward"
        in texts["text.cross"]
    )
    assert (
        "by count 2 x 32 numbers" in texts["experts"] and "no benefit on a CPU" in texts["experts"]
    )
    assert (
        "no B x B matrix" in texts["losses"] and "no benefit with small batches" in texts["losses"]
    )
    assert "up to" in fuse(cross()).expected[""]


def test_module_with_an_unknown_size_is_swapped():
    """Only the expected benefit needs the size."""

    class Unmeasured(KINDS["timm.layers.attention_pool.AttentionPoolLatent"]):
        sizes = staticmethod(lambda module: module.not_there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "timm.layers.attention_pool.AttentionPoolLatent", Unmeasured)
        patch.setattr(base, "_classes", {})
        report = fuse(latent(), dry_run=True)
    assert list(report.swapped) == [""] and report.expected == {"": ""}


# ---- the table -----------------------------------------------------------------------------------


def test_report_is_printed_as_a_table(model):
    report = fuse_and_unfuse(model, skip="losses")
    lines = str(report).splitlines()
    assert lines[0] == "fuse: 7 swapped, 1 left" and max(map(len, lines)) <= 100
    header = lines[1]
    assert header.split() == "module class what it does now, or why it was left".split()
    columns = [0, header.index("class"), 0, header.index("what")]
    rows = [line for line in lines[2:] if line[: columns[1]].strip()]
    assert [row.split()[0] for row in rows] == [
        "vision.blocks.*.attn",
        "vision.pool",
        "text.head",
        "text.cross",
        "experts",
        "losses",
    ]
    assert (
        rows[0].startswith("vision.blocks.*.attn (3)")
        and "MultiheadAttention" in rows[0]
        and " swapped " in rows[0]
    )
    assert rows[-1].split()[:3] == ["losses", "ClipLoss", "left"]
    assert all(
        line[: columns[3]].strip() or line.startswith(" " * columns[3]) for line in lines[2:]
    )
    words = " ".join(line[columns[3] :] for line in lines[2:])
    for text in [*report.swapped.values(), *report.left.values(), *report.expected.values()]:
        assert " ".join(text.split()) in " ".join(words.split())
    # One line for each row of swapped modules; the three blocks share one row.
    assert sum(line[columns[3] :].startswith("expected: ") for line in lines) == 5


def test_long_names_in_the_table_are_broken_into_lines():
    outer = nn.Module()
    outer.a_name_that_is_rather_long = nn.ModuleDict(
        {"and_another_which_follows": nn.Sequential(open_clip_tower(), cross())}
    )
    lines = str(fuse(outer)).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("a_name_that_is_rather_long. ") for line in lines)
    column = lines[1].index("class")
    # The class name is split into Blip2QFormerMultiHead and Attention.
    assert any(line[column:].startswith("Attention ") for line in lines)
