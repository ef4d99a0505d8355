"""MOON2.0: a modality-balanced mixture of experts for products (arXiv 2511.12449), on a Qwen2-VL.

    r = mean of the last hidden states over the real tokens, scaled to unit length
    h' = sum over the top k of G~_z f_z(h), G = softmax(W_g h)
    G~_z = G_z / sum of G over the top k if k > 1, else G_z
    L_inter^theta = -log( e(q, p) / (e(q, p) + sum over n in N_q of e(q, n)) ),
                    e(q, x) = exp(q^theta . x^mm / eps)
    L_intra^w = -log( e~(w, w) / (e~(w, w) + sum over other products v of e~(w, v)) ),
                e~(w, v) = exp(w^i . v^t / eps~)
    L = sum_m omega_m L_m + rho L_aux + varsigma L_sparsity
    omega_m = mean over b in B_m of sum_z a_zm G~_zb, a = softmax over m of W* (Z, M)
    L_sparsity = mean over z of the entropy of a_z
    weight of a triplet in L_inter = 1 if phi >= delta, else phi
    phi = sigmoid(kappa (q^mm . p^mm - q^mm . n^mm - D))

h is the input of a layer's FFN, which the router W_g and Z experts f_z replace. L_aux is the
routers' balance loss. A triplet is a query q, its positive p and its hard negative n. N_q are the
negatives of q. x^theta is the r of an item x in the view theta: t (text), i (image) or mm (both).
w is p or n, so the M = 5 objectives are three L_inter and two L_intra. The items B_m of
objective m are the queries that have the view theta (L_inter), or the w that have an image
(L_intra). G~_zb is the mean of G~_z over the layers with a mixture and the tokens of item b, in the
view theta or i. The objectives are in moon2_losses.py. docs/models.md gives the source of each
part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mmfused.distributed import reported
from mmfused.library import no_autocast
from mmfused.losses import expert_shares, unit_rows
from mmfused.models import presets, qwen
from mmfused.models.fields import Options, check_field
from mmfused.models.moon2_losses import (
    INTRA,
    inter_losses,
    intra_loss,
    objective_weights,
    objectives,
)
from mmfused.models.qwen_config import HostedConfig
from mmfused.models.retrieval import (
    VIEWS,
    RetrievalModel,
    RetrievalOutput,
    View,
    check_part,
    check_views,
    late_fusion,
)
from mmfused.ops.grouped_mlp import TopKMoE
from mmfused.ops.topk_routing import Balance

Component = Literal[
    "moe", "dual_alignment", "sparsity", "balance", "filtering", "inter", "intra", "fusion"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclasses.dataclass
class MOON2Config(HostedConfig):
    """Configuration of MOON2.0.

    Examples:
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import MOON2Config
        >>> tokenizer = MOON2Config.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> config = MOON2Config.preset("tiny", **MOON2Config.of_tokenizer(tokenizer))
        >>> config.num_experts, config.top_k, config.picture_size
        (4, 2, 64)
    """

    PRESETS: ClassVar[presets.Presets] = presets.MOON2

    host: Options  # fields of transformers' Qwen2VLConfig (qwen.build_qwen2_vl)
    tokens: Options | None = None  # required: the result of qwen.token_ids(tokenizer)
    image_size: int = 64  # side of the pictures, a multiple of patch_size * spatial_merge_size
    num_experts: int = 8  # Z, number of experts of a mixture
    top_k: int = 2  # k, experts of a token
    moe_every: int = 1  # 1: every layer has a mixture, 2: every second layer, ...
    # Initial noise in the experts' weights, as a fraction of the FFN weights' standard deviation.
    expert_noise: float = 0.01
    balance: Balance = "switch"  # form of L_aux, see topk_routing
    balance_weight: float = 0.01  # rho, weight of L_aux
    sparsity_weight: float = 0.01  # varsigma, weight of L_sparsity
    temperature: float = 0.05  # eps, in L_inter
    intra_temperature: float = 0.07  # eps~, in L_intra
    own_negative_only: bool = False  # whether N_q is only the triplet's own n
    roll: bool = False  # whether L_intra's only negative is the text of the previous product
    # True: omega passes no gradient to the routers. False: the gradient also teaches the routers to
    # favour the experts of easy objectives.
    detach_routing: bool = False
    normalise: float | None = None  # sum to which the omegas are scaled; None: no scaling
    filter_threshold: float = 0.6  # delta, the phi from which a triplet has weight 1
    filter_slope: float = 10.0  # kappa
    filter_margin: float = 0.2  # D at the start; it falls to 0 during training
    freeze: tuple[qwen.Part, ...] = ()  # parts not trained; "language" includes routers and experts
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN  # normalisation of pixel_values
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    resize: Literal["crop", "stretch", "shortest"] = "crop"  # see load_picture
    resample: Literal["bicubic", "bilinear"] = "bicubic"  # of picture files
    # Ablations: "moe" (no mixtures, no L_aux, no dual alignment), "dual_alignment" (all omegas are
    # equal, no L_sparsity), "sparsity" (no L_sparsity), "balance" (no L_aux), "filtering" (all
    # triplets have weight 1), "inter" (no L_inter), "intra" (no L_intra), "fusion" (the embedding
    # of the view mm is the normalised sum of the embeddings of image and text).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature", "intra_temperature")
        if self.normalise is not None:
            self.check_positive("normalise")
        self.check_host_and_tokens()
        self.check_at_most("top_k", "num_experts")
        text = self.host["text_config"]
        layers = text.get("num_hidden_layers")
        check_field("host.text_config.num_hidden_layers", layers, int)
        if self.moe_every > layers:
            expected = f"at most the host's {layers} layers"
            raise ValueError(f"moe_every: got {self.moe_every}, expected {expected}")
        activation = text.get("hidden_act", "silu")
        if activation != "silu":
            got = f"host.text_config.hidden_act: got {activation!r}"
            raise ValueError(f"{got}, expected 'silu', the experts' activation")
        if {"inter", "intra"} <= set(self.without):
            raise ValueError(
                "without: got 'inter' and 'intra', which leaves no objective, expected at most one"
            )


class Experts(TopKMoE):
    """A mixture that replaces the FFN of one layer; its experts start as noisy copies of the FFN.

    A state_dict of the FFN can be loaded into the mixture. The layer passes keyword arguments to
    its attention, but not to its FFN. A pre-hook of the attention moves two of these arguments to
    the mixture's `padding` and `reports` before `forward` needs them. Gradient checkpointing runs
    the hook again.
    """

    padding: Tensor | None  # (B, L) bool, True = ignore
    # List to which `forward` appends the experts' shares (B, Z) and the balance loss.
    reports: list[tuple[Tensor, Tensor]] | None

    def __init__(self, layer: Any, config: MOON2Config) -> None:
        weight = layer.mlp.up_proj.weight
        hidden, dim = weight.shape
        super().__init__(
            dim,
            hidden,
            config.num_experts,
            config.top_k,
            activation="swiglu",
            bias=False,
            balance=config.balance,
        )
        self.noise: float = config.expert_noise
        self.padding = self.reports = None
        self.register_load_state_dict_pre_hook(_copy_ffn)
        self.to(weight).load_state_dict(layer.mlp.state_dict())
        layer.self_attn.register_forward_pre_hook(self.take_arguments, with_kwargs=True)

    def take_arguments(
        self,
        attention: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move two keyword arguments of the attention to `padding` and `reports`."""
        self.padding, self.reports = kwargs.pop("token_padding_mask"), kwargs.pop("reports")
        return args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture's output for x (B, L, D), and append to `reports`."""
        padding, reports = self.padding, self.reports
        self.padding = self.reports = None
        out, routing = super().forward(x, token_padding_mask=padding)
        assert reports is not None
        reports.append((expert_shares(routing, len(x)), routing.balance_loss))
        return out


