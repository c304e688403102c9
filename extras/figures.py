"""The figures of the lesson's page: small drawings (SVG) of what its prose describes.

    from figures import figures
    for figure in figures(run):
        print(figure.step, figure.name, figure.caption)

lesson.py puts them on its page. Wherever a figure shows numbers, they are computed or were
measured. They come from the functions of story_llm.py and the beginning of Short_Story.txt, from
your model if there is one, and from experiments.json, which experiments.py writes. Without a model,
the figures that look into one are drawn without its numbers.

A drawing is 360 units wide, and its letters are large enough to be read on a phone. It takes its
colors from the page that shows it, as the CSS variables --ink, --muted, --line, --accent,
--accent-2 and --paper, and has colors of its own where these are not defined.
"""
import copy
import html
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from experiments import EXPERIMENTS, without_last_word

RECORD = Path(__file__).with_name("experiments.json")

@dataclass(frozen=True)
class Figure:
    """A drawing, and where it belongs."""
    name: str
    step: int           # of the lesson
    after: str          # the definition in story_llm.py that it follows; "": it opens the step
    svg: str
    caption: str        # plain text
    ends_step: bool = False     # it stands at the end of the step instead

def figures(model_run=None):
    """Return all figures as a list, in the order of the lesson. `model_run` is a Run, such as
    `load_checkpoint` returns."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    view = View(model_run) if model_run else None
    drawn = [windows_figure(), map_figure(view), mask_figure(view), heads_figure(view),
             residual_figure(view), loss_figure(record), averages_figure(record),
             learning_rate_figure(record), prediction_figure(record), cache_figure(),
             *(experiment_figure(name, record) for name in EXPERIMENTS)]
    return sorted(drawn, key=lambda figure: figure.step)

class View:
    """What a model computes for the beginning of a prompt: the last word is left out, and at most
    eight tokens are shown. `seen` is {module: (its input, its output)}, without the batch."""
    def __init__(self, run):
        self.model = copy.deepcopy(run.model).cpu().eval()
        self.config = run.config
        n_tokens = min(8, run.config.context_length)
        self.ids = run.tokenizer.encode(without_last_word(run.prompt))[-n_tokens:]
        self.names = [shorten(name, 8) for name in story_llm.token_names(run.tokenizer, self.ids)]
        self.seen = {}
        hooks = [module.register_forward_hook(self.keep) for module in self.model.modules()]
        with torch.no_grad():
            self.probabilities = self.model(torch.tensor([self.ids]))[0, -1].softmax(dim=-1)
        for hook in hooks:
            hook.remove()
        best = self.probabilities.topk(3)
        names = story_llm.token_names(run.tokenizer, best.indices.tolist())
        self.best = list(zip(map(shorten, names), best.values.tolist()))

    def keep(self, module, inputs, output):
        self.seen[module] = (inputs[0][0], output[0])

def shorten(name, length=10):
    return name if len(name) <= length else name[:length - 1] + "…"

# ─── Drawing ───────────────────────────────────────────────────────────────────────────────────
INK, MUTED, LINE = "var(--ink, #222)", "var(--muted, #666)", "var(--line, #ccc)"
ACCENT, ACCENT_2 = "var(--accent, #2a6f97)", "var(--accent-2, #b5562a)"
PAPER = "var(--paper, #fff)"
WIDTH = 360
SIZE = 12.5     # of letters

class Drawing:
    """An SVG image that is `WIDTH` units wide. Screen readers read its title and description."""
    def __init__(self, name, height, title, description):
        self.name, self.height, self.title, self.description = name, height, title, description
        self.elements = []
        self.rect(0, 0, WIDTH, height, PAPER)

    def add(self, tag, content=None, **attributes):
        """Add an element. In the name of an attribute, _ stands for -, and numbers are rounded."""
        shown = "".join(f' {name.replace("_", "-")}="{number(value)}"'
                        for name, value in attributes.items() if value is not None)
        end = "/>" if content is None else f">{html.escape(content)}</{tag}>"
        self.elements.append(f"<{tag}{shown}{end}")

    def text(self, x, y, content, fill=INK, anchor="start", halo=False):
        """Write a text. Its baseline is at y. A halo keeps it apart from the lines behind it."""
        edge = {"stroke": PAPER, "stroke_width": 4, "paint_order": "stroke"} if halo else {}
        self.add("text", content, x=x, y=y, fill=fill, font_size=SIZE,
                 text_anchor=None if anchor == "start" else anchor, **edge)

    def line(self, x1, y1, x2, y2, stroke=LINE, width=1, dashes=None):
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width,
                 stroke_dasharray=dashes)

    def rect(self, x, y, width, height, fill="none", stroke=None, opacity=None, radius=None):
        self.add("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=stroke,
                 fill_opacity=opacity, rx=radius)

    def polyline(self, points, stroke=ACCENT, width=2, dashes=None, opacity=None, fill=None):
        """A line through these points or, with `fill`, the area inside."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        line = {"stroke": stroke, "stroke_width": width, "stroke_linejoin": "round",
                "stroke_dasharray": dashes, "stroke_opacity": opacity}
        self.add("polyline", points=path, fill=fill or "none",
                 **({"fill_opacity": 0.18} if fill else line))

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
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH * 6 // 5}"'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"',
            f'aria-labelledby="{title} {description}" font-family="system-ui, sans-serif">',
            f'<title id="{title}">{html.escape(self.title)}</title>',
            f'<desc id="{description}">{html.escape(self.description)}</desc>',
            *self.elements, "</svg>"])

