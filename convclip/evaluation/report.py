"""The table that people read after an evaluation. Legend: N images, T texts, k as in R@k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convclip.evaluation.retrieval import KS

WAYS = ("i2t", "t2i")
ROWWISE = """\
rowwise counts an image once per caption, and only that caption is right. With five captions each, rowwise
I2T R@1 is a fifth of standard's, and rowwise T2I R@5 and R@10 are standard's T2I R@1 and R@2. Never compare
a figure of one protocol with one of the other."""


def format_table(figures: dict[str, Any], explain: bool = True) -> str:
    """Both protocols, each beside its chance level, as lines of text; `figures` is what `embedding.evaluate` gives.

    `explain`: with what rowwise means, which a run says once.
    """
    images, texts = figures["images"], figures["texts"]
    lines = [f"{images} images, {texts} captions, validation loss {figures['val_loss']:.4f}"]
    lines.append(header_line("protocol", WAYS, width=18))
    for protocol in ("standard", "rowwise"):
        lines.append(figures_line(protocol, figures[protocol], WAYS, width=18))
        lines.append(figures_line(f"{protocol} by chance", chance(protocol, images, texts), WAYS, width=18))
    if explain:
        lines.append(ROWWISE)
    return "\n".join(lines)


def chance(protocol: str, images: int, texts: int) -> dict[str, float]:
    """The figures that random scores have on average, with the mean number of captions for every image."""
    captions = texts / images
    if protocol == "rowwise":
        shares = {f"{way}_r{k}": min(1.0, k / texts) for way in WAYS for k in KS}
        ranks = dict.fromkeys(WAYS, (texts + 1) / 2)
    else:
        shares = {f"t2i_r{k}": min(1.0, k / images) for k in KS}
        shares |= {f"i2t_r{k}": _any_of(captions, texts, k) for k in KS}
        # The best of m places drawn from T lies, on average, at the first of m + 1 equal parts.
        ranks = {"t2i": (images + 1) / 2, "i2t": (texts + 1) / (captions + 1)}
    return {key: 100 * share for key, share in shares.items()} | {f"{way}_mean_rank": ranks[way] for way in WAYS}


def header_line(first: str, ways: Sequence[str], width: int) -> str:
    """The heads of the columns: `first` over `width` characters, then recalls and ranks of both `ways`."""
    recalls = "".join(f"{f'{way.upper()} R@{k}':>11}" for way in ways for k in KS)
    return f"{first:<{width}}{recalls}" + "".join(f"{f'{way.upper()} med/mean':>16}" for way in ways)


def figures_line(name: str, figures: dict[str, float], ways: Sequence[str], width: int) -> str:
    """One row below `header_line`; a median that is not among the figures is a dash."""
    recalls = "".join(f"{figures[f'{way}_r{k}']:>11.2f}" for way in ways for k in KS)
    ranks = ""
    for way in ways:
        median = figures.get(f"{way}_median_rank")
        ranks += f"{'-' if median is None else f'{median:g}'} / {figures[f'{way}_mean_rank']:.1f}".rjust(16)
    return f"{name:<{width}}{recalls}{ranks}"


def _any_of(right: float, texts: int, k: int) -> float:
    """Probability that the first k of T texts in random order hold any of `right` ones."""
    none = 1.0
    for drawn in range(min(k, texts)):
        none *= max(0.0, texts - right - drawn) / (texts - drawn)
    return 1 - none
