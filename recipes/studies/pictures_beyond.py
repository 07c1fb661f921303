"""The pictures of what goes beyond the paper: depth against work, and the quality that a long stream leaves."""

from collections.abc import Callable, Mapping
from typing import Any

from hf_s3t.analysis.pictures import FIRST, MORE, OURS, finish, new_figure, plain_numbers, shared_legend


_RULES = {"cyclic": ("cyclic", MORE[2]), "bms": ("BMS", MORE[1]), "optimal": ("optimal", MORE[0])}


def _families(data):
    figure, panels = new_figure(len(data["panels"]), (14, 8.4), columns=3)
    for axes, panel in zip(panels, data["panels"], strict=True):
        for rule, (label, color) in _RULES.items():
            for key, style, marker, ending in (
                ("published", "-", "o", "as published"),
                ("without_idle", ":", ".", "without idle stages"),
            ):
                points = panel["rules"][rule][key]
                # What is optimal is often cyclic: one lies on the other.
                width = 3.5 if rule == "cyclic" else 1.5
                look = {"marker": marker, "markersize": 2.2 * width**0.5 + 2, "linewidth": width, "color": color}
                axes.plot(*_curve(points), style, **look, label=f"{label}, {ending}")
        axes.plot(*_curve(panel["families"]), "s-", color=OURS, markersize=4, label="the best family found")
        lattice = panel["lattice"]
        axes.plot(
            lattice["work"], lattice["depth"], "*", color=FIRST, markersize=14, label="lattice = all L! sequences"
        )
        size = panel["num_slices"]
        axes.set(
            title=f"L = {size}, {panel['name']} prior; B = 1 to {size}",
            xlabel="work of a shard (full fine-tunings, log scale)",
            ylabel=f"expected depth (mean over {panel['horizon']} requests)",
            xscale="log",
            ylim=(0, None),
        )
        plain_numbers(axes.xaxis)
    finish(*panels, legends=False)
    shared_legend(figure, panels, 4)
    return figure


def _curve(points):
    return [point["work"] for point in points], [point["depth"] for point in points]


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "families": _families,
}
