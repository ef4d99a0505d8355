"""timm's Eva, the class of EVA02-CLIP, as an image encoder."""

import json

import pytest
import timm
import torch

from mmfused.models import FLUID, FLUIDConfig, UniECS, UniECSConfig
from mmfused.models.checkpointing import checkpoint_layers
from mmfused.models.encoders import build_vit, check_image, freeze, picture_size
from mmfused.models.lora import add_lora, merge_lora
from mmfused.models.pretrained import pretrained_vit

SMALL = {
    "name": "eva02_base_patch16_clip_224",
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "patch_size": 8,
    "img_size": 32,
}


def rotated(heads, side, reference):
    """Return heads (B, H, side * side, d) after EVA-02's rotation, whose table is float32."""
    half = heads.shape[-1] // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    places = torch.arange(side, dtype=torch.float64) / side * reference
    angles = (places[:, None] * frequencies).repeat_interleave(2, -1)
    table = torch.cat(
        [
            angles[:, None].expand(side, side, half),
            angles[None].expand(side, side, half),
        ],
        -1,
    ).reshape(side * side, 2 * half)
    turned = torch.stack([-heads[..., 1::2], heads[..., ::2]], -1).flatten(-2)
    return heads * table.cos() + turned * table.sin()


def eva_tokens(state, pixels, depth, count, reference):
    """Return EVA02-CLIP's tokens before the last norm, from the equations of EVA-02."""

    def norm(name, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return (x - mean) / (variance + 1e-6).sqrt() * weight + bias

    def linear(name, x):
        y = x @ state[f"{name}.weight"].T
        return y + state[f"{name}.bias"] if f"{name}.bias" in state else y

    weight = state["patch_embed.proj.weight"]
    width, size = weight.shape[0], weight.shape[-1]
    side = pixels.shape[-1] // size
    patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
    x = patches.flatten(3).flatten(1, 2) @ weight.flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(len(x), 1, width), x], 1) + state["pos_embed"]
    for block in (f"blocks.{i}" for i in range(depth)):
        y = norm(f"{block}.norm1", x)
        q, k, v = (
            linear(f"{block}.attn.{part}_proj", y).unflatten(-1, (count, -1)).transpose(1, 2)
            for part in "qkv"
        )
        q, k = (torch.cat([z[:, :, :1], rotated(z[:, :, 1:], side, reference)], 2) for z in (q, k))
        scores = q @ k.transpose(-1, -2) / (width // count) ** 0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{block}.attn.proj", norm(f"{block}.attn.norm", y))
        y = norm(f"{block}.norm2", x)
        gate = linear(f"{block}.mlp.fc1_g", y)
        y = gate * torch.sigmoid(gate) * linear(f"{block}.mlp.fc1_x", y)
        x = x + linear(f"{block}.mlp.fc2", norm(f"{block}.mlp.norm", y))
    return x


def random_eva(**options):
    """Return a small Eva in float64 whose weights are all random."""
    vit = build_vit(48, "patch", {**SMALL, **options}).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).double()
    return vit


