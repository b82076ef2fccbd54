"""The simulated timeline as a PNG: one row per pool, one bar per node, steps told apart by shade."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.planner.plan import Plan

STEPS = 2
VISIBLE = 0.001
"""Share of the width below which host work is not worth a row."""
LETTER = 0.0052
"""Width of a letter in a bar, share of the picture's."""


def draw_timeline(plan: Plan, path: str | Path) -> None:
    """Write the PNG. Needs matplotlib; nothing is shown on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    graph, slots, pools = plan.timeline(STEPS + plan.question.problem.staleness)
    end = max(slot.end_s for slot in slots)
    hosted = any(slot.end_s - slot.start_s > VISIBLE * end and not pools[slot.node] for slot in slots)
    names = [*plan.names, "host"] if hosted else [*plan.names]
    figure, axes = pyplot.subplots(figsize=(14, 1.2 + 0.7 * len(names)))
    colours = pyplot.get_cmap("tab20")
    roles = list(dict.fromkeys(name.partition(".")[0] for name in graph.names))
    for slot in slots:
        seconds = slot.end_s - slot.start_s
        if seconds <= 0 or (not hosted and not pools[slot.node]):
            continue
        name = graph.names[slot.node]
        colour = colours(roles.index(name.partition(".")[0]) % 20)
        for pool in pools[slot.node] or (len(names) - 1,):
            row = len(names) - 1 - pool
            axes.barh(row, seconds, left=slot.start_s, height=0.8, color=colour, edgecolor="white",
                      alpha=1.0 if slot.step % 2 == 0 else 0.6)  # fmt: skip
            what = (name.partition(".")[2] or name).replace("_", "\n")
            if seconds > LETTER * max(map(len, what.split("\n"))) * end:  # Else the bar has no room for words.
                text = f"{what}\n{seconds:.3g} s"
                axes.text(slot.start_s + seconds / 2, row, text, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names[::-1])
    axes.set_xlabel("seconds")
    axes.set_xlim(0, end)
    axes.set_title(
        f"{plan.question.name} on {plan.question.cluster.text}: {plan.best.step_s:.3g} s a step, "
        f"{plan.tokens_per_s:,.0f} tokens/s (simulated)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