def number(value):
    """A number with at most two decimal places; a text as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value

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
            if label:
                drawing.text(self.x(value), bottom + 16, label, MUTED, "middle")

    def x(self, value):
        share = (value - self.x_min) / (self.x_max - self.x_min)
        return self.left + (self.right - self.left) * share

    def y(self, value):
        share = (value - self.y_min) / (self.y_max - self.y_min)
        return self.bottom - (self.bottom - self.top) * share

    def places(self, xs, ys):
        return [(self.x(x), self.y(y)) for x, y in zip(xs, ys)]

LOSSES = [(loss, str(loss)) for loss in (0, 2, 4, 6, 8)]       # the ticks of an axis of losses

def thirds(n_steps):
    """The ticks of an axis of steps."""
    return [(n_steps * i // 3, str(n_steps * i // 3)) for i in range(4)]

# ─── Step 5 ────────────────────────────────────────────────────────────────────────────────────
def visible(piece):
    """A piece of text as a label: line ends are shown, the space before a word is not."""
    return piece.replace("\n", "⏎").strip()

def windows_figure(n_windows=2, T=4):
    """Two windows of the story, and the examples in the first."""
    text = story_llm.load_text(story_llm.DEFAULT_TEXT)
    pieces = story_llm.split_words(text)[:n_windows * T + 1]
    labels = [visible(piece) for piece in pieces]
    # token i of the text is i here, so a window contains the places of its tokens
    windows = story_llm.SlidingWindowDataset(torch.arange(len(pieces)), T, stride=T)
    first_input, first_targets = [part.tolist() for part in windows[0]]

    def joined(places):
        return " ".join(labels[place] for place in places)

    drawing = Drawing("windows", 130 + 30 * T, "Windows and their targets",
                      f"The story begins with the tokens {' '.join(labels)}. The first window has "
                      f"the input {joined(first_input)}, and its targets are the same tokens "
                      f"shifted by one: {joined(first_targets)}.")
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
                  f"Two windows of {T} tokens, which do not overlap. The targets of a window are "
                  f"its input, shifted by one token, so a window of {T} tokens holds {T} examples.")

# ─── Step 6 ────────────────────────────────────────────────────────────────────────────────────
def map_figure(view):
    """The whole model, from token ids to logits, with its shapes and numbers of parameters."""
    config = view.config if view else story_llm.GPTConfig()
    T, C = (len(view.ids) if view else config.context_length), config.emb_dim
    shown = min(config.n_layers, 2)
    top = 108                                   # where the first block begins
    bottom = top + 108 * shown
    drawing = Drawing("map", bottom + (150 if view else 96), "The map of the model",
                      f"Token ids look up vectors of {C} numbers. Each of {config.n_layers} blocks "
                      "adds to them the output of attention, and then that of the feed-forward "
                      "network. A norm and the output head turn them into logits.")
    x, left, right = 44, 96, 244                # the residual stream, and the boxes beside it

    def box(y, label, x1, *modules):
        """A box and, with a model, the number of parameters of these modules."""
        drawing.rect(x1, y, right - x1, 28, PAPER, ACCENT, radius=4)
        drawing.text((x1 + right) / 2, y + 18, label, anchor="middle")
        if view:
            count = sum(story_llm.count_parameters(view.model.get_submodule(name))
                        for name in modules)
            drawing.text(WIDTH - 6, y + 18, f"{count:,}", MUTED, "end")

    def branch(y, label, *modules):
        """A box that reads x and adds its result to x."""
        box(y, label, left, *modules)
        drawing.arrow(x, y + 8, left, y + 8)
        drawing.polyline([(left, y + 20), (x + 24, y + 20), (x + 24, y + 34)], MUTED, 1.2)
        drawing.arrow(x + 24, y + 34, x + 7, y + 34)
        plus(drawing, x, y + 34)

    if view:
        drawing.text(WIDTH - 6, 18, "parameters", MUTED, "end")
    drawing.text(6, 18, f"{T} token ids")
    drawing.arrow(x, 26, x, 44)
    rotary = config.position == "rotary"        # then attention has the positions
    label = "token embeddings" if rotary else "embeddings: token + position"
    box(44, label, 6, "tok_emb", "pos_emb")
    for i in range(shown):
        drawing.rect(6, top + 108 * i - 6, right + 2, 100, LINE, opacity=0.3, radius=6)
    drawing.line(x, 72, x, bottom + 12, ACCENT_2, width=2.5)
    drawing.text(x + 10, 92, f"x: {T} vectors of {C} numbers", ACCENT_2)
    for i in range(shown):
        y = top + 108 * i
        block = f"trf_blocks.{i}"
        branch(y, "norm, attention", f"{block}.norm1", f"{block}.att")
        branch(y + 50, "norm, feed-forward", f"{block}.norm2", f"{block}.ff")
        last = i == shown - 1 and config.n_layers > shown
        label = f"block {i + 1}" + (f" … {config.n_layers}, all alike" if last else "")
        drawing.text(right, y + 43, label, MUTED, "end")
    drawing.arrow(x, bottom + 4, x, bottom + 14, ACCENT_2)
    head = [] if config.tie_weights else ["out_head"]           # tied: it is counted above
    box(bottom + 14, "norm, then the output head", 6, "final_norm", *head)
    drawing.arrow(x, bottom + 42, x, bottom + 58)
    vocabulary = f"{config.vocab_size:,}" if view else "V"
    drawing.text(6, bottom + 74, f"{T} × {vocabulary} logits")
    if view:
        drawing.text(6, bottom + 94, f"most probable after {view.names[-1]}", MUTED)
        for row, (name, p) in enumerate(view.best):
            y = bottom + 98 + 16 * row
            drawing.text(80, y + 12, name, anchor="end")
            drawing.rect(88, y + 3, max(200 * p, 1), 10, ACCENT)
            drawing.text(94 + 200 * p, y + 12, f"{p:.1%}", MUTED)
    return Figure("map", 6, "", drawing.svg(),
                  "The model as a map. The vectors x run straight through it, and every box of a "
                  "block reads them and adds its own contribution.")

def plus(drawing, x, y):
    """The circle in which two vectors are added."""
    drawing.circle(x, y, 7, PAPER, ACCENT_2)
    drawing.line(x - 4, y, x + 4, y, ACCENT_2, 1.5)
    drawing.line(x, y - 4, x, y + 4, ACCENT_2, 1.5)

def mask_figure(view):
    """Which token may attend to which; with a model, how much it does."""
    names = view.names if view else story_llm.split_words(story_llm.DEFAULT_PROMPT)[:-1]
    T, left = len(names), 80
    mask = story_llm.causal_mask(T, T)
    weights = most_telling_head(view) if view else None
    cell = (WIDTH - 92) / T
    height = min(cell, 40)
    drawing = Drawing("mask", math.ceil(44 + T * height + 34), "The causal mask",
                      "A grid with a row and a column for each token. A token attends to itself "
                      "and to those before it; whatever lies above the diagonal is masked.")
    for t, name in enumerate(names):
        x, y = left + t * cell, 40 + t * height
        drawing.text(left - 6, y + height / 2 + 4, visible(name), anchor="end")
        drawing.text(x + cell / 2, 14 if t % 2 else 30, visible(name), anchor="middle")
        if t % 2:
            drawing.line(x + cell / 2, 18, x + cell / 2, 36)
        for s in range(T):
            place = (left + s * cell + 1, y + 1, cell - 2, height - 2)
            if mask[t, s]:
                drawing.rect(*place, LINE, opacity=0.6)
                continue
            weight = weights[1][t, s].item() if view else 0.4
            drawing.rect(*place, ACCENT, ACCENT, 0.04 + 0.56 * weight)
            if view:
                drawing.text(left + (s + 0.5) * cell, y + height / 2 + 4, f"{weight:.2f}",
                             anchor="middle")
    y = 44 + T * height + 10
    drawing.rect(left, y, 14, 14, ACCENT, ACCENT, 0.3)
    drawing.text(left + 20, y + 12, "attention weight" if view else "may attend", MUTED)
    drawing.rect(220, y, 14, 14, LINE, opacity=0.6)
    drawing.text(240, y + 12, "masked, weight 0", MUTED)
    caption = ("The causal mask. Each row is a token, and its columns are the tokens to which it "
               "may attend.")
    if view:
        caption += (f" The numbers are the attention weights of block 1, head {weights[0] + 1} of "
                    "your model; a row adds up to 1.")
    return Figure("mask", 6, "causal_mask", drawing.svg(), caption)

def most_telling_head(view):
    """(The index of a head of the first block, its weights (T, T)): the head in which the last
    token gives the largest weight to a token before it, other than the first."""
    heads = story_llm.attention_maps(view.model, torch.tensor([view.ids]))[0]         # (H, T, T)
    earlier = heads[:, -1, 1:-1] if len(view.ids) > 2 else heads[:, -1]
    head = earlier.amax(dim=-1).argmax().item()
    return head, heads[head]

def heads_figure(view):
    """The vector of one token on its way through the heads of an attention layer."""
    config = view.config if view else story_llm.GPTConfig()
    C, H = config.emb_dim, config.n_heads
    D = C // H
    drawing = Drawing("heads", 346, "One token's way through the heads",
                      f"A vector of {C} numbers becomes a query, a key and a value of {C} numbers "
                      f"each, cut into {H} pieces of {D}, one for each head. Every head computes "
                      f"{D} numbers of the context vector, and out_proj mixes them.")
    left, width = 70, WIDTH - 76

    def strip(y, label, values, parts):
        """The numbers of a vector as thin bars, up or down from the middle of a row."""
        drawing.text(left - 6, y + 16, label, anchor="end")
        gap = 6 if parts > 1 else 0
        piece = (width - gap * (parts - 1)) / parts
        for h in range(parts):
            x = left + h * (piece + gap)
            color = ACCENT_2 if h == 0 and parts > 1 else ACCENT
            drawing.rect(x, y, piece, 24, PAPER, LINE)
            if values is None:
                drawing.text(x + piece / 2, y + 16, str(C // parts), color, "middle")
                continue
            step = piece / (C // parts)
            heights = (values.reshape(parts, -1)[h] / values.abs().max() * 12).tolist()
            path = "".join(f"M{x + (i + 0.5) * step:.1f},{y + 12}v{-height:.1f}"
                           for i, height in enumerate(heights))
            drawing.add("path", d=path, stroke=color, stroke_width=max(round(step * 0.75, 2), 0.3))

    rows = dict.fromkeys(("x", "query", "key", "value", "context", "output"))
    if view:
        block, seen = view.model.trf_blocks[0], view.seen
        att = block.att
        tensors = (seen[block.norm1][1], seen[att.query][1], seen[att.key][1], seen[att.value][1],
                   seen[att.out_proj][0], seen[att][1])
        rows = dict(zip(rows, (tensor[-1] for tensor in tensors)))
    strip(22, "norm(x)", rows["x"], 1)
    drawing.text(left, 14, (f"{view.names[-1]}: " if view else "") + f"{C} numbers", MUTED)
    drawing.text(left, 66, f"three linear layers, cut into {H} × {D}", MUTED)
    for y, label in ((74, "query"), (104, "key"), (134, "value")):
        strip(y, label, rows[label], H)
    middle = left + min((width - 6 * (H - 1)) / H / 2, 30)
    drawing.arrow(middle, 162, middle, 204, ACCENT_2)
    drawing.text(left + 44, 180, "each head compares query and keys", MUTED)
    drawing.text(left + 44, 196, "and averages the values", MUTED)
    strip(208, "context", rows["context"], H)
    drawing.text(left, 254, "out_proj mixes what the heads have found", MUTED)
    strip(262, "output", rows["output"], 1)
    drawing.text(left, 304, f"{C} numbers, added to x", MUTED)
    drawing.rect(left, 322, 14, 14, ACCENT_2)
    drawing.text(left + 20, 334, "head 1", MUTED)
    drawing.rect(left + 90, 322, 14, 14, ACCENT)
    drawing.text(left + 110, 334, "the other heads", MUTED)
    caption = f"One token's way through the {H} heads of an attention layer."
    if view:
        caption += (f" Each thin bar is a number that your model computes in block 1 for "
                    f"{view.names[-1]}.")
    return Figure("heads", 6, "MultiHeadAttention", drawing.svg(), caption)

def residual_figure(view):
    """x + f(norm(x)), twice, as in a block."""
    drawing = Drawing("residual", 270, "x + f(norm(x))",
                      "The vector x runs straight down. Attention, and after it the feed-forward "
                      "network, reads a normalized copy of x, and its output is added to x.")
    x = 44
    seen, block = (view.seen, view.model.trf_blocks[0]) if view else (None, None)

    def spread(tensor):
        """How large the numbers of the last token are."""
        return f"{tensor[-1].std(correction=0).item():.2f}"

    drawing.line(x, 10, x, 256, ACCENT_2, 2.5)
    drawing.arrow(x, 250, x, 262, ACCENT_2)
    drawing.text(x - 18, 20, "x", ACCENT_2)
    branches = ((26, "attention", "norm1", "att"), (136, "feed-forward", "norm2", "ff"))
    for y, label, norm, f in branches:
        drawing.arrow(x, y + 16, 108, y + 16)
        drawing.rect(108, y, 64, 32, PAPER, ACCENT, radius=4)
        drawing.text(140, y + 20, "norm", anchor="middle")
        drawing.arrow(172, y + 16, 220, y + 16)
        drawing.rect(220, y, 110, 32, PAPER, ACCENT, radius=4)
        drawing.text(275, y + 20, label, anchor="middle")
        drawing.polyline([(275, y + 32), (275, y + 66)], MUTED, 1.2)
        drawing.arrow(275, y + 66, x + 7, y + 66)
        plus(drawing, x, y + 66)
        if view:
            norm, f = getattr(block, norm), getattr(block, f)
            drawing.text(x + 8, y + 8, spread(seen[norm][0]), MUTED)
            drawing.text(178, y + 8, spread(seen[norm][1]), MUTED)
            drawing.text(268, y + 56, spread(seen[f][1]), MUTED, "end")
    caption = ("A block: x = x + f(norm(x)), first with attention as f, then with the feed-forward "
               "network.")
    if view:
        drawing.text(x + 8, 240, spread(seen[block][1]), MUTED)
        caption += (" The numbers are standard deviations, measured in block 1 of your model for "
                    f"{view.names[-1]}.")
    return Figure("residual", 6, "TransformerBlock", drawing.svg(), caption)

# ─── Step 9 ────────────────────────────────────────────────────────────────────────────────────
def loss_figure(record):
    """-ln p, with the loss of one prediction at some steps of a training."""
    prediction = record["prediction"]
    target, probabilities = final_prediction(prediction)
    steps = prediction["steps"]
    drawing = Drawing("loss", 276, "The loss, -ln p",
                      "The loss is 0 where the probability of the token that came next is 1, and "
                      "grows without a limit as the probability approaches 0.")
    axes = Axes(drawing, 28, 36, WIDTH - 20, 232, [(0, "0"), (0.5, "0.5"), (1, "1")], LOSSES)
    curve = [math.exp(-8 + i / 10) for i in range(81)]
    drawing.polyline(axes.places(curve, [-math.log(p) for p in curve]))
    drawing.text(6, 14, "loss, −ln p", MUTED)
    label = "p, the probability of the token that came next"
    drawing.text((axes.left + axes.right) / 2, 268, label, MUTED, "middle")
    half = next((i for i, p in enumerate(probabilities) if p > 0.2), 0)
    for i in sorted({0, len(steps) // 4, half, len(steps) - 1}):
        p, loss = probabilities[i], -math.log(probabilities[i])
        x, y = axes.x(p), axes.y(loss)
        drawing.circle(x, y, 4, ACCENT_2)
        anchor, x, y = ("start", x + 12, y - 6) if p < 0.5 else ("end", x + 14, y - 18)
        if i == 0:
            y += 24         # below the end of the curve
        drawing.text(x, y - 15, f"step {steps[i]}", MUTED, anchor)
        drawing.text(x, y, f"p = {p:.2g}, loss {loss:.2f}", ACCENT_2, anchor)
    return Figure("loss", 9, "batch_loss", drawing.svg(),
                  f"The loss of a prediction. The dots are those of {target} after "
                  f"“{prediction['prompt']}”, before, during and after a training.")

def final_prediction(prediction):
    """(The token that was most probable at the end, its probabilities at all steps)."""
    return max(prediction["tokens"].items(), key=lambda item: item[1][-1])

# ─── Step 10 ───────────────────────────────────────────────────────────────────────────────────
def averages_figure(record):
    """The gradients of one parameter, with AdamW's averages of them, and how far it moves."""
    averages = record["averages"]
    gradients, m, v = averages["gradients"], averages["m"], averages["v"]
    n = len(gradients)
    sizes = [math.sqrt(value) for value in v]
    beta1, beta2 = story_llm.AdamW([]).betas
    moves = [(m[i] / (1 - beta1 ** (i + 1))) / math.sqrt(v[i] / (1 - beta2 ** (i + 1)))
             for i in range(n)]
    drawing = Drawing("averages", 330, "AdamW's two averages",
                      f"The gradients of one parameter over {n} steps jump up and down. Their "
                      "moving average m is much smoother, and the square root of v follows their "
                      "size.")
    limit = max(map(abs, gradients))
    drawing.text(6, 14, "gradient g", MUTED)
    drawing.text(96, 14, "average m", ACCENT)
    drawing.text(186, 14, "usual size, ±√v", ACCENT_2)
    x_ticks = [(1, "1"), *((step, str(step)) for step in range(10, n + 1, 10))]
    axes = Axes(drawing, 56, 26, WIDTH - 12, 186, [(step, "") for step, _ in x_ticks],
                [(-limit, f"{-limit:.1g}".replace("-", "−")), (0, "0"), (limit, f"{limit:.1g}")])
    steps = range(1, n + 1)
    for x, y in axes.places(steps, gradients):
        drawing.line(x, axes.y(0), x, y, MUTED, 2.5)
    for sign in (1, -1):
        drawing.polyline(axes.places(steps, [sign * size for size in sizes]), ACCENT_2, 1.5, "4 3")
    drawing.polyline(axes.places(steps, m), ACCENT, 2.5)
    drawing.text(6, 212, "the move, m / √v after correction, in units of lr", MUTED)
    axes = Axes(drawing, 56, 224, WIDTH - 12, 294, x_ticks, [(-1, "−1"), (0, "0"), (1, "1")])
    drawing.polyline(axes.places(steps, [-move for move in moves]), INK)
    drawing.text((axes.left + axes.right) / 2, 324, "step", MUTED, "middle")
    return Figure("averages", 10, "AdamW", drawing.svg(),
                  f"The gradients of one parameter, {averages['parameter']}"
                  f"{averages['index']}, in the first {n} steps of a training. As long as they "
                  "agree, it moves by about lr a step; once their signs change, it hardly moves.")

