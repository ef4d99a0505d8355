"""MOON2.0: a modality-balanced mixture of experts for products (arXiv 2511.12449), on a Qwen2-VL.

    r = mean over the real tokens of the last hidden states, of unit length; views theta: t text, i
    image, mm both h' = sum over the top k of G~_z f_z(h), G = softmax(W_g h), G~ renormalised
    the FFN of the decoder's layers L_inter^theta = -log exp(q^theta . p^mm / eps) / (that + sum
    over N_q of exp(q^theta . n^mm / eps)) L_intra^w = -log exp(w^i . w^t / eps~) / (that + sum over
    other products v of exp(w^i . v^t / eps~)), w = p or n omega_m = mean over b in B_m of sum_z
    p_zm G~_zb, p = softmax over m of W* (Z, M)         of M = 5 objectives L = sum_m omega_m L_m +
    rho L_aux + varsigma L_sparsity, L_sparsity = mean over z of the entropy of p_z triplet's weight
    in L_inter: 1 where phi >= 0.6, less elsewhere, phi = sigmoid(kappa (q.p - q.n - D))

The paper's: all of the above; it has no public code. It names neither its host nor Z, k, f, rho,
varsigma, eps, eps~, kappa, D. This library's choice (inferred): Qwen2.5-VL-3B's sizes in preset
"paper", as the paper's predecessor; Z = 8, k = 2, experts that start as copies of the host's FFN;
eps 0.05, eps~ 0.07, rho = varsigma = 0.01; G~_zb the mean over a sequence's tokens and then over
layers, of the sequence that is the objective's query (q's three views, p's image, n's image), B_m
the samples that have it; N_q the own n and all p and n of other triplets, over all ranks
(`own_negative_only`); the captions of all other candidates, or other negatives, as L_intra's
negatives (`roll`: those of the previous product alone, as its index w-1 reads); L_aux as Switch
Transformer's, the mean over layers and over the parts of the batch, each forward pass (a GradCache
chunk, a rank) by itself; the weight of an unreliable triplet phi, a constant, kappa = 10, D from
0.2 to 0 linearly; phi of the views mm. An item's view is real where the item has what it shows, mm
where it has both: only such rows count, in their objective and in its B_m. As a candidate an item's
mm is what it has; one of nothing is nobody's negative. Without negatives there is no filtering, and
four objectives. Preset "tiny". Left out: enriched titles and augmented pictures, which are the
data's."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmfused.distributed import gather_rows, in_group, refused
from mmfused.library import no_autocast
from mmfused.losses import dual_alignment, expert_shares, unit_rows
from mmfused.models import qwen
from mmfused.models.fields import check_field
from mmfused.models.qwen import HostedConfig
from mmfused.models.retrieval import (
    VIEWS,
    RetrievalModel,
    RetrievalOutput,
    check_views,
    late_fusion,
)
from mmfused.ops.grouped_mlp import TopKMoE
from mmfused.ops.masked_info_nce import loss_over_ranks, masked_info_nce

INTER = tuple(f"inter_{view}" for view in VIEWS)
INTRA = ("intra_positive", "intra_negative")
COMPONENTS = (
    "moe",
    "dual_alignment",
    "sparsity",
    "balance",
    "filtering",
    "inter",
    "intra",
    "fusion",
)
CHOICES = {"balance": ("switch", "gshard"), "freeze": tuple(qwen.PARTS), "without": COMPONENTS}
NOBODY = 1 << 62  # a candidate's key that no query has


@dataclasses.dataclass
class MOON2Config(HostedConfig):
    """Values that do not fit together raise ValueError."""

    host: dict  # qwen.build_qwen2_vl(host)
    tokens: dict | None = None  # qwen.token_ids(tokenizer); every model needs them
    image_size: int = 64  # side of the pictures, a multiple of patch and merge
    num_experts: int = 8  # Z
    top_k: int = 2  # with 1, the expert's output is scaled by its probability, and so does not start as the host's FFN
    moe_every: int = 1  # every n-th layer has a mixture
    expert_noise: float = 0.01  # in which the experts differ at first, as a share of their weights' standard deviation
    balance: str = "switch"  # L_aux: "switch" | "gshard", see topk_routing
    balance_weight: float = 0.01  # rho
    sparsity_weight: float = 0.01  # varsigma
    temperature: float = 0.05  # eps, between products
    intra_temperature: float = 0.07  # eps~, within a product
    own_negative_only: bool = False  # N_q is the triplet's own n
    roll: bool = False  # L_intra's only negative is the previous product's caption
    detach_routing: bool = False  # omega gives no gradient to the routers, which otherwise favour experts of easy objectives
    normalise: float | None = (
        None  # what the omegas sum to; None: as they are, the paper's, about 1
    )
    filter_threshold: float = 0.6  # delta
    filter_slope: float = 10.0  # kappa
    filter_margin: float = 0.2  # D at the start
    freeze: tuple[
        str, ...
    ] = ()  # of "vision", "language"; routers and experts are the language model's
    pixel_mean: tuple[float, float, float] = qwen.PIXEL_MEAN
    pixel_std: tuple[float, float, float] = qwen.PIXEL_STD
    # Left out: "moe" (the host's own FFN, and so neither L_aux nor dual alignment),
    # "dual_alignment" (every omega is 1/M, what it starts as; no L_sparsity), "sparsity" (no such
    # term), "balance" (no L_aux), "filtering" (all triplets weigh 1), "inter" and "intra" (no such
    # losses; the omegas are the others'), "fusion" (mm is the direction between the image's and the
    # text's).
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(CHOICES)
        self.check_positive("temperature", "intra_temperature")
        if self.normalise is not None:
            self.check_positive("normalise")
        self.check_host()
        text = self.host["text_config"]
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k: got {self.top_k}, expected at most num_experts={self.num_experts}"
            )
        check_field("host.text_config.num_hidden_layers", text.get("num_hidden_layers"), int)
        if self.moe_every > text["num_hidden_layers"]:
            raise ValueError(
                f"moe_every: got {self.moe_every}, expected at most the host's {text['num_hidden_layers']} layers"
            )
        if text.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"host.text_config.hidden_act: got {text['hidden_act']!r}, expected 'silu', as the experts have"
            )
        if {"inter", "intra"} <= set(self.without):
            raise ValueError(
                "without: got 'inter' and 'intra', which leaves no objective, expected one of them"
            )


QWEN2_5_VL_3B = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
MOON2Config.PRESETS = {
    "paper": {"host": QWEN2_5_VL_3B, "image_size": 224},
    "tiny": {"host": qwen.TINY, "image_size": 64, "num_experts": 4},
}


class Experts(TopKMoE):
    """The mixture in the place of a host's FFN, from whose weights its experts start; a state of
    the FFN loads into it, too.

    The layer calls it with hidden states alone. So the padding, and the list that this forward pass
    collects what it reports in, come with the layer's keyword arguments and are handed over at the
    attention, which the layer calls before: within what gradient checkpointing computes again.
    Nothing of a pass stays here."""

    def __init__(self, layer: nn.Module, config: MOON2Config):
        weight = layer.mlp.up_proj.weight
        hidden, dim = weight.shape
        options = {"activation": "swiglu", "bias": False, "balance": config.balance}
        super().__init__(dim, hidden, config.num_experts, config.top_k, **options)
        self.noise, self.padding, self.reports = config.expert_noise, None, None
        self.register_load_state_dict_pre_hook(spread)
        self.to(weight).load_state_dict(layer.mlp.state_dict())
        layer.self_attn.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, attention, args, kwargs):
        self.padding, self.reports = kwargs.pop("token_padding_mask"), kwargs.pop("reports")
        return args, kwargs

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        padding, reports = self.padding, self.reports
        self.padding = self.reports = None
        out, routing = super().forward(x, token_padding_mask=padding)
        reports.append((expert_shares(routing, len(x)), routing.balance_loss))
        return out


def spread(moe: Experts, state: dict, prefix: str, *_) -> None:
    """Of an FFN's state make that of its mixture, in place: copies of it with a little noise, and
    the router as it is.
    """
    if prefix + "up_proj.weight" not in state:
        return
    for name in ("gate", "up", "down"):
        weight = state.pop(f"{prefix}{name}_proj.weight")
        copies = weight.expand(moe.num_experts, *weight.shape)
        state[f"{prefix}w_{name}"] = copies + moe.noise * weight.std() * torch.randn_like(copies)
    state[prefix + "router.weight"] = moe.router.weight.detach()


def _without_margin(module, state_dict: dict, prefix: str, *_) -> None:
    """Earlier states hold the margin, which follows from the training's progress."""
    state_dict.pop(f"{prefix}margin", None)


