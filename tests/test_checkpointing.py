"""Gradient checkpointing gives the gradients of plain training, and drops activations."""

import copy

import pytest
import torch
from lora_models import NAMES, batch_of, dropping_model, randomise

from mmfused.models import qwen
from mmfused.models.checkpointing import checkpoint_layers
from mmfused.models.lora import add_lora
from mmfused.training.gradients import add_cached_gradients, add_gradients


def layers_of(model):
    """Return the layers of the model's transformers."""
    if hasattr(model, "host"):
        return [*model.host.visual.blocks, *model.host.language_model.layers]
    return [*model.image_encoder.blocks, *model.text_encoder.encoder.layer]


def count_calls(modules):
    counts = [0] * len(modules)
    for index, module in enumerate(modules):

        def forward(*args, _index=index, _inner=module.forward, **kwargs):
            counts[_index] += 1
            return _inner(*args, **kwargs)

        module.forward = forward
    return counts


def step(model, name, chunk=None):
    """Return the loss and all gradients of one step."""
    torch.manual_seed(3)
    if chunk is None:
        loss, _ = add_gradients(model, [batch_of(name)], 1)
    else:
        loss, _ = add_cached_gradients(model, batch_of(name), chunk)
    return loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


WHOLE = [(name, None) for name in NAMES]
CACHED = [(name, 4) for name in NAMES if name != "fluid"]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(("name", "chunk"), WHOLE + CACHED)
def test_gradients_equal_those_without_checkpoints(name, chunk, lora):
    if lora:
        pytest.importorskip("peft")
    model = dropping_model(name)
    if lora:
        add_lora(model, rank=2, dropout=0.2)
        randomise(model)
    checkpointed = checkpoint_layers(copy.deepcopy(model))
    loss, wanted = step(model, name, chunk)
    checkpointed_loss, found = step(checkpointed, name, chunk)
    assert torch.equal(checkpointed_loss, loss) and found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert torch.equal(found[key], gradient), key
    assert any(gradient.any() for gradient in wanted.values())
    other = step(copy.deepcopy(model).eval(), name, chunk)[0]
    assert not torch.equal(other, loss)  # there is dropout


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_runs_again_in_the_backward_pass(name):
    model = checkpoint_layers(dropping_model(name))
    counts = count_calls([next(layer.children()) for layer in layers_of(model)])
    loss = model(**batch_of(name)).loss
    forward = list(counts)
    loss.backward()
    assert all(forward) and counts == [2 * count for count in forward]
    counts[:] = [0] * len(counts)
    model.eval()
    with torch.no_grad():
        model(**batch_of(name))
    assert counts == forward


def test_a_recomputed_mixture_adds_nothing_to_the_reports(monkeypatch):
    """Otherwise the reports would keep the activations of all layers during the backward pass."""
    kept, inner = [], qwen.hidden_states

    def hidden_states(*args, **options):
        kept.append(options["reports"])
        return inner(*args, **options)

    monkeypatch.setattr(qwen, "hidden_states", hidden_states)
    model = checkpoint_layers(dropping_model("moon2"))
    loss = model(**batch_of("moon2")).loss
    counts = count_calls([layer.mlp for layer in model.host.language_model.layers])
    loss.backward()
    assert counts == [3, 3]  # three parts
    assert [len(reports) for reports in kept] == [2, 2, 2]


def test_autocast_holds_in_the_recomputed_layers():
    plain = dropping_model("unite").float()
    model = checkpoint_layers(copy.deepcopy(plain))
    parts = batch_of("unite")
    gradients = []
    for each in (plain, model):
        torch.manual_seed(3)
        add_gradients(each, [parts], 1, amp=True)
        gradients.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize(
    ("name", "part"), [("unite", "language"), ("uniecs", "image"), ("uniecs", "text")]
)
def test_frozen_layers_with_adapters_are_checkpointed_and_keep_their_mode(name, part):
    pytest.importorskip("peft")
    targets = {"language": ["q_proj"], "image": ["qkv"], "text": ["query"]}[part]
    plain = randomise(add_lora(dropping_model(name, freeze=(part,)), dropout=0.5, targets=targets))
    model = checkpoint_layers(copy.deepcopy(plain))
    loss, wanted = step(plain, name)
    checkpointed_loss, found = step(model, name)
    assert torch.equal(checkpointed_loss, loss) and found.keys() == wanted.keys()
    assert all(torch.equal(found[key], gradient) for key, gradient in wanted.items())
    names = {"language": "host.language_model", "image": "image_encoder", "text": "text_encoder"}
    frozen = model.get_submodule(names[part])
    norms = [layer for layer in frozen.modules() if type(layer) is torch.nn.LayerNorm]
    assert not any(layer.training for layer in [frozen, *norms])
    inner = [next(layer.children()) for layer in layers_of(model) if layer in [*frozen.modules()]]
    counts = count_calls(inner)
    model(**batch_of(name)).loss.backward()
    parts = len(batch_of(name))
    assert counts == [2 * parts] * 2


def test_adapters_in_a_vit_have_gradients_whatever_timm_is_set_to(monkeypatch):
    pytest.importorskip("peft")
    layers = pytest.importorskip("timm.layers.config")
    monkeypatch.setattr(layers, "_USE_REENTRANT_CKPT", True)
    model = checkpoint_layers(add_lora(dropping_model("uniecs"), targets=["qkv"]))
    model(**batch_of("uniecs")).loss.backward()
    found = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(found) == 2 and all(gradient.any() for gradient in found)


def test_a_frozen_encoder_has_no_graph():
    model = checkpoint_layers(dropping_model("uniecs", freeze=("text",)))
    ids = batch_of("uniecs")["query"]["input_ids"]
    assert not model.text_encoder(ids).last_hidden_state.requires_grad


def test_a_type_that_cannot_be_checkpointed_is_refused():
    text = {"model_type": "mpnet", "num_hidden_layers": 1, "num_attention_heads": 2}
    model = dropping_model("uniecs", text={**text, "intermediate_size": 16, "vocab_size": 100})
    expected = "grad_checkpointing: got a text_encoder of type 'mpnet', expected a type that"
    with pytest.raises(ValueError, match=expected):
        checkpoint_layers(model)