def learning_rate_figure(record):
    """The learning rate of every step, from the program's own schedule."""
    n_steps = record["prediction"]["steps"][-1]
    config = story_llm.TrainConfig()
    rates = [story_llm.learning_rate(step, n_steps, config) for step in range(n_steps)]
    warmup = rates.index(max(rates))
    drawing = Drawing("learning-rate", 190, "The learning rate over the steps",
                      f"It rises in {warmup + 1} steps to {max(rates):g} and then falls in a "
                      f"straight line to {rates[-1]:.1g} at step {n_steps}.")
    peak = max(rates)
    axes = Axes(drawing, 56, 26, WIDTH - 16, 140,
                thirds(n_steps),
                [(peak * share, f"{peak * share:g}") for share in (0, 0.4, 0.8, 1)])
    drawing.polyline(axes.places(range(n_steps), rates))
    drawing.text(6, 14, "learning rate", MUTED)
    drawing.text((axes.left + axes.right) / 2, 180, "step", MUTED, "middle")
    drawing.text(axes.x(warmup) + 4, axes.y(peak * 0.12), f"{warmup + 1} steps of warm-up", MUTED)
    drawing.text(axes.right, axes.y(peak * 0.64), "then linearly towards 0", MUTED, "end")
    return Figure("learning-rate", 10, "learning_rate", drawing.svg(),
                  f"The learning rate in the {n_steps} steps of a default training.")

