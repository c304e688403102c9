"""Write a web page in which anybody can look inside your model while it writes.

    python extras/explore.py --model story_llm.pt story.html

The page is a single file. It contains the weights, the tokenizer and the history of the run, and a
GPT in JavaScript that runs them. It needs no server and no network, so you can open it from a
folder, show it in class, or send it to a friend. Its text is in explore.html, beside this file, its
style in page.css and its script in model.js, which the page of lesson.py has as well.

A model of 1.7 million parameters makes a page of 5 MB, because every weight takes 16 bits. Three
ways to store a number in 16 bits were tried. The table shows the largest change of a logit of the
default model, and how often the most likely token changed, over windows from the whole story:

    float16                      0.0073     never
    bfloat16                     0.057      at 1 of 9,000 positions
    integers, a scale per row    0.0008     never

The recall stays at 100 % with each of them. The page uses the integers. All weights of a row have
about the same size, so the exponent that a floating-point number stores for every weight is wasted.
"""
import base64
import copy
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from story_llm import StoryError, check, log

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 60_000_000
LARGEST_INT16 = 32767
CHECKED = 32        # tokens whose logits the page compares with those of Python

# ─── What the page can show ────────────────────────────────────────────────────────────────────
# The page computes a model with these settings and values. A setting that story_llm.py gets later
# must have its default, and the weights must be those listed below, so that a model which the page
# would compute wrongly is refused. If only the code of the model has changed, the page notices.
SUPPORTED = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate",
             "qkv_bias", "tie_weights", "gelu", "position")
VALUES = {"gelu": ("exact", "tanh"), "position": ("learned", "sinusoidal", "rotary")}

