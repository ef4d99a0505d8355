"""Format the tables of models trained on grocery photos, from benchmarks/results/grocery."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from ..benchmarks import tables

RETRIEVAL = {"uniecs": "UniECS", "unica": "UniCA", "moon2": "MOON2.0", "unite": "UNITE"}
SCORES = ("recall_at_1", "recall_at_5", "mrr")
# Query -> target pairs in the table "without fusion"; the result files contain all nine pairs.
FUSION_PAIRS = ("image->both", "text->image", "text->both", "both->both")
MODALITIES = {"image": "photo", "text": "text", "both": "photo + text"}
PARTS = ("contrastive", "q_transform", "gate", "bottleneck", "moe")


def blocks(folder: Path) -> dict[str, str]:
    """Return the tables and remarks that come from the results in ``folder``, by block."""
    runs = {name: _load(folder, name) for name in RETRIEVAL}
    fluid = _load(folder, "fluid")
    return {
        "retrieval": "\n\n".join(
            (retrieval(runs, "whole"), retrieval(runs, "without fusion", FUSION_PAIRS))
        ),
        "retrieval-runs": run_minutes(
            run for model in runs.values() for run in model["runs"].values()
        ),
        "classification": classification(fluid["runs"]),
        "ablation": ablation(fluid["runs"]),
        "fluid-runs": f"{origin(fluid)}. {run_minutes(fluid['runs'].values())}",
    }


def headlines(folder: Path) -> dict[str, str]:
    """Return one result of each model."""
    fluid = _mean(_load(folder, "fluid")["runs"], "full", "accuracy")
    found = {"fluid": f"accuracy {fluid}, photo and noisy text"}
    for name in RETRIEVAL:
        scores = _load(folder, name)["runs"]["whole"]["pairs"]["image->both"]
        recall, chance = (100 * each["recall_at_1"] for each in (scores, scores["chance"]))
        found[name] = f"photo → product: Recall@1 {recall:.0f} % (chance {chance:.0f} %)"
    return found


def _load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}_tiny.json").read_text(encoding="utf-8"))


def origin(results: dict) -> str:
    return f"Measured at commit {results['commit']}"


def run_minutes(runs) -> str:
    minutes = [run["seconds"] / 60 for run in runs]
    return (
        f"Each run took {min(minutes):.0f} to {max(minutes):.0f} minutes "
        "on one core of a machine with other work."
    )


def retrieval(models: dict[str, dict], run: str, pairs: tuple[str, ...] = ()) -> str:
    """Return the table of the same run of all models, with a line per pair (default: all)."""
    model_pairs = [model["runs"][run]["pairs"] for model in models.values()]
    lines = []
    for pair in pairs or model_pairs[0]:
        chances = [_scores(found[pair]["chance"]) for found in model_pairs]
        if len(set(chances)) > 1:
            raise ValueError(
                f"chance of {pair}: got {', '.join(chances)}, expected the same for all models"
            )
        cells = (_scores(found[pair]) for found in model_pairs)
        lines.append([pair.replace("->", " → "), chances[0], *cells])
    title = "Recall@1 / Recall@5 / MRR, %" if run == "whole" else run
    return tables.markdown([title, "chance", *(RETRIEVAL[name] for name in models)], lines)


def _scores(scores: dict) -> str:
    return " / ".join(f"{100 * scores[name]:.0f}" for name in SCORES)


# ---- FLUID ---------------------------------------------------------------------------------------


def classification(runs: dict[str, dict]) -> str:
    """Return a table of the complete model's accuracy, with a line per training modality."""
    names = {
        run["modalities"]: _name(key) for key, run in runs.items() if not key.startswith("no_")
    }
    lines = [
        [label, *_by_seed(runs, names[view]), _mean(runs, names[view], "accuracy")]
        for view, label in MODALITIES.items()
    ]
    return tables.markdown(["accuracy, final step", *_seed_names(runs), "mean"], lines)


def ablation(runs: dict[str, dict]) -> str:
    """Return the table of the complete model and of the models without one of ``PARTS``."""
    lines = []
    rows = {"full": "FLUID tiny"} | {f"no_{part}": f"without {part}" for part in PARTS}
    for name, label in rows.items():
        lines.append(
            [
                label,
                *_by_seed(runs, name),
                _mean(runs, name, "accuracy"),
                _mean(runs, name, "macro_f1"),
            ]
        )
    return tables.markdown(
        ["photo + text, accuracy", *_seed_names(runs), "mean", "macro F1, mean"], lines
    )


def _name(key: str) -> str:
    """Return the name of a run without its seed: "full" for the key "full_0"."""
    return key.rpartition("_")[0]


def _seeds(runs: dict[str, dict]) -> list[int]:
    return sorted({int(key.rpartition("_")[2]) for key in runs})


def _seed_names(runs: dict[str, dict]) -> list[str]:
    return [f"seed {seed}" for seed in _seeds(runs)]


def _by_seed(runs: dict[str, dict], name: str) -> list[str]:
    return [f"{100 * run['accuracy']:.1f} %" for run in _all_seeds(runs, name)]


def _mean(runs: dict[str, dict], name: str, score: str) -> str:
    return f"{100 * fmean(run[score] for run in _all_seeds(runs, name)):.1f} %"


def _all_seeds(runs: dict[str, dict], name: str) -> list[dict]:
    missing = [key for seed in _seeds(runs) if (key := f"{name}_{seed}") not in runs]
    if missing:
        raise ValueError(
            f"fluid_tiny.json: got runs without {', '.join(missing)}, expected every run with "
            "every seed"
        )
    return [runs[f"{name}_{seed}"] for seed in _seeds(runs)]