def prediction_figure(record, n_tokens=8):
    """How the probabilities of some next tokens change over a training, on one scale."""
    prediction = record["prediction"]
    steps, prompt = prediction["steps"], prediction["prompt"]
    target, _ = final_prediction(prediction)
    peaks = {token: max(values) for token, values in prediction["tokens"].items()}
    tokens = sorted(peaks, key=peaks.get, reverse=True)[:n_tokens]

    def order(token):       # the earlier its peak, the higher its row
        return token == target, prediction["tokens"][token].index(peaks[token])

    tokens.sort(key=order)
    row, full = 27, 250             # the height of a row, and of a probability of 1
    bottom = 20 + row * len(tokens) + 20
    bottom = max(bottom, full + 10)
    drawing = Drawing("prediction", bottom + 44, "How a prediction grows",
                      f"The probabilities of {', '.join(tokens)} after the prompt {prompt}. The "
                      f"last of them reaches {peaks[target]:.0%}; the others rise and fall before.")
    left, right = 76, WIDTH - 14

    def place(step, p, base):
        return left + (right - left) * step / steps[-1], base - full * p

    summits = []
    for i, token in reversed(list(enumerate(tokens))):
        base = bottom - row * (len(tokens) - 1 - i)
        values = prediction["tokens"][token]
        color = ACCENT_2 if token == target else ACCENT
        points = [place(step, p, base) for step, p in zip(steps, values)]
        drawing.line(left, base, right, base)
        area = [(left, base), *points, (right, base)]
        drawing.polyline(area, None, fill=color)
        drawing.polyline(points, color, 1.6)
        label = shorten(token) if len(token) > 1 else f"“{token}”"
        drawing.text(left - 8, base, label, color, "end")
        best = values.index(peaks[token])
        summits.append((token, color, *points[best]))
    for token, color, x, y in summits:          # in front of all curves
        drawing.circle(x, y, 2.5, color)
        if token == target:
            drawing.text(x, y - 8, f"{peaks[token]:.0%}", color, "end", halo=True)
        else:
            drawing.text(x + 6, y + 3, f"{peaks[token]:.0%}", color, halo=True)
    for step, label in thirds(steps[-1]):
        drawing.text(place(step, 0, 0)[0], bottom + 18, label, MUTED, "middle")
    drawing.text((left + right) / 2, bottom + 36, "step", MUTED, "middle")
    return Figure("prediction", 10, "training_steps", drawing.svg(),
                  f"How a prediction grows. Each hill is one token, and its height is the "
                  f"probability that the model gave to this token after “{prompt}”, measured every "
                  f"{steps[1]} steps of a training; all have the same scale. First rise the tokens "
                  "that are frequent everywhere, then words that follow the last token elsewhere "
                  f"in the story, and at last the right one, {target}.", ends_step=True)

