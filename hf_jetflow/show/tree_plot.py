"""The draft trees of a generation as a figure, PNG or SVG; matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from ..decoding.tree_log import TreeRound
from ..errors import JetFlowError
from ..extras import require_package
from .token_text import TokenLabels, display_width
from .tree_layout import DrawnNode, lay_out


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100  # one unit of the drawing is one pixel at this resolution
ROW, CHIP, GUTTER, MARGIN, HEADING = 24, 19, 34, 16, 30
LABEL_SIZE, SHARE_SIZE = 12, 9.5  # font heights in pixels
COLUMN = 0.64  # width of a character of the fixed-width font over its height, rounded up to pixels
STYLES = {  # colors of fill, line, label, share
    "root": ("#e5e7eb", "#4b5563", "#111827", "#4b5563"),
    "accepted": ("#dbeafe", "#2563eb", "#1e3a8a", "#2f56b0"),
    "bonus": ("#ffedd5", "#ea580c", "#7c2d12", "#b0571f"),
    "rejected": ("#fafafa", "#d4d7dc", "#5f6773", "#737b88"),
}
LEGEND = {
    "root": "anchor",
    "accepted": "accepted",
    "bonus": "bonus token of the target",
    "rejected": "rejected",
}
PERCENTAGES = "percentages: the head's probability of the path to a token"


def draw_trees(
    rounds: Sequence[TreeRound], tokenizer: PreTrainedTokenizerBase, only: Sequence[int] | None = None
) -> "Figure":
    """
    Draw the draft trees of a generation, one below the other. Percentages are the head's probability of a path.

    Args:
        rounds: `head.last_trees` of a generation with `head.record_trees = True`.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        only (*optional*): Numbers of the rounds to draw, from 1; all by default.

    Returns:
        `matplotlib.figure.Figure`: Shown by a notebook, or saved with `savefig`.

    Raises:
        JetFlowError: If there is no such round, or matplotlib is missing.
    """
    numbers = check_rounds(rounds, only)
    require_package("matplotlib", "pictures")
    from matplotlib.figure import Figure

    labels = TokenLabels(tokenizer)
    drawings = [_Drawing(rounds[number - 1], labels, f"round {number} of {len(rounds)}") for number in numbers]
    width = max([_legend_width(), *(drawing.width for drawing in drawings)]) + 2 * MARGIN
    height = sum(drawing.height for drawing in drawings) + ROW + 2 * MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0))
    _draw_legend(axes)
    top = float(MARGIN + ROW)
    for drawing in drawings:
        drawing.draw(axes, top)
        top += drawing.height
    return figure


def check_rounds(rounds: Sequence[TreeRound] | None, only: Sequence[int] | None = None) -> list[int]:
    """
    The numbers of the rounds to draw, from 1.

    Raises:
        JetFlowError: If nothing was recorded, the rounds are of several sequences, or a number is out of range.
    """
    if not rounds:
        raise JetFlowError(
            "no rounds were recorded; set `head.record_trees = True` before `generate`, and generate at least two "
            "tokens"
        )
    if len({each.row for each in rounds}) > 1:
        raise JetFlowError(
            "the rounds belong to several sequences of a batch; select one: `[each for each in head.last_trees if "
            "each.row == 0]`"
        )
    numbers = list(range(1, len(rounds) + 1)) if only is None else list(only)
    wrong = [number for number in numbers if not 1 <= number <= len(rounds)]
    if wrong:
        raise JetFlowError(f"expected a round from 1 to {len(rounds)}, got {wrong[0]}")
    return numbers


def heading(tree_round: TreeRound) -> str:
    """One line about a round: nodes, accepted tokens, new tokens."""
    drafted = len(tree_round.tokens) - 1
    if not drafted:
        return "plain step, nothing drafted"
    tokens = "1 token" if len(tree_round.new_ids) == 1 else f"{len(tree_round.new_ids)} tokens"
    return f"{drafted + 1} nodes, {tree_round.num_accepted} accepted + bonus: {tokens}"


def percent(probability: float | None) -> str:
    """A short percentage; empty for a token that was not drafted."""
    if probability is None:
        return ""
    share = 100 * probability
    return f"{share:.0f}%" if share >= 9.95 else f"{share:.1f}%" if share >= 0.1 else "<0.1%"


class _Drawing:
    """One round in pixels."""

    def __init__(self, tree_round: TreeRound, labels: TokenLabels, name: str):
        self._title = f"{name}: {heading(tree_round)}"
        self._nodes = lay_out(tree_round)
        self._labels = [_drawable(labels.label(node.token)) for node in self._nodes]
        shares = ["" if node.kind == "root" else percent(node.probability) for node in self._nodes]
        self._shares = shares
        self._widths = [_chip_width(label, share) for label, share in zip(self._labels, shares, strict=True)]
        num_columns = 1 + max(node.depth for node in self._nodes)
        columns = [0.0] * num_columns
        for node, chip in zip(self._nodes, self._widths, strict=True):
            columns[node.depth] = max(columns[node.depth], chip)
        self._lefts = [MARGIN + sum(columns[:depth]) + GUTTER * depth for depth in range(num_columns)]
        self._rights = [left + width for left, width in zip(self._lefts, columns, strict=True)]
        self.width = max(self._rights[-1] - MARGIN, _text_width(self._title, LABEL_SIZE))
        self.height = HEADING + ROW * (1 + max(node.row for node in self._nodes)) + MARGIN

    def draw(self, axes: "Axes", top: float) -> None:
        axes.text(MARGIN, top + HEADING / 2, self._title, **_font(LABEL_SIZE, "#111827", "bold"))
        first = top + HEADING + ROW / 2
        for index, node in enumerate(self._nodes):
            if node.parent >= 0:
                self._draw_edge(axes, node, self._nodes[node.parent], self._widths[node.parent], first)
            label, share = self._labels[index], self._shares[index]
            left, middle = self._lefts[node.depth], first + ROW * node.row
            _draw_chip(axes, left, middle, self._widths[index], node.kind, label, share)

    def _draw_edge(self, axes: "Axes", node: DrawnNode, parent: DrawnNode, width: float, first: float) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        start, end = first + ROW * parent.row, first + ROW * node.row
        left, right = self._lefts[parent.depth] + width, self._lefts[node.depth]
        points, codes = [(left, start), (right, end)], [Path.MOVETO, Path.LINETO]
        if start != end:
            trunk, bend = self._rights[parent.depth] + GUTTER / 2, 7
            points[1:1] = [(trunk - bend, start), (trunk, start), (trunk, start + bend)]
            points[4:4] = [(trunk, end - bend), (trunk, end), (trunk + bend, end)]
            turn = [Path.LINETO, Path.CURVE3, Path.CURVE3]
            codes[1:1] = turn + turn
        is_on_path = node.kind in ("accepted", "bonus")
        line = STYLES[node.kind][1] if is_on_path else "#cfd3d9"
        edge = PathPatch(Path(points, codes), fill=False, edgecolor=line, linewidth=1.9 if is_on_path else 0.8)
        edge.set_zorder(2 if is_on_path else 1)
        axes.add_patch(edge)


def _draw_chip(axes: "Axes", left: float, middle: float, width: float, kind: str, label: str, share: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    fill, line, ink, faint = STYLES[kind]
    style = "round,pad=0,rounding_size=5"
    box = FancyBboxPatch((left, middle - CHIP / 2), width, CHIP, style, facecolor=fill, edgecolor=line, zorder=3)
    box.set_linewidth(0.8 if kind == "rejected" else 1.3)
    axes.add_patch(box)
    axes.text(left + 6, middle, label, **_font(LABEL_SIZE, ink))
    axes.text(left + width - 6, middle, share, ha="right", **_font(SHARE_SIZE, faint))


def _draw_legend(axes: "Axes") -> None:
    left = float(MARGIN)
    for kind, words in LEGEND.items():
        _draw_chip(axes, left, MARGIN + CHIP / 2, _chip_width(words, ""), kind, words, "")
        left += _chip_width(words, "") + 14
    axes.text(left, MARGIN + CHIP / 2, PERCENTAGES, **_font(SHARE_SIZE, "#4b5563"))


def _legend_width() -> float:
    return sum(_chip_width(words, "") + 14 for words in LEGEND.values()) + _text_width(PERCENTAGES, SHARE_SIZE)


def _chip_width(label: str, share: str) -> float:
    return 12 + _text_width(label, LABEL_SIZE) + (7 + _text_width(share, SHARE_SIZE) if share else 0)


def _text_width(text: str, size: float) -> float:
    return display_width(text) * size * COLUMN


def _font(size: float, color: str, weight: str = "normal") -> dict:
    points = size * 72 / DPI
    font = dict(family="DejaVu Sans Mono", fontsize=points, color=color, fontweight=weight, va="center_baseline")
    return dict(**font, parse_math=False, zorder=4)  # a dollar sign is a dollar sign


def _drawable(label: str) -> str:
    """The label with boxes for characters that the font lacks."""
    from matplotlib import font_manager, ft2font

    known = ft2font.FT2Font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()
    return "".join(char if ord(char) in known else "□" * display_width(char) for char in label)
