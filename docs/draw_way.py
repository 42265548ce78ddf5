"""Draws the way from adapters and examples to a server: python docs/draw_way.py > docs/way.svg

Every box has its own background, and lines are of a middle grey, so that it reads on a light page and on a dark one.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 880, 240
GREY = "#8b949e"
INPUTS, MIDDLE, SERVERS = "#1f6feb", "#8250df", "#1a7f37"
FONT = "font-family='system-ui, sans-serif' text-anchor='middle'"


def box(x: int, y: int, width: int, height: int, colour: str, lines: Sequence[str]) -> str:
    """A rounded box; its first line is bold, all lines are white and centred."""
    top = y + height / 2 - 9 * (len(lines) - 1)
    rows = [
        f"<text x='{x + width / 2:g}' y='{top + 18 * i + 5:g}' fill='#ffffff' font-size='{15 if i == 0 else 13}' "
        f"font-weight='{600 if i == 0 else 400}' {FONT}>{escape(line)}</text>"
        for i, line in enumerate(lines)
    ]
    shape = f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{colour}'/>"
    return "\n".join([shape, *rows])


def arrow(x: int, y: int, to_x: int, to_y: int, word: str = "") -> str:
    """An arrow, with the name of a command above it."""
    line = f"<path d='M{x} {y} L{to_x} {to_y}' stroke='{GREY}' stroke-width='2' marker-end='url(#head)'/>"
    if not word:
        return line
    place = f"x='{(x + to_x) / 2:g}' y='{(y + to_y) / 2 - 10:g}'"
    return f"{line}\n<text {place} fill='{GREY}' font-size='14' font-weight='600' {FONT}>{escape(word)}</text>"


def way() -> str:
    """The drawing, as SVG."""
    names = ("adapter A", "adapter B", "adapter C")
    adapters = [box(10, 10 + 46 * i, 150, 38, INPUTS, [name]) for i, name in enumerate(names)]
    examples = box(10, 168, 150, 56, INPUTS, ["a few examples", "of a new task"])
    formats = [("dense weights", "safetensors"), ("one LoRA", "PEFT"), ("a graph", "ONNX")]
    parts = [
        *adapters,
        examples,
        *(arrow(162, 29 + 46 * i, 252, 98 + 12 * i) for i in range(3)),
        arrow(162, 196, 252, 140),
        f"<text x='216' y='52' fill='{GREY}' font-size='14' font-weight='600' {FONT}>fit</text>",
        box(262, 78, 150, 84, MIDDLE, ["mixture", "a weight for each", "adapter and module"]),
        arrow(414, 120, 504, 120, "export"),
        *(box(514, 20 + 70 * i, 140, 60, MIDDLE, lines) for i, lines in enumerate(formats)),
        *(arrow(656, 50 + 70 * i, 716, 100 + 20 * i) for i in range(3)),
        box(726, 68, 144, 104, SERVERS, ["a server", "vLLM, llama.cpp,", "transformers,", "ONNX Runtime, ..."]),
    ]
    head = (
        f"<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L10 5 L0 10 z' fill='{GREY}'/></marker></defs>"
    )
    title = "<title>Adapters and a few examples become a mixture, the mixture one model, and a server loads it</title>"
    start = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img'>"
    return "\n".join([start, title, head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    print(way(), end="")