# ─── Step 13 ───────────────────────────────────────────────────────────────────────────────────
def cache_figure(n_prompt=3, context_length=7, n_new=7):
    """Which tokens are sent through the layers at each step, as `generate` really does it."""
    config = story_llm.GPTConfig(vocab_size=50, context_length=context_length)
    model = story_llm.new_model(config)
    sent = []
    model.register_forward_pre_hook(lambda module, inputs: sent.append(inputs[0].shape[1]))
    list(story_llm.generate(model, torch.arange(n_prompt)[None], n_new))
    text = story_llm.load_text(story_llm.DEFAULT_TEXT)
    pieces = story_llm.split_words(text[text.index(story_llm.DEFAULT_PROMPT):])
    drawing = Drawing("cache", 68 + 26 * n_new, "The key-value cache",
                      f"Writing after a prompt of {n_prompt} tokens. The numbers of tokens that "
                      f"are computed at each step are {', '.join(map(str, sent))}; the keys and "
                      "values of all others are kept.")
    left, cell = 92, 21
    drawing.text(6, 18, "to predict")
    drawing.text(left, 18, "tokens in the window", MUTED)
    drawing.text(WIDTH - 6, 18, "computed", MUTED, "end")
    for step, n_sent in enumerate(sent):
        y = 28 + 26 * step
        n_window = min(n_prompt + step, context_length)
        end = n_prompt + step
        drawing.text(6, y + 15, shorten(visible(pieces[end]), 11))
        for place in range(end - n_window, end):
            new = place >= end - n_sent
            drawing.rect(left + place * cell + 1, y + 1, cell - 2, cell - 2,
                         ACCENT_2 if new else ACCENT, None, 0.85 if new else 0.22, radius=2)
        drawing.text(WIDTH - 6, y + 15, f"{n_sent} of {n_window}", INK, "end")
    y = 44 + 26 * n_new
    drawing.rect(6, y, 14, 14, ACCENT_2, opacity=0.85)
    drawing.text(26, y + 12, "computed anew", MUTED)
    drawing.rect(150, y, 14, 14, ACCENT, opacity=0.22)
    drawing.text(170, y + 12, "keys and values kept", MUTED)
    return Figure("cache", 13, "KeyValueCache", drawing.svg(),
                  f"The key-value cache, here with a context length of {context_length}. Once the "
                  "window is full, it slides, and all of it is computed anew.")

