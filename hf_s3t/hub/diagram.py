"""The picture of a system's stacks, as SVG."""

from collections.abc import Sequence

from ..plan.stages import Plan, StageKey


# Size of a box, gaps between boxes and between the blocks of shards, margin around all; heights of names and legend.
_CELL, _GAP, _APART, _MARGIN, _NAME, _LEGEND = 34, 6, 24, 14, 24, 44
# Blocks stand side by side as far as a card is wide.
_WIDEST = 900
_LEGEND_WIDTH = 380
_STYLE = (
    # Named fonts, because not every program that draws knows one by the name sans-serif.
    "text{font-family:Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:13px;fill:#333}"
    ".name{font-weight:bold}"
    ".live rect{fill:#2f6f9f}.live text{fill:#fff}"
    ".gone rect{fill:#fff;stroke:#8c8c8c;stroke-dasharray:3 3}.gone text{fill:#666}"
)


def render_diagram(plan: Plan, valid: frozenset[StageKey]) -> str:
    """
    An SVG picture of the stacks: a block for each shard, in it a row for each sequence, in it a box for each stage
    with the slice it adds.

    Args:
        plan ([`~hf_s3t.plan.stages.Plan`]): The sequences.
        valid (set of [`~hf_s3t.plan.stages.StageKey`]): The stages that are live; the others are drawn as gone.

    Returns:
        `str`: The picture.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig
    >>> from hf_s3t.hub.diagram import render_diagram
    >>> from hf_s3t.plan import Plan, StageKey

    >>> plan = Plan.from_config(S3TConfig(num_slices=2))
    >>> picture = render_diagram(plan, frozenset([StageKey(0, (0,))]))
    >>> picture.count('class="live"'), picture.count('class="gone"')
    (1, 3)
    ```
    """
    depth = max(len(sequence) for sequences in plan.sequences for sequence in sequences)
    block = depth * (_CELL + _GAP) - _GAP
    columns = min(len(plan.sequences), max(1, (_WIDEST - 2 * _MARGIN + _APART) // (block + _APART)))
    parts: list[str] = []
    top, bottom = _MARGIN, 0
    for shard, sequences in enumerate(plan.sequences):
        if shard % columns == 0:
            top = bottom + _MARGIN
        left = _MARGIN + shard % columns * (block + _APART)
        parts += _block(left, top, shard, sequences, valid)
        bottom = max(bottom, top + _NAME + len(sequences) * (_CELL + _GAP))
    width = max(columns * (block + _APART) - _APART, _LEGEND_WIDTH) + 2 * _MARGIN
    height = bottom + _LEGEND + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="Stacks of the system, live and gone">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *parts,
            *_legend(bottom + _MARGIN, depth),
            "</svg>",
            "",
        ]
    )


def _block(
    left: int, top: int, shard: int, sequences: Sequence[tuple[int, ...]], valid: frozenset[StageKey]
) -> list[str]:
    """A shard's name, and below it a row for each sequence."""
    parts = [f'<text x="{left}" y="{top + 14}" class="name">shard {shard}</text>']
    for row, sequence in enumerate(sequences):
        for number, slice_ in enumerate(sequence):
            x, y = left + number * (_CELL + _GAP), top + _NAME + row * (_CELL + _GAP)
            parts.append(_box(x, y, slice_, StageKey(shard, sequence[: number + 1]) in valid))
    return parts


def _legend(y: int, depth: int) -> list[str]:
    size, baseline = 16, y + 13
    swatches = [
        f'<rect x="{_MARGIN}" y="{y}" width="{size}" height="{size}" rx="3" fill="#2f6f9f"/>',
        f'<rect x="{_MARGIN + 58}" y="{y}" width="{size}" height="{size}" rx="3" fill="#fff" stroke="#8c8c8c" '
        'stroke-dasharray="3 3"/>',
    ]
    texts = [
        (_MARGIN + 22, baseline, "live"),
        (_MARGIN + 80, baseline, "gone or not trained"),
        (_MARGIN, baseline + 24, f"row: a sequence, depth 1 to {depth}; number: the slice added"),
    ]
    return swatches + [f'<text x="{x}" y="{line}">{text}</text>' for x, line, text in texts]


def _box(x: int, y: int, slice_: int, live: bool) -> str:
    middle = x + _CELL / 2
    return (
        f'<g class="{"live" if live else "gone"}"><rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="4"/>'
        f'<text x="{middle:g}" y="{y + _CELL // 2 + 5}" text-anchor="middle">{slice_}</text></g>'
    )
