"""The picture of a system's stacks, as SVG."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..plan.stages import Plan, StageKey


# Size of a box, gaps between boxes and between the blocks of shards, margin around all; heights of names and legend.
_CELL, _GAP, _APART, _MARGIN, _NAME, _LEGEND = 34, 6, 24, 14, 24, 44
# The same of a box with a set of slices, and how wide a letter is.
_LOW, _NEAR, _LETTER = 24, 4, 8
# Blocks stand side by side as far as a card is wide.
_WIDEST = 900
_LEGEND_WIDTH, _LINE = 430, 24
# Slices that are written as one digit.
_DIGITS = 10
_STYLE = (
    # Named fonts, because not every program that draws knows one by the name sans-serif.
    "text{font-family:Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:13px;fill:#333}"
    ".name{font-weight:bold}"
    ".live rect{fill:#2f6f9f}.live text{fill:#fff}"
    ".gone rect{fill:#fff;stroke:#8c8c8c;stroke-dasharray:3 3}.gone text{fill:#666}"
)


class _Box(NamedTuple):
    """A stage, at its place in the block of its shard."""

    x: int
    y: int
    width: int
    height: int
    text: str
    live: bool


def render_diagram(plan: Plan, valid: frozenset[StageKey]) -> str:
    """
    An SVG picture of the stacks: a block for each shard, in it a row for each sequence, in it a box for each stage
    with the slice it adds.

    Of a plan of sets with more such rows than slices, a row for each depth instead, in it a box for each set. A set
    counts as live whichever of its orders is there. What is live beside what is planned is drawn, too.

    Args:
        plan ([`~hf_s3t.plan.stages.Plan`]): What is planned.
        valid (set of [`~hf_s3t.plan.stages.StageKey`]): The stages that are live; the others are drawn as gone.

    Returns:
        `str`: The picture.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig
    >>> from hf_s3t.hub.diagram import render_diagram
    >>> from hf_s3t.plan import Plan, StageKey

    >>> plan = Plan.from_config(S3TConfig(num_slices=3))
    >>> picture = render_diagram(plan, frozenset([StageKey(0, (0,))]))
    >>> picture.count('class="live"'), picture.count('class="gone"')
    (1, 6)
    ```
    """
    by_depth = has_rows_of_sets(plan)
    drawn = _Drawn(plan, valid)
    blocks = [(drawn.sets if by_depth else drawn.sequences)(shard) for shard in range(plan.num_shards)]
    widest = max(box.x + box.width for block in blocks for box in block)
    columns = min(len(blocks), max(1, (_WIDEST - 2 * _MARGIN + _APART) // (widest + _APART)))
    parts: list[str] = []
    top, bottom = _MARGIN, 0
    for shard, block in enumerate(blocks):
        if shard % columns == 0:
            top = bottom + _MARGIN
        left = _MARGIN + shard % columns * (widest + _APART)
        parts.append(f'<text x="{left}" y="{top + 14}" class="name">shard {shard}</text>')
        parts += [_svg_of(box, left, top + _NAME) for box in block]
        bottom = max(bottom, top + _NAME + max(box.y + box.height for box in block) + _GAP)
    width = max(columns * (widest + _APART) - _APART, _LEGEND_WIDTH) + 2 * _MARGIN
    depth = max(len(prefix) for family in plan.families for prefix in family)
    if by_depth:
        said = [f"row: a depth, 1 to {depth}; box: the slices that a stage saw"]
    else:
        said = [f"row: a sequence, depth 1 to {depth}; number: the slice added"]
    if plan.by_sets:
        said.append("live: a stage is there that saw these slices, in any order")
    height = bottom + _LEGEND + (len(said) - 1) * _LINE + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="Stacks of the system, live and gone">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *parts,
            *_legend(bottom + _MARGIN, said),
            "</svg>",
            "",
        ]
    )


def has_rows_of_sets(plan: Plan) -> bool:
    """Whether a plan is shown by its sets, because it has more sequences than slices."""
    num_slices = len({slice_ for family in plan.families for prefix in family for slice_ in prefix})
    return plan.by_sets and any(len(sequences) > num_slices for sequences in plan.sequences)


class _Drawn:
    """The boxes of each shard."""

    def __init__(self, plan: Plan, valid: frozenset[StageKey]):
        self._plan = plan
        self._name: Callable[[StageKey], object] = (lambda key: key.slices) if plan.by_sets else (lambda key: key)
        self._live = {self._name(key) for key in valid}
        planned = {self._name(key) for key in plan.stages()}
        self._unplanned = [key for key in sorted(valid) if self._name(key) not in planned]

    def sequences(self, shard: int) -> list[_Box]:
        """A row for each sequence."""
        parents = {key.parent for key in self._unplanned}
        others = [key.prefix for key in self._unplanned if key.shard == shard and key not in parents]
        return [
            _Box(
                number * (_CELL + _GAP),
                row * (_CELL + _GAP),
                _CELL,
                _CELL,
                str(key.prefix[-1]),
                self._name(key) in self._live,
            )
            for row, sequence in enumerate([*self._plan.sequences[shard], *others])
            for number, key in enumerate(StageKey(shard, sequence).lineage)
        ]

    def sets(self, shard: int) -> list[_Box]:
        """A row for each depth, which is as many lines as it takes."""
        keys = [*(StageKey(shard, prefix) for prefix in self._plan.families[shard]), *self._unplanned]
        sets = {tuple(sorted(key.prefix)) for key in keys if key.shard == shard}
        boxes: list[_Box] = []
        x = y = depth = 0
        for slices in sorted(sets, key=lambda slices: (len(slices), slices)):
            text = ("" if max(slices) < _DIGITS else " ").join(map(str, slices))
            width = len(text) * _LETTER + 10
            if boxes and (len(slices) > depth or x + width > _WIDEST - 2 * _MARGIN):
                # The next depth a little further down than the next line of one.
                x, y = 0, y + _LOW + (2 if len(slices) > depth else 1) * _NEAR
            depth = len(slices)
            boxes.append(_Box(x, y, width, _LOW, text, (shard, frozenset(slices)) in self._live))
            x += width + _NEAR
        return boxes


def _legend(y: int, said: Sequence[str]) -> list[str]:
    size, baseline = 16, y + 13
    swatches = [
        f'<rect x="{_MARGIN}" y="{y}" width="{size}" height="{size}" rx="3" fill="#2f6f9f"/>',
        f'<rect x="{_MARGIN + 58}" y="{y}" width="{size}" height="{size}" rx="3" fill="#fff" stroke="#8c8c8c" '
        'stroke-dasharray="3 3"/>',
    ]
    texts = [
        (_MARGIN + 22, baseline, "live"),
        (_MARGIN + 80, baseline, "gone or not trained"),
        *((_MARGIN, baseline + number * _LINE, line) for number, line in enumerate(said, start=1)),
    ]
    return swatches + [f'<text x="{x}" y="{line}">{text}</text>' for x, line, text in texts]


def _svg_of(box: _Box, left: int, top: int) -> str:
    x, y = left + box.x, top + box.y
    middle = x + box.width / 2
    return (
        f'<g class="{"live" if box.live else "gone"}"><rect x="{x}" y="{y}" width="{box.width}" '
        f'height="{box.height}" rx="4"/><text x="{middle:g}" y="{y + box.height // 2 + 5}" '
        f'text-anchor="middle">{box.text}</text></g>'
    )