class MOON2(RetrievalModel):
    """MOON2.0 from a `MOON2Config`; the host starts from random weights (needs `pip install
    mmfused[models]`).
    """

    def __init__(self, config: MOON2Config):
        super().__init__()
        c = self.config = config
        self.host = qwen.build_qwen2_vl(c.host)
        if "moe" not in c.without:
            for layer in self.host.language_model.layers[c.moe_every - 1 :: c.moe_every]:
                layer.mlp = Experts(layer, c)
        qwen.freeze_parts(self.host, c.freeze)
        self.objectives = (INTER if "inter" not in c.without else ()) + (
            INTRA if "intra" not in c.without else ()
        )
        aligned = not {"moe", "dual_alignment"} & set(c.without)
        self.alignment = (
            nn.Parameter(0.02 * torch.randn(c.num_experts, len(self.objectives)))
            if aligned
            else None
        )  # W*
        # D: a tensor, so that its decay compiles nothing again; no buffer, which a cast would round
        # and to_empty lose.
        self.margin = torch.tensor(c.filter_margin, dtype=torch.float64, device="cpu")
        self.register_load_state_dict_pre_hook(_without_margin)

    @property
    def picture_size(self) -> int:
        return self.config.image_size

    def set_progress(self, share: float) -> None:
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
        """What the loss needs of the items, in their three views.

        Args:
            role: "query", "candidate" or "negative", which are encoded alike.
            pixel_values: (B, 3, S, S), or image_tokens: (B, n, D), as the vision tower gives them.
            input_ids: (B, T) int64, with attention_mask (B, T), 1 = real, None = all.
            labels: (B,) int64, the product.
            image_present: (B,) bool, None = all.

        Returns: "image", "text", "both" (B, D), unit rows; "has_image", "has_text" (B,) bool;
        "labels"; with a mixture "shares" (B, 3, Z), the experts' shares of each view, 0 where it
        shows nothing, and "balance", a scalar."""
        pictures = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        return {
            "labels": labels,
            **self._read(VIEWS, *pictures, input_ids, attention_mask, image_present),
        }

    def compare(
        self,
        query: dict,
        candidate: dict,
        negative: dict | None = None,
    ) -> RetrievalOutput:
        """All losses of rows from `encode`; of row i, `candidate` is query i's positive and
        `negative` its hard negative.

        Raises ValueError where `own_negative_only` has no `negative`, or the parts have not one
        number of rows."""
        c = self.config
        rows = len(query["both"])
        for name, part in (("candidate", candidate), ("negative", negative)):
            if part is not None and len(part["both"]) != rows:
                error = ValueError(
                    f"{name} must have a row for each of the {rows} queries, got {len(part['both'])}"
                )
                raise refused("MOON2", error, query["both"])
        if negative is None and c.own_negative_only:
            error = ValueError(
                "negative is None; own_negative_only takes one, the only negative there is"
            )
            raise refused("MOON2", error, query["both"])
        with no_autocast(query["both"].device.type):
            losses = {} if "inter" in c.without else self._inter(query, candidate, negative)
            if "intra" not in c.without:
                parts = (candidate,) if negative is None else (candidate, negative)
                losses |= {
                    name: self._intra(part) for name, part in zip(INTRA, parts, strict=False)
                }
            omega, sparsity = self._omega(list(losses), query, candidate, negative)
            loss = sum(weight * value for weight, value in zip(omega, losses.values(), strict=True))
            if "moe" not in c.without and "balance" not in c.without:
                parts = [
                    part["balance"] for part in (query, candidate, negative) if part is not None
                ]
                losses["balance"] = sum(parts) / len(parts)
                loss = loss + c.balance_weight * losses["balance"]
            if sparsity is not None and "sparsity" not in c.without:
                losses["sparsity"] = sparsity
                loss = loss + c.sparsity_weight * sparsity
        return RetrievalOutput(loss, losses)

    def embed(
        self,
        views: tuple[str, ...] = ("both",),
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_present: Tensor | None = None,
        image_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Unit embeddings (B, D) in float32 of each view; arguments as `encode`'s."""
        check_views(views)
        pictures = qwen.read_pictures(
            self.host, self.config.image_size, pixel_values, image_tokens, image_present
        )
        read = self._read(tuple(views), *pictures, input_ids, attention_mask, image_present)
        return {view: read[view] for view in views}

    def _read(self, views, pictures, grid, ids, attention_mask, image_present) -> dict[str, Tensor]:
        """Embeddings of the views, and what `encode` returns beside them; the host reads all views
        in one batch.
        """
        c = self.config
        fused = "fusion" not in c.without
        shown = views if fused else ("image", "text")
        image, text = qwen.visible(
            c.tokens, ids, attention_mask, image_present, "both"
        )  # (B,), (B, T)
        text = text.any(1)
        sequence = self._sequences(shown, grid, ids, attention_mask, image_present)
        states, reports = self._states(sequence, pictures.repeat(len(shown), 1, 1))
        real = sequence.attention_mask[..., None]
        states = states.masked_fill(real == 0, 0)
        states = states if states.dtype == torch.float64 else states.float()
        pooled = unit_rows(states.sum(1) / real.sum(1))  # (views * B, D)
        out = dict(zip(shown, pooled.chunk(len(shown)), strict=True))
        if not fused:
            own = late_fusion(out["image"], out["text"])
            out["both"] = torch.where(
                (image == text)[:, None],
                own,
                torch.where(image[:, None], out["image"], out["text"]),
            )
        if reports:
            shares, balance = (
                torch.stack(each).mean(0) for each in zip(*reports, strict=True)
            )  # over the layers
            shares = list(shares.chunk(len(shown)))
            out["shares"] = torch.stack(shares if fused else [*shares, sum(shares) / 2], 1)
            out["balance"] = balance
        return {**out, "has_image": image, "has_text": text}

    def _sequences(self, shown, grid, ids, attention_mask, image_present) -> qwen.Sequence:
        """Of all items in the first view, then all in the second, and so on."""
        view = torch.tensor(
            [VIEWS.index(name) for name in shown], device=ids.device
        ).repeat_interleave(len(ids))
        mask, present = (
            None if x is None else torch.cat([x] * len(shown))
            for x in (attention_mask, image_present)
        )
        return qwen.assemble(
            self.config.tokens, grid, ids.repeat(len(shown), 1), mask, present, view, prompt=False
        )

    def _states(self, sequence: qwen.Sequence, pictures: Tensor) -> tuple[Tensor, list]:
        """`qwen.hidden_states`, and of each mixture the shares (B, Z) and the balance loss."""
        reports = []
        shows = (
            sequence.has_image | sequence.has_text
        )  # what shows nothing is one end token, and not the experts' business
        routed = {
            "token_padding_mask": (sequence.attention_mask == 0) | ~shows[:, None],
            "reports": reports,
        }
        states = qwen.hidden_states(
            self.host, sequence, pictures, **({} if "moe" in self.config.without else routed)
        )
        return states, reports

    def _omega(
        self,
        names: list[str],
        query,
        candidate,
        negative,
    ) -> tuple[Tensor | list[float], Tensor | None]:
        """omega of the objectives in ``names``, and L_sparsity; from the samples of all ranks."""
        c = self.config
        if self.alignment is None:
            return [(c.normalise or 1.0) / len(names)] * len(names), None
        served = dict.fromkeys(INTER, query) | dict(zip(INTRA, (candidate, negative), strict=True))
        queries = [
            (served[name], name.removeprefix("inter_") if name in INTER else "image")
            for name in names
        ]
        shares = torch.cat(
            [part["shares"][:, VIEWS.index(view)] for part, view in queries]
        )  # a row for each query, (M B, Z)
        real = torch.cat([has(part, view) for part, view in queries])
        members = torch.eye(len(names), dtype=torch.bool, device=real.device).repeat_interleave(
            len(query["both"]), 0
        )
        rows = gather_rows(torch.cat([shares, (members & real[:, None]).to(shares.dtype)], 1))
        shares, members = rows[:, : c.num_experts], rows[:, c.num_experts :] > 0
        columns = self.alignment[:, [self.objectives.index(name) for name in names]]
        return dual_alignment(
            columns, shares, members=members, detach_routing=c.detach_routing, normalise=c.normalise
        )

    def _inter(self, query: dict, candidate: dict, negative: dict | None) -> dict[str, Tensor]:
        c = self.config
        parts = [candidate] if negative is None else [candidate, negative]
        candidates, ids = (torch.cat([part[name] for part in parts]) for name in ("both", "labels"))
        shows = [part["has_image"] | part["has_text"] for part in parts]
        weight = (
            self._reliability(query["both"], *(part["both"] for part in parts), *shows[1:])
            * shows[0]
        )
        return {
            name: contrast(
                query[view],
                candidates,
                c.temperature,
                weight * has(query, view),
                torch.cat(shows),
                query["labels"],
                ids,
                own=c.own_negative_only,
            )
            for name, view in zip(INTER, VIEWS, strict=True)
        }

    @torch.no_grad()
    def _reliability(
        self,
        query: Tensor,
        positive: Tensor,
        negative: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """(B,): 1 for triplets that are clear enough, phi for others; 1 where there is no negative
        to judge by.
        """
        c = self.config
        ones = torch.ones_like(query[:, 0])
        if negative is None or "filtering" in c.without:
            return ones
        phi = torch.sigmoid(
            c.filter_slope * ((query * (positive - negative)).sum(-1) - self.margin.to(query.dtype))
        )
        return torch.where((phi >= c.filter_threshold) | ~real, ones, phi)

    def _intra(self, part: dict) -> Tensor:
        """Image to text of the same product."""
        image, text, real, labels = part["image"], part["text"], part["has_text"], part["labels"]
        ids = labels
        if self.config.roll:
            text, real, ids = (torch.cat([x, previous(x)]) for x in (text, real, labels))
        weight = has(part, "both").to(image.dtype)
        return contrast(
            image,
            text,
            self.config.intra_temperature,
            weight,
            real,
            labels,
            ids,
            own=self.config.roll,
        )


def has(part: dict, view: str) -> Tensor:
    """(B,) bool: the items that have what the view shows."""
    image, text = part["has_image"], part["has_text"]
    return {"image": image, "text": text, "both": image & text}[view]


def contrast(
    query,
    candidates,
    temperature,
    weight,
    real,
    query_id,
    candidate_id,
    *,
    own: bool,
) -> Tensor:
    """InfoNCE over all ranks, the mean weighed by ``weight`` (B,); query i's positive is candidate
    i.

    Negatives: the candidates that are ``real`` and of another id; with ``own`` every B-th from i
    on, of B queries, and no others."""
    rows = torch.arange(len(query), device=query.device) + (
        (dist.get_rank() << 32) if in_group() else 0
    )
    query_key = rows if own else torch.zeros_like(rows)
    candidate_key = query_key.repeat(len(candidates) // max(len(query), 1)).masked_fill(
        ~real, NOBODY
    )
    keys = {
        "query_key": query_key,
        "candidate_key": candidate_key,
        "query_id": query_id,
        "candidate_id": candidate_id,
    }
    options = {"temperature": temperature, "row_weight": weight, **keys}
    if in_group():
        return loss_over_ranks(query, candidates, True, **options)
    return masked_info_nce(query, candidates, **options)


def previous(x: Tensor) -> Tensor:
    """Each row's previous row in the batch of all ranks, in a circle."""
    if not in_group():
        return x.roll(1, 0)
    ranks = gather_rows(torch.full((len(x),), dist.get_rank(), device=x.device))
    first = (ranks < dist.get_rank()).sum()
    return gather_rows(x)[(first + torch.arange(len(x), device=x.device) - 1) % len(ranks)]
