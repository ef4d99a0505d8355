"""UniCA without Bi-CA against VISTA (FlagEmbedding), with a BERT and an XLM-RoBERTa as the host.

The oracle runs the host's class of transformers on one item at a time. A text alone is an ordinary
input of the host. A picture takes positions 1 to N beside [CLS] at 0, and its text the positions
from N + 1; its tokens get position embedding and LayerNorm alone.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from mmfused.data import train_tokenizer
from mmfused.models import UniCA, UniCAConfig

VIEWS = ("image", "text", "both")
PATCHES, WIDTH = 5, 12
SIZES = {
    "vocab_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 20,
    "initializer_range": 0.5,
}
XLM_R = {"model_type": "xlm-roberta", "type_vocab_size": 1}  # [CLS] 0, PAD 1, [SEP] 2
HOSTS = {
    "bert": ({**SIZES, "pad_token_id": 0}, 2, 3),
    "xlm-roberta": ({**SIZES, **XLM_R}, 0, 2),
    "xlm-roberta, another PAD": ({**SIZES, **XLM_R, "pad_token_id": 4}, 0, 2),
}
LENGTHS = torch.tensor([7, 4, 2, 2, 3, 6])


def vista(host: str, **options) -> UniCA:
    torch.manual_seed(0)
    text, first, last = HOSTS[host]
    sizes = {"image": None, "image_dim": 9, "text_dim": WIDTH, "empty_text": (first, last)}
    # The whole dict, because the options of the preset belong to BERT-base.
    values = {**UniCAConfig.values_of("code"), **sizes, "text": text, **options}
    model = UniCA(UniCAConfig.from_dict(values)).double().eval()
    for parameter in model.parameters():  # biases and LayerNorms as well
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def items(host: str, seed: int = 1, width: int = 7) -> dict:
    """Return items; items 1 and 3 have no picture, items 2 and 3 no text."""
    text, first, last = HOSTS[host]
    pad = text.get("pad_token_id", 1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (6, width), generator=generator)
    ids[:, 0] = first
    ids.scatter_(1, LENGTHS[:, None] - 1, last)
    mask = torch.arange(width) < LENGTHS[:, None]
    return {
        "image_tokens": torch.randn(6, PATCHES, 9, dtype=torch.float64, generator=generator),
        "image_present": (torch.arange(6) != 1) & (torch.arange(6) != 3),
        "input_ids": ids.where(mask, pad),
        "attention_mask": mask.long(),
    }


class Oracle:
    """VISTA's embeddings of one item, by transformers' class with the weights of a model."""

    def __init__(self, model: UniCA) -> None:
        text = dict(model.config.text)
        config = AutoConfig.for_model(text.pop("model_type", "bert"), hidden_size=WIDTH, **text)
        self.host = AutoModel.from_config(config, add_pooling_layer=False).double().eval()
        self.host.load_state_dict(model.text_encoder.state_dict())
        self.proj, self.empty = model.visual_proj, torch.tensor([model.config.empty_text])

    def text(self, ids):
        return self.host(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0, 0]

    def picture(self, tokens, ids):
        parts, count = self.host.embeddings, len(tokens)
        first = parts(input_ids=ids[:, :1], position_ids=torch.tensor([[0]]))
        where = torch.arange(count + 1, count + ids.shape[1])[None]
        rest = parts(input_ids=ids[:, 1:], position_ids=where)
        picture = self.proj(tokens) + parts.position_embeddings(torch.arange(1, count + 1))
        picture = parts.LayerNorm(picture)
        x = torch.cat((first, picture[None], rest), 1)
        return self.host.encoder(x).last_hidden_state[0, 0]

    def views(self, batch):
        rows = {view: [] for view in VIEWS}
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            tokens = batch["image_tokens"][i] if batch["image_present"][i] else None
            ids = batch["input_ids"][i : i + 1, :length] if length > 2 else self.empty

            def embed(tokens, ids):
                return self.text(ids) if tokens is None else self.picture(tokens, ids)

            rows["text"].append(self.text(ids))
            rows["image"].append(embed(tokens, self.empty))
            rows["both"].append(embed(tokens, ids))
        return {view: F.normalize(torch.stack(rows[view]), dim=-1) for view in VIEWS}


def largest(a, b) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_embeddings_are_those_of_vista(host):
    model = vista(host)
    expected = Oracle(model).views(items(host))
    for width in (7, 8, 13):  # more padding on the right
        got = model.embed(VIEWS, **items(host, width=7) | padded(host, width))
        for view in VIEWS:
            assert largest(got[view], expected[view]) < 1e-12, view
    for i in range(6):
        alone = {name: value[i : i + 1] for name, value in items(host).items()}
        got = model.embed(VIEWS, **alone)
        assert all(largest(got[view][0], expected[view][i]) < 1e-12 for view in VIEWS)


def padded(host: str, width: int) -> dict:
    """Return the texts of `items` with more padding."""
    batch, pad = items(host), HOSTS[host][0].get("pad_token_id", 1)
    ids = F.pad(batch["input_ids"], (0, width - 7), value=pad)
    return {"input_ids": ids, "attention_mask": F.pad(batch["attention_mask"], (0, width - 7))}


@pytest.mark.parametrize("host", ["bert", "xlm-roberta"])
def test_loss_and_gradients_are_those_of_vista(host):
    """Groups of one positive and one hard negative; equal labels are negatives all the same."""
    model = vista(host, freeze=())
    parts = {
        role: items(host, seed) for seed, role in enumerate(("query", "candidate", "negative"))
    }
    oracle = Oracle(model)
    query, positive, negative = (oracle.views(part)["both"] for part in parts.values())
    candidates = torch.stack((positive, negative), 1).flatten(0, 1)  # the groups
    expected = F.cross_entropy(query @ candidates.T / 0.02, 2 * torch.arange(6))
    expected.backward()
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    output = model(**{role: {**part, "labels": labels} for role, part in parts.items()})
    output.loss.backward()
    assert abs(output.loss - expected).item() < 1e-12 * abs(expected.item())
    assert torch.equal(output.losses["info_nce"], output.loss)
    theirs = dict(oracle.host.named_parameters())
    assert theirs
    for name, parameter in model.text_encoder.named_parameters():
        wanted = theirs[name].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        error = largest(parameter.grad, wanted)
        assert error < 1e-10 * max(1, wanted.abs().max().item()), name


@pytest.mark.parametrize(("host", "limit"), [("bert", 15), ("xlm-roberta", 15)])
@torch.no_grad()
def test_the_longest_text_beside_a_picture(host, limit):
    model, batch = vista(host), items(host)
    batch |= padded(host, limit)
    assert model.embed(**batch)["both"].isfinite().all()
    batch |= padded(host, limit + 1)
    with pytest.raises(ValueError, match=f"from 2 to {limit} tokens beside 5 image tokens"):
        model.embed(**batch)


@torch.no_grad()
def test_the_longest_text_of_an_xlm_roberta_beside_few_image_tokens():
    model, host = vista("xlm-roberta"), "xlm-roberta"
    batch = {**items(host), "image_present": torch.zeros(6, dtype=torch.bool)}
    batch["image_tokens"] = batch["image_tokens"][:, :1]
    batch["input_ids"] = torch.full((6, 18), 7)  # positions 2 to 19
    batch["attention_mask"] = None
    assert model.embed(**batch)["both"].isfinite().all()
    batch["input_ids"] = torch.full((6, 19), 7)
    with pytest.raises(ValueError, match="from 2 to 18 tokens beside 1 image tokens"):
        model.embed(**batch)


def test_a_tokenizer_gives_its_vocabulary_its_pad_and_an_empty_text():
    tokenizer = train_tokenizer(["Red mug", "Blue plate"])
    tokenizer.pad_token = "mug"
    options = UniCAConfig.of_tokenizer(tokenizer)
    assert options == {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.vocab["mug"],
        "empty_text": (tokenizer.cls_token_id, tokenizer.sep_token_id),
    }
    config = UniCAConfig.preset("tiny", **options)
    assert config.text["pad_token_id"] == tokenizer.pad_token_id != 0
    assert UniCA(config).text_encoder.config.pad_token_id == tokenizer.pad_token_id
    # An encoder with fields of its own keeps its own PAD.
    own = UniCAConfig.preset("tiny", **options, text={"model_type": "bert", "vocab_size": 40})
    assert "pad_token_id" not in own.text
    with pytest.raises(ValueError, match="pad_token_id: got -2, expected an integer from -1"):
        UniCAConfig.preset("tiny", pad_token_id=-2)


def test_the_code_preset_is_vista_and_older_configs_keep_the_token_type():
    config = UniCAConfig.preset("code")
    assert (config.temperature, config.same_id, config.freeze) == (0.02, "ignore", ("text",))
    assert config.image == {"name": "eva02_base_patch16_clip_224", "final_norm": False}
    assert not config.image_token_type and not UniCAConfig.preset("paper").image_token_type
    model = vista("bert")
    assert not model.bica and model.positive_weight == 0
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    saved = config.to_dict()
    for name in ("image_token_type", "same_id"):
        del saved[name]
    old = UniCAConfig.from_dict(saved)
    assert old.image_token_type and old.same_id == "drop"
