"""The figures of the lesson's page: small drawings (SVG) of what its prose describes.

    python extras/figures.py --model story_llm.pt figures.html

`figures` returns all of them, and lesson.py puts them on the page and into the notebook. The command
above writes them to a page of their own, which is good for a talk.

Wherever a figure shows numbers, they are computed or were measured. They come from the functions of
story_llm.py and the beginning of Short_Story.txt, from your model if there is one, or from
experiments.json, which experiments.py writes. A figure that cannot be drawn without a model is left
out when there is none.

A drawing is 360 units wide, and no text in it is smaller than 12, so that it can be read on a phone.
It takes its colors from the page that shows it, as the CSS variables --ink, --muted, --line,
--accent, --accent-2 and --paper, and has colors of its own where these are not defined.
"""
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm

RECORD = Path(__file__).with_name("experiments.json")

@dataclass(frozen=True)
class Figure:
    """A drawing, and where it belongs."""
    name: str
    step: int           # of the lesson
    after: str          # the definition in story_llm.py that it follows; "": it opens the step
    svg: str
    caption: str        # plain text

def figures(model_run=None):
    """Return all figures as a list, in the order of the lesson. `model_run` is a Run, such as
    `load_checkpoint` returns."""
    return [windows_figure(), learning_rate_figure()]

# ─── Drawing ───────────────────────────────────────────────────────────────────────────────────
INK, MUTED, LINE = "var(--ink, #222)", "var(--muted, #666)", "var(--line, #ccc)"
ACCENT, ACCENT_2 = "var(--accent, #2a6f97)", "var(--accent-2, #b5562a)"
PAPER = "var(--paper, #fff)"
WIDTH = 360
SIZE = 12       # of letters

class Drawing:
    """An SVG image that is `WIDTH` units wide. The title and the description are for screen readers."""
    def __init__(self, name, height, title, description):
        self.name, self.height, self.title, self.description = name, height, title, description
        self.elements = []
        self.rect(0, 0, WIDTH, height, fill=PAPER)

    def add(self, tag, content=None, **attributes):
        """Add an element. In the name of an attribute, _ stands for -, and numbers are rounded."""
        shown = "".join(f' {name.replace("_", "-")}="{number(value)}"'
                        for name, value in attributes.items() if value is not None)
        end = "/>" if content is None else f">{html.escape(content)}</{tag}>"
        self.elements.append(f"<{tag}{shown}{end}")

    def text(self, x, y, content, fill=INK, anchor="start", size=SIZE, weight=None):
        """Write a text. Its baseline is at y."""
        self.add("text", content, x=x, y=y, fill=fill, font_size=size, font_weight=weight,
                 text_anchor=None if anchor == "start" else anchor)

    def line(self, x1, y1, x2, y2, stroke=LINE, width=1, dashes=None):
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width,
                 stroke_dasharray=dashes)

    def rect(self, x, y, width, height, fill="none", stroke=None, opacity=None, radius=None):
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke,
                 fill_opacity=opacity, rx=radius)

    def polyline(self, points, stroke=ACCENT, width=2, dashes=None):
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.add("polyline", points=path, fill="none", stroke=stroke, stroke_width=width,
                 stroke_linejoin="round", stroke_dasharray=dashes)

    def circle(self, x, y, radius=3, fill=ACCENT, stroke=None):
        self.add("circle", cx=x, cy=y, r=radius, fill=fill, stroke=stroke)

    def arrow(self, x1, y1, x2, y2, stroke=MUTED, head=5):
        """A line with a head at its second end."""
        length = math.hypot(x2 - x1, y2 - y1)
        dx, dy = (x2 - x1) / length * head, (y2 - y1) / length * head
        self.line(x1, y1, x2, y2, stroke, width=1.2)
        corners = [(x2 - dx - dy / 2, y2 - dy + dx / 2), (x2, y2),
                   (x2 - dx + dy / 2, y2 - dy - dx / 2)]
        self.polyline(corners, stroke, width=1.2)

    def svg(self):
        title, description = f"{self.name}-title", f"{self.name}-description"
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH * 4 // 3}" height="{self.height * 4 // 3}" role="img" '
            f'aria-labelledby="{title} {description}" font-family="system-ui, sans-serif">',
            f'<title id="{title}">{html.escape(self.title)}</title>',
            f'<desc id="{description}">{html.escape(self.description)}</desc>',
            *self.elements, "</svg>"])

