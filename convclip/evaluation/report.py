"""The table that people read after an evaluation."""

from __future__ import annotations

from typing import Any

KS = (1, 5, 10)


def format_table(figures: dict[str, Any]) -> str:
    """Both protocols beside chance, as lines of text; `figures` is what `embedding.evaluate` gives."""
    images, texts = figures["images"], figures["texts"]
    header = "".join(f"{f'{direction} R@{k}':>11}" for direction in ("I2T", "T2I") for k in KS)
    lines = [f"{images} images, {texts} captions, validation loss {figures['val_loss']:.4f}"]
    lines.append(f"{'protocol':<9}{header}{'I2T med/mean':>15}{'T2I med/mean':>15}")
    for protocol in ("standard", "rowwise"):
        row = figures[protocol]
        recalls = "".join(f"{row[f'{direction}_r{k}']:>11.2f}" for direction in ("i2t", "t2i") for k in KS)
        ranks = "".join(
            f"{row[f'{direction}_median_rank']:>8.1f}/{row[f'{direction}_mean_rank']:<6.1f}"
            for direction in ("i2t", "t2i")
        )
        lines.append(f"{protocol:<9}{recalls}{ranks}")
    chance = "".join(f"{100 * min(1.0, k * share):>11.2f}" for share in (1 / images, 1 / images) for k in KS)
    lines.append(f"{'chance':<9}{chance}   (standard, about)")
    lines.append(
        "rowwise counts an image once per caption: with five each, its I2T R@1 is a fifth of standard's and its"
    )
    lines.append("T2I R@5 is standard's T2I R@1. Never compare a figure of one protocol with one of the other.")
    return "\n".join(lines)