# ─── Experiments ───────────────────────────────────────────────────────────────────────────────
def experiment_figure(name, record):
    """The losses of a changed model and of the unchanged one."""
    experiment, measured = EXPERIMENTS[name], record["experiments"]
    curves = {}
    for key, label, color in (("unchanged", "unchanged", MUTED), (name, "changed", ACCENT_2)):
        losses = measured[key]["losses"]
        steps = [step for step in losses if losses[step] is not None]
        curves[key] = [*map(int, steps)], [losses[step] for step in steps], label, color
    last = max(curves["unchanged"][0])
    changed_end, unchanged_end = curves[name][1][-1], curves["unchanged"][1][-1]
    drawing = Drawing(f"experiment-{name}", 186, f"Experiment {name}",
                      f"The loss on the training split over {last} steps. At the end it is "
                      f"{changed_end:.2f}, and {unchanged_end:.2f} in the unchanged program.")
    axes = Axes(drawing, 24, 26, WIDTH - 126, 146, thirds(last),
                LOSSES)
    drawing.text(6, 14, "loss", MUTED)
    drawing.text((axes.left + axes.right) / 2, 180, "step", MUTED, "middle")
    for key, (steps, losses, _, color) in curves.items():
        # where the two agree, the wider one can be seen behind the other
        style = {"width": 4.5, "opacity": 0.5} if key == "unchanged" else {}
        drawing.polyline(axes.places(steps, losses), color, **style)
    ends = [axes.y(losses[-1]) + 4 for _, losses, _, _ in curves.values()]
    recalls = [f"{measured[key]['recall']:.0%}" for key in curves]
    drawing.text(axes.right + 9, 14, "recall", MUTED)
    ends = spread_out(ends, axes.bottom)
    for i, (_, losses, label, color) in enumerate(curves.values()):
        drawing.text(axes.right + 9, ends[i], f"{losses[-1]:.2f} {label}", color)
        drawing.text(axes.right + 9, 46 - 15 * i, f"{recalls[i]} {label}", color)
    return Figure(f"experiment-{name}", experiment.step, AFTER_EXPERIMENT[name], drawing.svg(),
                  f"Experiment {name}: {experiment.change}. After {last} steps, the loss is "
                  f"{changed_end:.2f} ({unchanged_end:.2f} without the change), and recall is "
                  f"{recalls[1]} ({recalls[0]}).")

# The definition behind the sentences that each experiment supports
AFTER_EXPERIMENT = {
    "no-scaling": "attention_weights", "no-mask": "causal_mask", "no-residual": "TransformerBlock",
    "no-norm": "TransformerBlock", "post-norm": "TransformerBlock", "no-attention": "GPTModel",
    "no-feed-forward": "GPTModel", "average": "GPTModel", "one-head": "GPTModel",
    "one-block": "GPTModel", "no-positions": "GPTModel", "gradient-descent": "AdamW",
    "high-learning-rate": "learning_rate", "no-warm-up": "learning_rate", "no-clipping": "training_steps",
    "no-prompt-windows": "training_batches"}

def spread_out(ys, lowest, gap=15):
    """Move two labels apart until there is a gap between them, and none is below `lowest`."""
    upper, lower = sorted(ys)
    lower = min(max(lower, (upper + lower + gap) / 2), lowest)
    upper = min(upper, lower - gap)
    return [upper, lower] if ys[0] <= ys[1] else [lower, upper]