def number(value):
    """A coordinate with one decimal place, or none; a text as it is."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value

class Axes:
    """A pair of axes in a drawing, which maps numbers to places. `x_ticks` and `y_ticks` are pairs
    (value, label); the first and the last are the ends of the axis."""
    def __init__(self, drawing, left, top, right, bottom, x_ticks, y_ticks):
        self.left, self.top, self.right, self.bottom = left, top, right, bottom
        (self.x_min, _), (self.x_max, _) = x_ticks[0], x_ticks[-1]
        (self.y_min, _), (self.y_max, _) = y_ticks[0], y_ticks[-1]
        for value, label in y_ticks:
            y = self.y(value)
            drawing.line(left, y, right, y)
            drawing.text(left - 6, y + 4, label, MUTED, "end")
        for value, label in x_ticks:
            drawing.text(self.x(value), bottom + 16, label, MUTED, "middle")

    def x(self, value):
        return self.left + (self.right - self.left) * (value - self.x_min) / (self.x_max - self.x_min)

    def y(self, value):
        return self.bottom - (self.bottom - self.top) * (value - self.y_min) / (self.y_max - self.y_min)

    def places(self, xs, ys):
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys)]

# ─── Step 5 ────────────────────────────────────────────────────────────────────────────────────
def visible(piece):
    """A piece of text as a label: line ends become visible, and the space before a word does not."""
    return piece.replace("\n", "⏎").strip()

def windows_figure(n_windows=2, T=4):
    """Two windows of the story, and the examples in the first."""
    text = story_llm.load_text(story_llm.DEFAULT_TEXT)
    pieces = story_llm.split_words(text)[:n_windows * T + 1]
    labels = [visible(piece) for piece in pieces]
    # token i of the text is i here, so a window contains the places of its tokens
    windows = story_llm.SlidingWindowDataset(torch.arange(len(pieces)), T, stride=T)
    first_input, first_targets = [part.tolist() for part in windows[0]]
    drawing = Drawing("windows", 130 + 30 * T, "Windows and their targets",
                      f"The story begins with the tokens {' '.join(labels)}. The first window has "
                      f"the input {' '.join(labels[i] for i in first_input)}, and its targets are "
                      f"the same tokens shifted by one: {' '.join(labels[i] for i in first_targets)}.")
    column = (WIDTH - 8) / len(pieces)

    def box(place, y, fill="none", stroke=LINE, opacity=None):
        x = 4 + place * column
        drawing.rect(x + 1.5, y, column - 3, 24, fill, stroke, opacity, radius=3)
        drawing.text(x + column / 2, y + 16, labels[place], anchor="middle")

    def bar(places, y, color, label):
        x, width = 4 + places[0] * column, len(places) * column
        drawing.rect(x + 1.5, y, width - 3, 20, color, opacity=0.18, radius=3)
        drawing.text(x + width / 2, y + 14.5, label, color, "middle")

    for place in range(len(pieces)):
        box(place, 6)
    for i in range(len(windows)):
        inputs, targets = [part.tolist() for part in windows[i]]
        bar(inputs, 40, ACCENT, f"input of window {i}")
        bar(targets, 64, ACCENT_2, f"targets of window {i}")
    drawing.text(5, 116, f"the {T} examples in window 0", MUTED)
    for t in range(T):
        for place in first_input[:t + 1]:
            box(place, 126 + 30 * t, ACCENT, None, 0.18)
        box(first_targets[t], 126 + 30 * t, ACCENT_2, ACCENT_2, 0.18)
    return Figure("windows", 5, "SlidingWindowDataset", drawing.svg(),
                  f"Two windows of {T} tokens, which do not overlap. The targets of a window are its "
                  f"input, shifted by one token, so a window of {T} tokens holds {T} examples.")

# ─── Step 10 ───────────────────────────────────────────────────────────────────────────────────
def learning_rate_figure(n_steps=180):
    """The learning rate of every step, from the program's own schedule."""
    config = story_llm.TrainConfig()
    rates = [story_llm.learning_rate(step, n_steps, config) for step in range(n_steps)]
    warmup = rates.index(max(rates))
    drawing = Drawing("learning-rate", 190, "The learning rate over the steps",
                      f"It rises in {warmup + 1} steps to {max(rates):g} and then falls in a "
                      f"straight line to {rates[-1]:.1g} at step {n_steps}.")
    peak = max(rates)
    axes = Axes(drawing, 48, 26, WIDTH - 16, 140,
                [(0, "0"), (60, "60"), (120, "120"), (n_steps, str(n_steps))],
                [(0, "0"), (peak * 0.4, f"{peak * 0.4:g}"), (peak, f"{peak:g}")])
    drawing.polyline(axes.places(range(n_steps), rates))
    drawing.text(6, 14, "learning rate", MUTED)
    drawing.text((axes.left + axes.right) / 2, 180, "step", MUTED, "middle")
    drawing.text(axes.x(warmup) + 40, axes.y(peak) + 16, "warm-up, then linearly towards 0")
    return Figure("learning-rate", 10, "learning_rate", drawing.svg(),
                  f"The learning rate in the {n_steps} steps of a default training.")
