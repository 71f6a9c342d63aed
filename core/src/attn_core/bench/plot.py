"""The plot of a result file: for each shape, every implementation's speed beside the best."""

from __future__ import annotations

from pathlib import Path

from attn_core.bench.results import Results
from attn_core.errors import UsageError


def plot(results: Results, path: Path) -> Path:
    """Draw grouped bars, the best time over each one's, a group a shape. Raises UsageError without matplotlib."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError("plots need matplotlib", hint="pip install 'attn-core[bench]'") from error
    shapes = list(dict.fromkeys(row.shape for row in results.rows))
    impls = list(dict.fromkeys(row.impl for row in results.rows))
    ms = {(row.shape, row.impl): row.ms for row in results.rows}
    best = {shape: min(ms[s, i] for s, i in ms if s == shape) for shape in shapes}
    figure, axes = plt.subplots(figsize=(max(8.0, 1.5 * len(shapes)), 4.5))
    width = 0.8 / len(impls)
    for n, impl in enumerate(impls):
        places = [x + n * width for x, shape in enumerate(shapes) if (shape, impl) in ms]
        heights = [best[shape] / ms[shape, impl] for shape in shapes if (shape, impl) in ms]
        axes.bar(places, heights, width, label=impl, edgecolor="black" if impl.startswith("attn:") else "none")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(shapes))], shapes, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel("speed, best of the run = 1")
    axes.set_title(f"{results.device}, {results.date}", fontsize=10)
    axes.axhline(1.0, color="grey", linewidth=0.5)
    axes.legend(fontsize=8, ncols=4, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
