"""README's tables of the models trained on grocery photos, from benchmarks/results/grocery."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from ..benchmarks import tables

RETRIEVAL = {"uniecs": "UniECS", "unica": "UniCA", "moon2": "MOON2.0", "unite": "UNITE"}
SCORES = ("recall_at_1", "recall_at_5", "mrr")
# The pairs that fusion changes. A photo alone, or titles alone, need only one encoder, with fusion
# or without.
FUSED_PAIRS = ("image->both", "text->image", "text->both", "both->both")
VIEWS = {"image": "photo", "text": "text", "both": "photo + text"}
PARTS = ("contrastive", "q_transform", "gate", "bottleneck", "moe")


def blocks(folder: Path) -> dict[str, str]:
    runs = {name: _load(folder, name) for name in RETRIEVAL}
    fluid = _load(folder, "fluid")
    found = {
        "retrieval": "\n\n".join(
            (retrieval(runs, "whole"), retrieval(runs, "without fusion", FUSED_PAIRS))
        ),
        "retrieval-runs": seconds_said(
            run for model in runs.values() for run in model["runs"].values()
        ),
        "classification": classification(fluid["runs"]),
        "ablation": ablation(fluid["runs"]),
        "fluid-runs": f"{origin(fluid)}; {seconds_said(fluid['runs'].values())}.",
        "fluid": f"accuracy {_mean(fluid['runs'], 'full', 'accuracy')}, photo and noisy text",
    }
    for name, model in runs.items():
        scores = model["runs"]["whole"]["pairs"]["image->both"]
        recall, chance = (100 * part["recall_at_1"] for part in (scores, scores["chance"]))
        found[name] = f"photo → product: Recall@1 {recall:.0f} % (chance {chance:.0f} %)"
    return found


def _load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}_tiny.json").read_text(encoding="utf-8"))


def origin(measured: dict) -> str:
    return f"Measured at commit {measured['commit']}"


def seconds_said(runs) -> str:
    minutes = [run["seconds"] / 60 for run in runs]
    return (
        f"each run takes {min(minutes):.0f} to {max(minutes):.0f} minutes "
        "on one core of a machine with other work"
    )


def retrieval(models: dict[str, dict], run: str, pairs: tuple[str, ...] = ()) -> str:
    of_model = [model["runs"][run]["pairs"] for model in models.values()]
    lines = []
    for pair in pairs or of_model[0]:
        chances = [_scores(found[pair]["chance"]) for found in of_model]
        if len(set(chances)) > 1:
            raise ValueError(
                f"chance of {pair}: got {', '.join(chances)}, expected the same for all models"
            )
        lines.append(
            [pair.replace("->", " → "), chances[0], *(_scores(found[pair]) for found in of_model)]
        )
    title = "Recall@1 / Recall@5 / MRR, %" if run == "whole" else run
    return tables.markdown([title, "chance", *(RETRIEVAL[name] for name in models)], lines)


def _scores(scores: dict) -> str:
    return " / ".join(f"{100 * scores[name]:.0f}" for name in SCORES)


# ---- FLUID ---------------------------------------------------------------------------------------


def classification(runs: dict[str, dict]) -> str:
    """Return the accuracy by the modalities of training, for runs with all parts of the model.

    Such a run is named after its modality, or "full".
    """
    whole = {
        run["modalities"]: _name(key) for key, run in runs.items() if not key.startswith("no_")
    }
    lines = [
        [said, *_by_seed(runs, whole[view]), _mean(runs, whole[view], "accuracy")]
        for view, said in VIEWS.items()
    ]
    return tables.markdown(["accuracy, final step", *_seed_names(runs), "mean"], lines)


def ablation(runs: dict[str, dict]) -> str:
    lines = []
    rows = {"full": "FLUID tiny"} | {f"no_{part}": f"without {part}" for part in PARTS}
    for name, said in rows.items():
        lines.append(
            [
                said,
                *_by_seed(runs, name),
                _mean(runs, name, "accuracy"),
                _mean(runs, name, "macro_f1"),
            ]
        )
    return tables.markdown(
        ["photo + text, accuracy", *_seed_names(runs), "mean", "macro F1, mean"], lines
    )


def _name(key: str) -> str:
    return key.rpartition("_")[0]


def _seeds(runs: dict[str, dict]) -> list[int]:
    return sorted({int(key.rpartition("_")[2]) for key in runs})


def _seed_names(runs: dict[str, dict]) -> list[str]:
    return [f"seed {seed}" for seed in _seeds(runs)]


def _by_seed(runs: dict[str, dict], name: str) -> list[str]:
    return [f"{100 * run['accuracy']:.1f} %" for run in _of_all_seeds(runs, name)]


def _mean(runs: dict[str, dict], name: str, score: str) -> str:
    return f"{100 * fmean(run[score] for run in _of_all_seeds(runs, name)):.1f} %"


def _of_all_seeds(runs: dict[str, dict], name: str) -> list[dict]:
    missing = [key for seed in _seeds(runs) if (key := f"{name}_{seed}") not in runs]
    if missing:
        raise ValueError(
            f"fluid_tiny.json: got no run {', '.join(missing)}, expected the same seeds for all"
        )
    return [runs[f"{name}_{seed}"] for seed in _seeds(runs)]
