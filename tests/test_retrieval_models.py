"""Properties of all four retrieval models.

GradCache and the number of ranks do not change results, and models train with missing modalities.
"""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from retrieval_models import NAMES, batch, gradients, rows_of, small_model, without_images
from torch.nn.parallel import DistributedDataParallel

import mmfused
from mmfused.models.retrieval import VIEWS
from mmfused.training.gradients import add_cached_gradients, add_gradients

# MOON2.0 computes its balance loss in each forward pass, so GradCache and ranks change this loss.
EXACT = {"moon2": {"without": ("balance",)}}


def assert_close(got, expected, rtol=1e-7):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_grad_cache_gives_the_gradients_of_the_whole_batch(name):
    whole, cached = (
        small_model(name, **EXACT.get(name, {})),
        small_model(name, **EXACT.get(name, {})),
    )
    with mmfused.backend("composed"):
        loss, terms = add_gradients(whole, [batch(name)], 1)
        cached_loss, cached_terms = add_cached_gradients(cached, batch(name), 4)
    torch.testing.assert_close(cached_loss, loss)
    assert_close(cached_terms, terms)
    expected = gradients(whole)
    assert len(expected) > 15 and max(float(g.abs().max()) for g in expected.values()) > 1e-4
    assert_close(gradients(cached), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_from_the_meta_device_computes_the_same_after_loading(name):
    """Buffers that the state dict lacks belong to the encoders or the host, and are copied."""
    model = small_model(name)
    with torch.device("meta"):
        empty = small_model(name)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    for path, value in model.named_buffers():
        assert path.startswith(("image_encoder.", "text_encoder.", "host."))
        empty.get_buffer(path).copy_(value)
    assert torch.equal(empty(**batch(name)).loss, model(**batch(name)).loss)


CASES = [(name, case) for name in NAMES for case in ("all", "few pictures", "one rank")] + [
    ("moon2", "previous")
]


def changes(name, case):
    previous = {"own_negative_only": True, "roll": True} if case == "previous" else {}
    return {**EXACT.get(name, {}), **previous}


def steps_of_rank(rank, world, path, folder):
    """Run one step for each model and case in this process, because starting processes is slow."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    for name, case in CASES:
        model = DistributedDataParallel(
            small_model(name, **changes(name, case)), find_unused_parameters=False
        )
        with mmfused.backend("composed"):
            middle = 0 if case in ("one rank", "previous") else 3
            output = model(
                **rows_of(whole_batch(name, case), *((0, middle) if rank == 0 else (middle, 6)))
            )
            output.loss.backward()
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        torch.save(
            {"loss": loss / world, **gradients(model.module)}, f"{folder}/{name}-{case}-{rank}.pt"
        )
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(steps_of_rank, (2, f"{store}/store", str(folder)), nprocs=2)
    return folder


def whole_batch(name, case):
    """Return the batch of both ranks.

    With "few pictures", only the first rank has pictures. With "one rank" and "previous", the first
    rank has no rows.
    """
    parts = batch(name)
    if case == "few pictures":
        blind = without_images(parts)
        parts = {
            role: {
                key: torch.cat([parts[role][key][:3], blind[role][key][3:]]) for key in parts[role]
            }
            for role in parts
        }
    return parts


@pytest.mark.parametrize(("name", "case"), CASES)
def test_ddp_over_two_ranks_equals_one_process(name, case, two_ranks):
    model = small_model(name, **changes(name, case))
    with mmfused.backend("composed"):
        output = model(**whole_batch(name, case))
        output.loss.backward()
    expected = {"loss": output.loss.detach(), **gradients(model)}
    for rank in (0, 1):
        assert_close(torch.load(two_ranks / f"{name}-{case}-{rank}.pt"), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_picture_or_text_trains(name):
    for hide in (without_images, without_texts):
        model = small_model(name)
        with mmfused.backend("composed"):
            add_gradients(model, [hide(batch(name))], 1)
        found = gradients(model)
        assert found.keys() == {key for key, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.isfinite().all() for gradient in found.values())


def without_texts(parts):
    hidden = {role: {**items} for role, items in parts.items()}
    for items in hidden.values():
        items["attention_mask"] = items["attention_mask"].clone()
        items["attention_mask"][:, 2:] = 0
        items["image_present"] = torch.ones_like(items["image_present"])
    return hidden


@pytest.mark.parametrize("name", NAMES)
def test_late_fusion_replaces_the_models_fusion(name):
    items = {key: value for key, value in batch(name)["query"].items() if key != "labels"}
    with mmfused.backend("composed"), torch.no_grad():
        with_fusion = small_model(name).eval().embed(views=VIEWS, **items)
        late = small_model(name, without=("fusion",)).eval().embed(views=VIEWS, **items)
    complete = [row for row in range(6) if row not in (1, 2)]
    for rows in (*with_fusion.values(), *late.values()):
        torch.testing.assert_close(rows.norm(dim=1)[complete], rows.new_ones(4))
        assert rows.isfinite().all()
    middle = torch.nn.functional.normalize(late["image"] + late["text"], dim=-1)
    torch.testing.assert_close(late["both"][complete], middle[complete])
    assert (
        with_fusion["both"]
        - torch.nn.functional.normalize(with_fusion["image"] + with_fusion["text"], dim=-1)
    )[complete].abs().max() > 1e-5


def test_a_part_without_labels_is_refused():
    parts = batch("uniecs")
    del parts["candidate"]["labels"]
    model, message = small_model("uniecs"), r"got .*, expected labels \(B,\) int64 as well"
    with pytest.raises(ValueError, match=f"^candidate: {message}"):
        model(**parts)
    with pytest.raises(ValueError, match=f"^items: {message}"):
        model.split(parts["candidate"], 2)
