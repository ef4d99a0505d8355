"""MOON2.0: a modality-balanced mixture of experts for products (arXiv 2511.12449), on a Qwen2-VL.

    r = mean over the real tokens of the last hidden states, of unit length
    h' = sum over the top k of G~_z f_z(h), G = softmax(W_g h), G~ renormalised: the layers' FFN
    L_inter^theta = -log exp(q^theta . p^mm / eps) / (that + sum over N_q of
                    exp(q^theta . n^mm / eps))
    L_intra^w = -log exp(w^i . w^t / eps~) / (that + sum over other v of exp(w^i . v^t / eps~))
    L = sum_m omega_m L_m + rho L_aux + varsigma L_sparsity
    omega_m = mean over b in B_m of sum_z p_zm G~_zb, p = softmax over m of W* (Z, M)
    L_sparsity = mean over z of the entropy of p_z
    a triplet weighs 1 in L_inter where phi >= 0.6, else phi = sigmoid(kappa (q.p - q.n - D))

The view theta is t (text), i (image) or mm (both), w is p or n, M = 5 objectives. These are in
moon2_losses.py; docs/models.md says where each part comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mmfused.distributed import refused
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

Component = Literal[
    "moe", "dual_alignment", "sparsity", "balance", "filtering", "inter", "intra", "fusion"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)


@dataclasses.dataclass
class MOON2Config(HostedConfig):
    """Configuration of MOON2.0."""

    PRESETS: ClassVar[presets.Presets] = presets.MOON2

    host: Options  # qwen.build_qwen2_vl(host)
    tokens: Options | None = None  # qwen.token_ids(tokenizer), which every model needs
    image_size: int = 64  # side of the pictures, a multiple of patch and merge
    num_experts: int = 8  # Z
    # With 1 the expert's output is scaled by its probability, and so does not start as the FFN's.
    top_k: int = 2
    moe_every: int = 1  # every n-th layer has a mixture
    # Noise between the experts at first, as a share of their weights' standard deviation.
    expert_noise: float = 0.01
    balance: Literal["switch", "gshard"] = "switch"  # L_aux, see topk_routing
    balance_weight: float = 0.01  # rho
    sparsity_weight: float = 0.01  # varsigma
    temperature: float = 0.05  # eps, between products
    intra_temperature: float = 0.07  # eps~, within a product
    own_negative_only: bool = False  # N_q is the triplet's own n
    roll: bool = False  # L_intra's only negative is the previous product's text
    # omega gives no gradient to the routers, which otherwise favour experts of easy objectives.
    detach_routing: bool = False
    normalise: float | None = None  # sum of the omegas; None: unchanged, the paper's, about 1
    filter_threshold: float = 0.6  # delta
    filter_slope: float = 10.0  # kappa
    filter_margin: float = 0.2  # D at the start
    freeze: tuple[qwen.Part, ...] = ()  # routers and experts belong to the language model
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    # Ablations: "moe" (the host's own FFN, so neither L_aux nor dual alignment), "dual_alignment"
    # (every omega is 1/M, its initial value; no L_sparsity), "sparsity" (no such term), "balance"
    # (no L_aux), "filtering" (all triplets weigh 1), "inter" and "intra" (no such losses; the
    # omegas are the others'), "fusion" (mm is the direction between the image's and the text's).
    without: tuple[Component, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature", "intra_temperature")
        if self.normalise is not None:
            self.check_positive("normalise")
        self.check_host()
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
                "without: got 'inter' and 'intra', which leaves no objective, expected one of them"
            )


class Experts(TopKMoE):
    """The mixture in the place of a host's FFN; its experts start from the FFN's weights.

    A state of the FFN loads into it, too. The layer calls it with hidden states alone, so padding
    and the list for this pass's reports come with the layer's keyword arguments and are handed over
    at the attention, which the layer calls before. With gradient checkpointing that is inside what
    is recomputed. Nothing of a pass remains here.
    """

    padding: Tensor | None
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
        layer.self_attn.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(
        self,
        attention: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take this pass's padding and reports from the attention's keyword arguments."""
        self.padding, self.reports = kwargs.pop("token_padding_mask"), kwargs.pop("reports")
        return args, kwargs

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); append to the reports of this pass."""
        padding, reports = self.padding, self.reports
        self.padding = self.reports = None
        out, routing = super().forward(x, token_padding_mask=padding)
        assert reports is not None
        reports.append((expert_shares(routing, len(x)), routing.balance_loss))
        return out


def _copy_ffn(moe: Experts, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Turn an FFN's state into that of its mixture, in place.

    The experts are copies of the FFN with a little noise; the router stays unchanged.
    """
    if prefix + "up_proj.weight" not in state:
        return
    for name in ("gate", "up", "down"):
        weight = state.pop(f"{prefix}{name}_proj.weight")
        copies = weight.expand(moe.num_experts, *weight.shape)
        state[f"{prefix}w_{name}"] = copies + moe.noise * weight.std() * torch.randn_like(copies)
    state[prefix + "router.weight"] = moe.router.weight.detach()