def expected_shapes(config):
    """{name: shape} of the weights that the page needs for a model with these settings."""
    V, T, C = config.vocab_size, config.context_length, config.emb_dim
    block = {"att.out_proj.weight": (C, C), "att.out_proj.bias": (C,),
             "ff.expand.weight": (4 * C, C), "ff.expand.bias": (4 * C,),
             "ff.project.weight": (C, 4 * C), "ff.project.bias": (C,)}
    for norm in ("norm1", "norm2"):
        block |= {f"{norm}.weight": (C,), f"{norm}.bias": (C,)}
    for layer in ("att.query", "att.key", "att.value"):
        block[f"{layer}.weight"] = (C, C)
        if config.qkv_bias:
            block[f"{layer}.bias"] = (C,)
    shapes = {"tok_emb.weight": (V, C), "pos_emb.weight": (T, C), "out_head.weight": (V, C),
              "final_norm.weight": (C,), "final_norm.bias": (C,)}
    for i in range(config.n_layers):
        shapes |= {f"trf_blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes

def check_supported(model):
    """Raise StoryError if the page cannot compute this model."""
    for f in fields(model.config):
        value = getattr(model.config, f.name)
        known = f.name in SUPPORTED and value in VALUES.get(f.name, [value])
        check(known or value == f.default, f"the page cannot compute a model with {f.name} "
              f"{value}: train one without {story_llm.option_string(f.name)}, or teach it to "
              "model.js")
    found = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    expected = expected_shapes(model.config)
    for name in sorted(found.keys() | expected.keys()):
        check(found.get(name) == expected.get(name), f"the page cannot compute this model, because "
              f"the shape of its weight {name} is {found.get(name)} and not {expected.get(name)}: "
              "if you have changed the model in story_llm.py, change model.js as well")

# ─── Weights ───────────────────────────────────────────────────────────────────────────────────
def as_base64(tensor):
    """The numbers of a tensor as base64, in little-endian byte order."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")

def to_integers(matrix):
    """Return (16-bit integers, a scale for each row). A number of the matrix is its integer times
    the scale of its row."""
    matrix = matrix.double()
    scales = matrix.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / LARGEST_INT16
    integers = (matrix / scales).round().to(torch.int16)
    return integers, scales.float()

def pack(weight):
    """Describe a weight in values that JSON can express. Vectors, which are biases and the
    parameters of LayerNorm, stay as they are, because they take no space."""
    packed = {"shape": list(weight.shape)}
    if weight.dim() < 2:
        return packed | {"float32": as_base64(weight)}
    integers, scales = to_integers(weight)
    return packed | {"int16": as_base64(integers), "scales": as_base64(scales)}

def round_weights(model):
    """Return a copy of the model, on the CPU, with the weights that the page has."""
    model = copy.deepcopy(model).cpu().eval()
    for weight in model.state_dict().values():
        if weight.dim() == 2:
            integers, scales = to_integers(weight)
            weight.copy_(integers * scales)
    return model

def weights_to_store(model):
    """{name: tensor} of a model. A matrix that is used twice (weight tying) is stored once."""
    weights = model.state_dict()
    if model.config.tie_weights:
        del weights["out_head.weight"]
    return weights

# ─── Tokenizer ─────────────────────────────────────────────────────────────────────────────────
SCRIPTS = re.compile(r"\\p\{(Han|Hiragana|Katakana|Thai|Lao|Khmer|Myanmar)\}")

def javascript_pattern(pattern):
    """Translate a pattern from Python's regex, or from tiktoken, to JavaScript with its flag v.
    (JavaScript's own \\s is another set of characters.)"""
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    return SCRIPTS.sub(r"\\p{Script=\1}", pattern)

def describe_tokenizer(tokenizer):
    """The tokenizer in values that JSON can express: byte strings become strings of the characters
    U+0000 to U+00FF."""
    word = tokenizer.kind == "word"
    pattern = story_llm.WORD_OR_MARK.pattern if word else story_llm.SPLIT_PATTERNS[tokenizer.kind]
    tokens = tokenizer.tokens
    if not word:
        tokens = [token.decode("latin-1") for token in tokens]
    return {"kind": tokenizer.kind, "tokens": tokens, "unknown": story_llm.UNKNOWN,
            "end_of_text": story_llm.END_OF_TEXT, "end_id": tokenizer.end_of_text,
            "pattern": javascript_pattern(pattern)}

# ─── The page ──────────────────────────────────────────────────────────────────────────────────
def describe_settings(settings):
    """[(name, value, what it means)] for every field of a settings class."""
    return [(f.name, getattr(settings, f.name), f.metadata["meaning"])
            for f in fields(settings)]

def describe_run(run, name):
    """Everything that the page needs to know, in values that JSON can express. `check` is a window
    of the full context length and, for each of its positions, the logits of some tokens, with which
    the page can tell whether it computes what Python does."""
    config = run.config
    window = torch.linspace(0, config.vocab_size - 1, config.context_length).long()
    ids = torch.linspace(0, config.vocab_size - 1, min(CHECKED, config.vocab_size)).long()
    with torch.no_grad():
        logits = round_weights(run.model)(window[None])[0, :, ids]
    texts = [Path(path).name for path in run.text_paths]
    return {"name": name, "text_name": ", ".join(texts), "prompt": run.prompt,
            "beginnings": run.beginnings, "step": story_llm.step_of_weights(run),
            "parameters": story_llm.count_parameters(run.model), "config": asdict(config),
            "settings": describe_settings(config) + describe_settings(run.train_config),
            "history": [asdict(evaluation) for evaluation in run.history],
            "tokenizer": describe_tokenizer(run.tokenizer),
            "check": {"window": window.tolist(), "ids": ids.tolist(), "logits": as_base64(logits)},
            "weights": {name: pack(weight.cpu())
                        for name, weight in weights_to_store(run.model).items()}}

def check_size(n_bytes):
    check(n_bytes <= MAX_BYTES, f"the page would have {n_bytes / 1e6:,.0f} MB, and browsers become "
          f"slow above {MAX_BYTES / 1e6:.0f}: train a smaller model, or one with fewer tokens")

def as_json(data):
    """Data as JSON that can stand in a page. A story is data and must stay data: JSON escapes
    everything that is not ASCII, and without any "<" in it, nothing can end its element."""
    return json.dumps(data, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")

def fill(template, style, script, **parts):
    """Return a page: the template of that name with the texts of these files as its style and its
    script, and with the parts in place of their names in capitals, the last part last."""
    page = (FOLDER / template).read_text(encoding="utf-8")
    for kind, names in (("STYLE", style), ("SCRIPT", script)):
        content = "\n" + "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest())
        page = page.replace(f"{kind}_HASH", f"sha256-{digest.decode('ascii')}")
        page = page.replace(f"PAGE_{kind}", content)
    for name, part in parts.items():
        before, after = page.split(f"PAGE_{name.upper()}")
        page = before + part + after
    return page

def run_data(run, name, **more):
    """The run as JSON, with more data. Raises StoryError if the page would be too large, or cannot
    compute the model."""
    check_supported(run.model)
    matrices = sum(weight.numel() for weight in weights_to_store(run.model).values())
    check_size(matrices * 2 * 4 // 3)       # two bytes each, and base64 makes four of three
    return as_json(describe_run(run, name) | more)

def make_page(run, name="story_llm.pt"):
    """Return the page of a run; `name` is what the page calls it. Raises StoryError as `run_data`
    does."""
    page = fill("explore.html", ["page.css"], ["model.js"], data=run_data(run, name))
    check_size(len(page))
    return page

def write_page(path, page):
    """Write the page to a temporary file, which then replaces the file at `path`, so that `path`
    never holds half a page. Raises StoryError."""
    path = story_llm.check_file_path(path)
    temporary = story_llm.temporary_path(path)
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        raise StoryError(f"{path} could not be written ({error.strerror}): free some disk space, "
                         "or choose another path") from None
    finally:
        temporary.unlink(missing_ok=True)       # after a failure; else it has been renamed

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def run_command(argv):
    parser = story_llm.Parser(prog="extras/explore.py", allow_abbrev=False,
                              description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", metavar="PAGE.html", help="the HTML file to write")
    parser.add_argument("--model", default="story_llm.pt", metavar="FILE",
                        help="the checkpoint (default: story_llm.pt)")
    args = parser.parse_args(argv)
    story_llm.check_different(args.page, args.model)
    story_llm.check_writable(args.page, (".html", ".htm"))
    page = make_page(story_llm.load_checkpoint(args.model), Path(args.model).name)
    write_page(args.page, page)
    log(f"wrote {args.page}: {len(page) / 1e6:.1f} MB. Open it in a browser")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