@pytest.mark.parametrize("side", [32, 40])
def test_tokens_follow_the_equations_of_eva02_before_and_after_the_last_norm(side):
    vit = random_eva(img_size=side)
    pixels = torch.randn(2, 3, side, side, dtype=torch.float64)
    state = vit.state_dict()
    expected = eva_tokens(state, pixels, 2, 3, 16)  # 16: EVA02-CLIP's side of pretraining
    early = build_vit(48, "patch", {**SMALL, "img_size": side, "final_norm": False}).double()
    early.load_state_dict({key: state[key] for key in early.state_dict()})
    tokens = early.eval().forward_features(pixels)
    assert tokens.shape == (2, 1 + (side // 8) ** 2, 48)
    # The rotation's table is computed in float32.
    assert (tokens - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(vit.forward_features(pixels), vit.norm(tokens))
    assert not any(key.startswith("norm.") for key in early.state_dict())
    arguments = {**SMALL, "img_size": side}
    other = timm.create_model(arguments.pop("name"), num_classes=0, **arguments)
    other.double().eval().load_state_dict(state)
    assert torch.equal(other.forward_features(pixels), vit.forward_features(pixels))


def test_picture_size_is_the_models_own_or_the_given_one():
    assert picture_size(48, SMALL) == 32
    options = {**SMALL, "name": "eva02_large_patch14_clip_336", "patch_size": 14}
    del options["img_size"]
    assert picture_size(48, options) == 336


REFUSED = [
    (
        {"name": "vit_small_patch16_dinov3"},
        384,
        "an Eva with 5 other tokens, expected timm's Visio",
    ),
    ({**SMALL, "embed_dim": 50}, 50, "an Eva that cannot run: "),
    ({**SMALL, "num_heads": 4}, 64, "of width 48, expected the width 64 of image_dim"),
    (
        {**SMALL, "rope_type": "mixed"},
        48,
        "image: got a field 'rope_type', expected name, img_size",
    ),
    ({**SMALL, "checkpoint_path": "x"}, 48, "image: got a field 'checkpoint_path', expected name"),
    ({**SMALL, "final_norm": 0}, 48, "image.final_norm: got 0, expected True or False"),
    ({**SMALL, "depth": 2000}, 48, "image.depth: got 2000, expected an integer from 1 to 1000"),
    (
        {"name": "beit_base_patch16_224"},
        768,
        "a Beit, expected timm's VisionTransformer, or an Eva",
    ),
]


@pytest.mark.parametrize(("options", "dim", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_other_architectures_and_options_are_refused(options, dim, message):
    with pytest.raises(ValueError) as caught:
        check_image(options)
        build_vit(dim, "patch", options)
    assert message in str(caught.value)


def test_fields_of_the_two_classes_are_not_mixed():
    with pytest.raises(ValueError, match="image: got a field 'swiglu_mlp', expected name"):
        check_image({"name": "vit_base_patch16_224", "swiglu_mlp": True})
    with pytest.raises(ValueError, match="image: got a field 'pre_norm', expected name"):
        check_image({**SMALL, "pre_norm": True})


def small_model(**options):
    torch.manual_seed(0)
    image = {**SMALL, "final_norm": False}
    config = FLUIDConfig.preset(
        "tiny", num_classes=3, modalities="image", image=image, image_dim=48, **options
    )
    return FLUID(config)


def gradients(model, pixels):
    model.zero_grad()
    model(pixel_values=pixels, labels=torch.tensor([0, 2])).loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_checkpointed_blocks_give_the_same_gradients():
    model, pixels = small_model().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = gradients(model, pixels)
    checkpoint_layers(model)
    calls = []
    for block in model.image_encoder.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model, pixels)
    assert len(calls) == 4  # each of the two blocks runs again
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_adapters_reach_every_linear_layer_and_merge():
    pytest.importorskip("peft")
    model, pixels = small_model().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names = list(model.state_dict())
    add_lora(model, rank=2)
    adapted = {name.split(".lora_A")[0] for name in model.state_dict() if ".lora_A" in name}
    expected = [f"attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "proj")]
    expected += [f"mlp.{part}" for part in ("fc1_g", "fc1_x", "fc2")]
    assert adapted == {
        f"image_encoder.blocks.{layer}.{part}" for layer in range(2) for part in expected
    }
    trained = gradients(model, pixels)
    assert any("lora_B" in name for name in trained)
    assert not any(name.startswith("image_encoder") and "lora" not in name for name in trained)
    merge_lora(model)
    assert list(model.state_dict()) == names
    targeted = add_lora(small_model(), targets=["q_proj", "v_proj"])
    assert sum(".lora_A" in name for name in targeted.state_dict()) == 4


def test_a_frozen_encoder_does_not_drop():
    vit = build_vit(48, "patch", {**SMALL, "proj_drop_rate": 0.5, "drop_path_rate": 0.5})
    pixels = torch.randn(2, 3, 32, 32)
    dropped = vit.train().forward_features(pixels)
    freeze(vit).train()
    kept = vit.forward_features(pixels)
    assert torch.equal(kept, vit.forward_features(pixels)) and not torch.equal(kept, dropped)


def test_one_graph_computes_the_same():
    torch.compiler.reset()
    vit = random_eva()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = vit.forward_features(pixels)
    compiled = torch.compile(vit.forward_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels), expected, rtol=1e-12, atol=1e-12)


def test_a_folder_loads_resamples_and_rebuilds(tmp_path):
    arguments = {name: value for name, value in SMALL.items() if name != "name"}
    saved = timm.create_model(SMALL["name"], num_classes=5, **arguments).eval()
    timm.models.save_for_hf(saved, tmp_path, model_args=arguments, safe_serialization=True)
    fields, encoder = pretrained_vit(str(tmp_path))
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.eval().forward_features(pixels), saved.forward_features(pixels))
    assert fields["image_dim"] == 48
    rebuilt = build_vit(48, "patch", json.loads(json.dumps(fields["image"])))
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(rebuilt.eval().forward_features(pixels), saved.forward_features(pixels))
    larger, resampled = pretrained_vit(str(tmp_path), image_size=48)
    saved.set_input_size(48)  # resamples in timm's own way
    pixels = torch.randn(2, 3, 48, 48)
    assert larger["image"]["img_size"] == 48
    torch.testing.assert_close(
        resampled.eval().forward_features(pixels), saved.forward_features(pixels)
    )


@pytest.mark.parametrize("name", ["eva_giant_patch14_clip_224", "eva02_tiny_patch14_224"])
def test_adapters_of_fused_attention_take_part(name):
    """timm's Eva otherwise reads qkv.weight itself, without the adapter."""
    pytest.importorskip("peft")
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    config = {"image_dim": 64, "text_dim": 16, "image_stem": "patch"}
    model = UniECS(UniECSConfig(dim=32, image={"name": name, **sizes}, **config)).double().eval()
    encoder, pixels = model.image_encoder, torch.randn(2, 3, 16, 16).double()
    expected = encoder.forward_features(pixels)
    add_lora(model, rank=2)
    torch.testing.assert_close(encoder.forward_features(pixels), expected)
    for key, weight in encoder.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(weight)
    adapted = encoder.forward_features(pixels)
    adapted.square().sum().backward()
    trained = [weight for weight in encoder.parameters() if weight.requires_grad]
    assert len(trained) >= 8 and all(weight.grad.abs().max() > 0 for weight in trained)
    merge_lora(model)
    torch.testing.assert_close(encoder.forward_features(pixels), adapted)