def _copy_ffn(
    moe: Experts,
    state: dict[str, Tensor],
    prefix: str,
    *_: Any,
) -> None:
    """If ``state`` is the state of an FFN, turn it into a state of the mixture, in place.

    The experts become noisy copies of the FFN. The router keeps its weights.
    """
    if prefix + "up_proj.weight" not in state:
        return
    for name in ("gate", "up", "down"):
        weight = state.pop(f"{prefix}{name}_proj.weight")
        copies = weight.expand(moe.num_experts, *weight.shape)
        state[f"{prefix}w_{name}"] = copies + moe.noise * weight.std() * torch.randn_like(copies)
    state[prefix + "router.weight"] = moe.router.weight.detach()


def _without_margin(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    *_: Any,
) -> None:
    """Drop the margin from an old state; `set_progress` computes the margin."""
    state.pop(f"{prefix}margin", None)


class MOON2(RetrievalModel):
    """MOON2.0 (arXiv 2511.12449): a Qwen2-VL with a mixture of experts, for product retrieval.

    The host has random weights and needs `mmfused[models]`.

    Args:
        config: the sizes and options.

    Examples:
        >>> import torch
        >>> from mmfused.data import train_tokenizer
        >>> from mmfused.models import MOON2, MOON2Config
        >>> tokenizer = MOON2Config.prepare_tokenizer(train_tokenizer(["Red mug", "Blue plate"]))
        >>> model = MOON2(MOON2Config.preset("tiny", **MOON2Config.of_tokenizer(tokenizer)))
        >>> texts = tokenizer(["red mug", "plate"], padding=True, return_tensors="pt")
        >>> query = {"pixel_values": torch.randn(2, 3, 64, 64), **texts, "labels": torch.arange(2)}
        >>> list(model(query, candidate=query).losses)
        ['inter_image', 'inter_text', 'inter_both', 'intra_positive', 'balance', 'sparsity']
    """

    alignment: nn.Parameter | None

    def __init__(self, config: MOON2Config) -> None:
        super().__init__()
        self.config: MOON2Config = config
        c = config
        self.host: Any = qwen.build_qwen2_vl(c.host)
        if "moe" not in c.without:
            for layer in self.host.language_model.layers[c.moe_every - 1 :: c.moe_every]:
                layer.mlp = Experts(layer, c)
        qwen.freeze_parts(self.host, c.freeze)
        self.alignment = None  # W*
        if not {"moe", "dual_alignment"} & set(c.without):
            start = 0.02 * torch.randn(c.num_experts, len(objectives(c)))
            self.alignment = nn.Parameter(start)
        # D is a tensor, so that its decay does not cause recompilation. If D were a buffer, a cast
        # would round D, and to_empty would lose D.
        self.margin: Tensor = torch.tensor(c.filter_margin, dtype=torch.float64, device="cpu")
        self.register_load_state_dict_pre_hook(_without_margin)

    @property
    def picture_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.config.image_size

    def set_progress(self, share: float) -> None:
        """Set the margin D, which falls linearly to 0 during training."""
        self.margin.fill_(self.config.filter_margin * (1 - share))

    def encode(
        self,
        role: str,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode the items in their three views.

        Args:
            role: no effect.
            pixel_values: (B, 3, S, S).
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; None = all real.
            labels: (B,) int64, the product of each item.
            image_present: (B,) bool, False = the item has no image; None = all have an image.
            image_tokens: (B, n, D), output of the vision tower, in place of pixel_values.

        Returns:
            A dict with "image", "text", "both" (B, D), unit rows; "has_image", "has_text" (B,)
            bool; "labels". A model with mixtures adds "shares" (B, 3, Z) and the scalar "balance",
            which is L_aux. The shares are the experts' mean routing weights in each of VIEWS, and 0
            in a view that shows nothing.
        """
        items = self._items(pixel_values, image_tokens, input_ids, attention_mask, image_present)
        return {"labels": labels, **self._read(VIEWS, items)}

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return the loss and its terms; row i of each part belongs to query i.

        Raises:
            ValueError: the parts differ in their number of rows, or the config sets
                `own_negative_only` and `negative` is None.
        """
        c = self.config
        self._check_parts(query, candidate, negative)
        parts = (candidate,) if negative is None else (candidate, negative)
        with no_autocast(query["both"].device.type):
            losses: dict[str, Tensor] = {}
            if "inter" not in c.without:
                losses = inter_losses(query, candidate, negative, c, self.margin)
            if "intra" not in c.without:
                losses |= {name: intra_loss(x, c) for name, x in zip(INTRA, parts, strict=False)}
            omega, sparsity = self._omega(list(losses), query, candidate, negative)
            weighted = [w * value for w, value in zip(omega, losses.values(), strict=True)]
            loss = sum(weighted[1:], weighted[0])
            if "moe" not in c.without and "balance" not in c.without:
                balances = [part["balance"] for part in (query, *parts)]
                losses["balance"] = sum(balances[1:], balances[0]) / len(balances)
                loss = loss + c.balance_weight * losses["balance"]
            if sparsity is not None and "sparsity" not in c.without:
                losses["sparsity"] = sparsity
                loss = loss + c.sparsity_weight * sparsity
        return RetrievalOutput(loss, losses)

    def embed(
        self,
        views: Sequence[View] = ("both",),
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return unit embeddings (B, D) of each view, in float32, or float64 in a float64 model.

        See `encode` for the arguments.
        """
        check_views(views)
        items = self._items(pixel_values, image_tokens, input_ids, attention_mask, image_present)
        encoded = self._read(views, items)
        return {view: encoded[view] for view in views}

    def _items(
        self,
        pixel_values: Tensor | None,
        image_tokens: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_present: Tensor | None,
    ) -> qwen.Items:
        """Check the inputs, and encode pixels with the vision tower."""
        pictures, grid = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        ids = qwen.check_ids(input_ids)
        return qwen.Items(pictures, grid, ids, attention_mask, image_present, video=False)

    def _check_parts(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None,
    ) -> None:
        rows = query["both"]
        check_part("MOON2", "candidate", candidate, rows, "both")
        if negative is not None:
            check_part("MOON2", "negative", negative, rows, "both")
        elif self.config.own_negative_only:
            error = ValueError("negative: got None with own_negative_only, expected hard negatives")
            raise reported("MOON2", error, rows)

    def _read(self, views: Sequence[View], x: qwen.Items) -> dict[str, Tensor]:
        """Return what `encode` returns for ``views``, without the labels.

        The host reads all views as one batch.
        """
        fused = "fusion" not in self.config.without
        host_views = views if fused else ("image", "text")
        tokens = self.config.tokens or {}
        visible = qwen.visible(tokens, x.input_ids, x.attention_mask, x.image_present, "both")
        has_image, has_text = visible[0], visible[1].any(1)
        sequence = self._sequences(host_views, x)
        states, reports = self._states(sequence, x.pictures.repeat(len(host_views), 1, 1))
        real = sequence.attention_mask[..., None]
        states = states.masked_fill(real == 0, 0)
        states = states if states.dtype == torch.float64 else states.float()
        pooled = unit_rows(states.sum(1) / real.sum(1))  # (views * B, D)
        out: dict[str, Tensor] = dict(zip(host_views, pooled.chunk(len(host_views)), strict=True))
        if not fused:
            single = torch.where(has_image[:, None], out["image"], out["text"])
            both = late_fusion(out["image"], out["text"])
            out["both"] = torch.where((has_image == has_text)[:, None], both, single)
        if reports:  # one for each layer with a mixture
            shares = torch.stack([share for share, _ in reports]).mean(0).chunk(len(host_views))
            if not fused:
                shares = (*shares, (shares[0] + shares[1]) / 2)
            out["shares"] = torch.stack(shares, 1)
            out["balance"] = torch.stack([balance for _, balance in reports]).mean(0)
        return {**out, "has_image": has_image, "has_text": has_text}

    def _sequences(self, views: Sequence[View], x: qwen.Items) -> qwen.Sequence:
        """Return the sequences of all items, ordered by view."""
        count = len(views)
        indices = [VIEWS.index(name) for name in views]
        view = torch.tensor(indices, device=x.input_ids.device).repeat_interleave(len(x.input_ids))
        mask, present = (
            None if tensor is None else torch.cat([tensor] * count)
            for tensor in (x.attention_mask, x.image_present)
        )
        ids = x.input_ids.repeat(count, 1)
        tokens = self.config.tokens or {}
        return qwen.assemble(tokens, x.grid, ids, mask, present, view, prompt=None)

    def _states(
        self,
        sequence: qwen.Sequence,
        pictures: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return `qwen.hidden_states`, and a list of the reports of the mixtures (`Experts`)."""
        if "moe" in self.config.without:
            return qwen.hidden_states(self.host, sequence, pictures), []
        reports: list[tuple[Tensor, Tensor]] = []
        # A sequence that shows nothing is a lone end token, from which no expert should learn.
        shows = sequence.has_image | sequence.has_text
        padding = (sequence.attention_mask == 0) | ~shows[:, None]
        options = {"token_padding_mask": padding, "reports": reports}
        return qwen.hidden_states(self.host, sequence, pictures, **options), reports

    def _omega(
        self,
        names: list[str],
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None,
    ) -> tuple[Tensor | list[float], Tensor | None]:
        """Return omega of the objectives in ``names``, and L_sparsity.

        Without dual alignment, return equal weights and None.
        """
        c = self.config
        if self.alignment is None:
            return [(c.normalise or 1.0) / len(names)] * len(names), None
        return objective_weights(names, self.alignment, query, candidate, negative, c)