def _without_margin(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Drop the margin of earlier states: it follows from the training's progress."""
    state.pop(f"{prefix}margin", None)


class MOON2(RetrievalModel):
    """MOON2.0 from a `MOON2Config`; the host starts random and needs `mmfused[models]`."""

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
        # D. A tensor, so that its decay does not recompile; no buffer, as a cast would round it and
        # to_empty lose it.
        self.margin: Tensor = torch.tensor(c.filter_margin, dtype=torch.float64, device="cpu")
        self.register_load_state_dict_pre_hook(_without_margin)

    @property
    def picture_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.config.image_size

    def set_progress(self, share: float) -> None:
        """Lower the margin D linearly to 0."""
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
            role: "query", "candidate" or "negative", which are encoded alike.
            pixel_values: (B, 3, S, S); or image_tokens (B, n, D), as the vision tower returns them.
            input_ids: (B, T) int64, with attention_mask (B, T), 1 = real, None = all.
            labels: (B,) int64, the product.
            image_present: (B,) bool, None = all.

        Returns:
            "image", "text", "both" (B, D), unit rows; "has_image", "has_text" (B,) bool; "labels";
            with a mixture "shares" (B, 3, Z), the experts' shares of each view, 0 where it shows
            nothing, and "balance", a scalar.
        """
        items = self._items(pixel_values, image_tokens, input_ids, attention_mask, image_present)
        return {"labels": labels, **self._read(VIEWS, items)}

    def compare(
        self,
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None = None,
    ) -> RetrievalOutput:
        """Return all losses; row i of a part belongs to query i.

        Raises:
            ValueError: where `own_negative_only` has no `negative`, or a part has another number
                of rows.
        """
        c = self.config
        self._check_parts(query, candidate, negative)
        parts = (candidate,) if negative is None else (candidate, negative)
        with no_autocast(query["both"].device.type):
            losses: dict[str, Tensor] = {}
            if "inter" not in c.without:
                losses = inter_losses(query, candidate, negative, c, self.margin)
            if "intra" not in c.without:
                losses |= {n: intra_loss(part, c) for n, part in zip(INTRA, parts, strict=False)}
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
        """Return unit embeddings (B, D) in float32 of each view; arguments as `encode`'s."""
        check_views(views)
        items = self._items(pixel_values, image_tokens, input_ids, attention_mask, image_present)
        read = self._read(views, items)
        return {view: read[view] for view in views}

    def _items(
        self,
        pixel_values: Tensor | None,
        image_tokens: Tensor | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_present: Tensor | None,
    ) -> qwen.Items:
        """Check the inputs and run the vision tower."""
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
            raise refused("MOON2", error, rows)

    def _read(self, views: Sequence[View], x: qwen.Items) -> dict[str, Tensor]:
        """Return embeddings of the views, and what else `encode` returns but the labels.

        The host reads all views as one batch.
        """
        fused = "fusion" not in self.config.without
        shown = views if fused else ("image", "text")
        tokens = self.config.tokens or {}
        image, text = qwen.visible(tokens, x.input_ids, x.attention_mask, x.image_present, "both")
        text = text.any(1)
        sequence = self._sequences(shown, x)
        states, reports = self._states(sequence, x.pictures.repeat(len(shown), 1, 1))
        real = sequence.attention_mask[..., None]
        states = states.masked_fill(real == 0, 0)
        states = states if states.dtype == torch.float64 else states.float()
        pooled = unit_rows(states.sum(1) / real.sum(1))  # (views * B, D)
        out: dict[str, Tensor] = dict(zip(shown, pooled.chunk(len(shown)), strict=True))
        if not fused:
            only = torch.where(image[:, None], out["image"], out["text"])
            both = late_fusion(out["image"], out["text"])
            out["both"] = torch.where((image == text)[:, None], both, only)
        if reports:  # of each layer
            shares = torch.stack([share for share, _ in reports]).mean(0).chunk(len(shown))
            if not fused:
                shares = (*shares, (shares[0] + shares[1]) / 2)
            out["shares"] = torch.stack(shares, 1)
            out["balance"] = torch.stack([balance for _, balance in reports]).mean(0)
        return {**out, "has_image": image, "has_text": text}

    def _sequences(self, shown: Sequence[View], x: qwen.Items) -> qwen.Sequence:
        """Return the sequences of all items in the first view, then of all in the second, …"""
        count = len(shown)
        indices = [VIEWS.index(name) for name in shown]
        view = torch.tensor(indices, device=x.input_ids.device).repeat_interleave(len(x.input_ids))
        mask, present = (
            None if tensor is None else torch.cat([tensor] * count)
            for tensor in (x.attention_mask, x.image_present)
        )
        ids = x.input_ids.repeat(count, 1)
        tokens = self.config.tokens or {}
        return qwen.assemble(tokens, x.grid, ids, mask, present, view, prompt=False)

    def _states(
        self,
        sequence: qwen.Sequence,
        pictures: Tensor,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return `qwen.hidden_states`, and each mixture's shares (B, Z) and balance loss."""
        if "moe" in self.config.without:
            return qwen.hidden_states(self.host, sequence, pictures), []
        reports: list[tuple[Tensor, Tensor]] = []
        # A sequence that shows nothing is an end token, which no expert should learn from.
        shows = sequence.has_image | sequence.has_text
        padding = (sequence.attention_mask == 0) | ~shows[:, None]
        routed = {"token_padding_mask": padding, "reports": reports}
        return qwen.hidden_states(self.host, sequence, pictures, **routed), reports

    def _omega(
        self,
        names: list[str],
        query: dict[str, Tensor],
        candidate: dict[str, Tensor],
        negative: dict[str, Tensor] | None,
    ) -> tuple[Tensor | list[float], Tensor | None]:
        """Return omega of the objectives in ``names``, and L_sparsity; from all ranks."""
        c = self.config
        if self.alignment is None:
            return [(c.normalise or 1.0) / len(names)] * len(names), None
        return objective_weights(names, self.alignment, query, candidate, negative, c)
