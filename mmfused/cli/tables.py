"""The tables that ``mmfused train`` and ``mmfused eval`` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the summary of a training run."""
    millions = summary["parameters"] / 1e6
    amp = "on" if summary["amp"] == "bf16" else "off"
    milliseconds = summary["step_seconds"] * 1e3
    skipped = len(summary["skipped"])
    lost = summary.get("unreadable")  # summaries of earlier versions lack it
    unreadable = f", {len(lost)} pictures unreadable" if lost else ""
    scores = _class_rows(summary) if "val_loss" in summary else _retrieval_rows(summary)
    print_rows(
        {
            "model": f"{summary['model']}, {millions:.2f} M parameters, {summary['modalities']}",
            "data": f"{summary['train_rows']} training rows, "
            f"{summary['val_rows']} validation rows, {skipped} skipped{unreadable}",
            "backend": f"{summary['backend']} on {summary['device']}, bf16 autocast {amp}",
            "steps": f"{summary['steps']}, {milliseconds:.1f} ms each, "
            f"{summary['seconds']:.1f} s in total",
            **scores,
            "peak memory": f"{summary['peak_memory'] / 2**20:.0f} MiB",
        }
    )


def _class_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "loss": f"{summary['train_loss']:.4f} training, {summary['val_loss']:.4f} validation",
        **score_rows(summary),
    }


def _retrieval_rows(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return rows with the loss, and the scores, perhaps averaged over the pairs of views."""
    names = {"Recall@1": "recall_at_1", "Recall@5": "recall_at_5", "MRR": "mrr"}
    mean = "mean " if "pairs" in summary else ""
    scores = {f"{mean}{name}": f"{summary[key]:.1%}" for name, key in names.items()}
    return {"loss": f"{summary['train_loss']:.4f} training", **scores}


def score_rows(scores: Mapping[str, Any]) -> dict[str, str]:
    """Return rows with the scores of a classifier."""
    names = {
        "accuracy": "accuracy",
        "macro precision": "macro_precision",
        "macro recall": "macro_recall",
        "macro F1": "macro_f1",
    }
    return {name: f"{scores[key]:.1%}" for name, key in names.items()}


def print_rows(rows: Mapping[str, str]) -> None:
    """Print a table of names and values."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
