"""Write a web page in which anybody can look inside your model while it writes.

    python extras/explore.py --model story_llm.pt story.html

The page is a single file. It contains the weights, the tokenizer and the history of the run, and a
GPT in JavaScript that runs them. It needs no server and no network, so you can open it from a
folder, show it in class, or send it to a friend. Its style and its script are in explore.html,
beside this file, and this program fills in the data.

A model of 1.7 million parameters makes a page of 5 MB, because every weight takes 16 bits. Three
ways to store a number in 16 bits were tried. The table shows the largest change of a logit of the
default model, and how often the most likely token changed, over windows from the whole story:

    float16                      0.0073     never
    bfloat16                     0.057      at 1 of 9,000 positions
    integers, a scale per row    0.0008     never

The recall stays at 100 % with each of them. The page uses the integers. All weights of a row have
about the same size, so the exponent that a floating-point number stores for every weight is wasted.
"""
import argparse
import base64
import hashlib
import json
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from story_llm import StoryError, check, log

TEMPLATE = Path(__file__).with_name("explore.html")
MAX_BYTES = 60_000_000
LARGEST_INT16 = 32767

# ─── Weights ───────────────────────────────────────────────────────────────────────────────────
def as_base64(tensor):
    """The numbers of a tensor as base64, in little-endian byte order."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")

def pack(weight):
    """Describe a weight in values that JSON can express. A matrix becomes 16-bit integers and a
    scale for each row, so that a number is its integer times the scale of its row. Vectors, which
    are biases and the parameters of LayerNorm, stay as they are, because they take no space."""
    packed = {"shape": list(weight.shape)}
    if weight.dim() < 2:
        return packed | {"float32": as_base64(weight.float())}
    weight = weight.double()
    scales = weight.abs().amax(dim=1).clamp(min=1e-30) / LARGEST_INT16
    integers = (weight / scales[:, None]).round().to(torch.int16)
    return packed | {"int16": as_base64(integers), "scales": as_base64(scales.float())}

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
    """Everything that the page needs to know, in values that JSON can express. `check` is a short
    window with its logits, with which the page can tell whether it computes what Python does."""
    model = story_llm.on_cpu(run.model).eval()
    ids = torch.arange(min(8, run.config.context_length)) % run.config.vocab_size
    with torch.no_grad():
        logits = model(ids[None])[0, -1].float()
    texts = [Path(path).name for path in run.text_paths]
    return {"name": name, "text_name": ", ".join(texts), "prompt": run.prompt,
            "beginnings": run.beginnings, "step": run.step, "total_steps": run.total_steps,
            "parameters": story_llm.count_parameters(model),
            "config": asdict(run.config),
            "settings": describe_settings(run.config) + describe_settings(run.train_config),
            "history": [asdict(evaluation) for evaluation in run.history],
            "tokenizer": describe_tokenizer(run.tokenizer),
            "check": {"ids": ids.tolist(), "logits": as_base64(logits)},
            "weights": {name: pack(weight) for name, weight in weights_to_store(model).items()}}

def check_size(n_bytes):
    check(n_bytes <= MAX_BYTES, f"the page would have {n_bytes / 1e6:,.0f} MB, and browsers become "
          f"slow above {MAX_BYTES / 1e6:.0f}: train a smaller model, or one with fewer tokens")

def make_page(run, name="story_llm.pt"):
    """Return the page of a run; `name` is what the page calls it. Raises StoryError if the page
    would be too large."""
    matrices = sum(weight.numel() for weight in weights_to_store(run.model).values())
    check_size(matrices * 2 * 4 // 3)       # two bytes each, and base64 makes four of three
    # A story is data and must stay data. JSON escapes everything that is not ASCII, and without
    # any "<" in it, nothing in it can end the element in which it stands.
    described = describe_run(run, name)
    data = json.dumps(described, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):         # the browser runs these two and no others
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest())
        page = page.replace(f"{tag.upper()}_HASH", f"sha256-{digest.decode('ascii')}")
    before, after = page.split("PAGE_DATA")
    page = before + data + after
    check_size(len(page))
    return page

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def run_command(argv):
    parser = argparse.ArgumentParser(prog="explore.py",
                                     description=(__doc__ or "").partition("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("page", help="the HTML file to write")
    parser.add_argument("--model", default="story_llm.pt",
                        help="the checkpoint (default: story_llm.pt)")
    args = parser.parse_args(argv)
    story_llm.check_writable(args.page, (".html", ".htm"))
    run = story_llm.load_checkpoint(args.model)
    page = make_page(run, Path(args.model).name)
    try:
        Path(args.page).write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise StoryError(f"{args.page} could not be written ({error.strerror})") from None
    log(f"wrote {args.page}: {len(page) / 1e6:.1f} MB. Open it in a browser")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
