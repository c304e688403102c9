"""Train on a text of any size, such as a whole library.

    python extras/library.py tokenize --text library.txt --out library.bin
    python extras/library.py train --data library.bin --preset gpt2-small --max-steps 10000
    python story_llm.py generate --prompt "Once upon a time"

story_llm.py keeps its text and all its tokens in memory. Gigabytes of text do not fit there. So
`tokenize` reads the text once, in blocks, and writes the token ids to a file. Each id takes two
bytes, or four if the vocabulary has more than 65,536 tokens, and the file contains nothing else.
This is the format of nanoGPT's train.bin. The tokenizer and a checksum are in library.bin.json,
next to it. `train` maps the file into memory, so that only the windows of the current batch are
read from the disk.
"""
import argparse
import array
import codecs
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm        # before torch, whose threads it tells to sleep when they wait
from story_llm import StoryError, check, log
import torch

BLOCK = 1 << 20         # characters that are read and encoded at a time
DTYPES = {"uint16": ("H", torch.uint16), "uint32": ("I", torch.uint32)}     # for array, for torch

# ─── From a text to a file of token ids ────────────────────────────────────────────────────────
# A text may be cut in front of the last white space before a word, because both split patterns of
# story_llm start a new word there. The tokens of the two parts are then the tokens of the whole.
# (`.+` is greedy, so the cut is as late in the block as possible.)
CUT = re.compile(r".+(?=[ \n\t\u3000]\S)", re.DOTALL)

def find_encoding(path):
    with open(path, "rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"

def read_blocks(path, size):
    """Yield a text file in blocks of about `size` characters that are cut between words. A block
    without a space is cut at its end, where a few tokens may differ from those of the whole text.
    The file is read as UTF-8, or as UTF-16 if it begins with its mark. Raises StoryError if it
    cannot be read or is not text."""
    try:
        with open(path, encoding=find_encoding(path)) as file:
            rest = ""
            for new in iter(lambda: file.read(size), ""):
                check("\0" not in new, f"{path} contains zeros, so it is not plain text in UTF-8: "
                      "if it is UTF-16 without a mark, convert it to UTF-8 first")
                rest += new
                if len(new) == size:        # at the end of the file, it is shorter
                    cut = CUT.match(rest)
                    end = cut.end() if cut else len(rest)
                    yield rest[:end]
                    rest = rest[end:]
            yield rest
    except UnicodeDecodeError as error:
        raise StoryError(f"{path} is not {error.encoding.upper()} text ({error.reason}): convert "
                         "it first. For Western European text from Windows: iconv -f WINDOWS-1252 "
                         f"-t UTF-8 {path} > utf8.txt") from None
    except OSError as error:
        raise StoryError(f"{path} cannot be read ({error.strerror}): give a text file with "
                         "--text") from None

def tokenize(text, out, kind="gpt2", vocab_size=2048):
    """Write the token ids of the text file `text` to `out`, and the tokenizer to `out`.json. Return
    the number of tokens. The tokenizer "gpt2" has all of GPT-2's tokens, and "story" has
    `vocab_size` tokens and is trained on the beginning of the text. The memory that this takes does
    not grow with the text. Raises StoryError if it fails; existing files are kept in that case."""
    story_llm.check_writable(out, (".bin",))
    check(Path(text).is_file(), f"{text} is not a file: give a text file with --text")
    paths = [story_llm.check_file_path(path) for path in (out, f"{out}.json")]
    check(Path(text).resolve() not in paths, f"--text and --out are the same file, {text}")
    beginning = next(read_blocks(text, story_llm.MAX_BPE_CHARS))
    check(beginning.strip(), f"{text} is empty: give a text file that contains words")
    if kind == "gpt2":
        tokenizer = story_llm.BPETokenizer(story_llm.gpt2_tokens(), kind)
    else:
        tokenizer = story_llm.make_tokenizer(kind, beginning, vocab_size=vocab_size)
    new_ids, new_about = temporary = [story_llm.temporary_path(path) for path in paths]
    try:
        about, count = write_ids(text, tokenizer, new_ids)
        new_about.write_text(json.dumps(about), encoding="utf-8")
        for path, new in zip(paths, temporary):
            if path.exists():
                shutil.copymode(path, new)
            os.replace(new, path)
    except OSError as error:
        raise StoryError(f"{out} could not be written ({error.strerror}): make room, or give "
                         "another --out") from None
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink()           # after a failure; else it has been renamed
    return count

def write_ids(text, tokenizer, path):
    """Write the token ids of a text to a file. Return (what the .json file says about them, the
    number of tokens)."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    digest = hashlib.sha256()
    count = 0
    with open(path, "wb") as file:
        for block in read_blocks(text, BLOCK):
            token_ids = array.array(DTYPES[dtype][0], tokenizer.encode(block))
            file.write(token_ids)
            digest.update(token_ids)
            count += len(token_ids)
            if sys.stderr.isatty():     # a line that the next one overwrites
                log(f"{count:,} tokens", sys.stderr, end="\x1b[K\r")
    tokens = [token.decode("latin-1") for token in tokenizer.tokens]    # a character per byte
    return {"dtype": dtype, "sha256": digest.hexdigest(),
            "tokenizer": {"kind": tokenizer.kind, "tokens": tokens}}, count

# ─── From the file to a corpus ─────────────────────────────────────────────────────────────────
def read_library(path):
    """Return what `tokenize` wrote: (the tokenizer, the token ids (N,), their SHA-256). The ids
    stay on the disk. Raises StoryError if one of the two files is missing or damaged, or if they do
    not belong together."""
    about_path = f"{path}.json"
    for file_path in (path, about_path):
        story_llm.check_file_path(file_path)
    try:
        about = json.loads(Path(about_path).read_text(encoding="utf-8"))
        tokens = [token.encode("latin-1") for token in about["tokenizer"]["tokens"]]
        tokenizer = story_llm.restore_tokenizer(about["tokenizer"]["kind"], tokens)
        dtype = DTYPES[about["dtype"]][1]
        expected = about["sha256"]
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            count = file.tell() // dtype.itemsize
    except OSError as error:
        raise StoryError(f"{error.filename} cannot be read ({error.strerror}): `library.py "
                         "tokenize` makes this file") from None
    except Exception as error:      # the file may come from anywhere
        raise StoryError(f"{about_path} does not describe a file of token ids: run `library.py "
                         "tokenize` again") from error
    check(digest == expected and count > 0, f"{path} and {about_path} do not belong together, or "
          "one of them is damaged: run `library.py tokenize` again")
    token_ids = torch.from_file(str(path), size=count, dtype=dtype)
    highest = max(part.long().max().item() for part in token_ids.split(BLOCK))
    check(highest < tokenizer.vocab_size, f"{path} contains the token id {highest}, but its "
          f"tokenizer has only {tokenizer.vocab_size} tokens: run `library.py tokenize` again")
    return tokenizer, token_ids, digest

def library_corpus(path, val_fraction, context_length):
    """Return the corpus of a file of token ids. The end of the file is the validation split. The
    corpus has no text, so it has no prompt windows, and its recall cannot be measured. Raises
    StoryError if the training split does not fill a window."""
    tokenizer, token_ids, digest = read_library(path)
    n_train = len(token_ids) - int(len(token_ids) * val_fraction)
    check(n_train > context_length, f"{path} has {n_train:,} tokens for training, too few for a "
          f"window of {context_length} tokens: give a longer text or a smaller --context-length")
    return story_llm.Corpus("", tokenizer, "", train_ids=token_ids[:n_train],
                            val_ids=token_ids[n_train:], fingerprint=f"{digest} {n_train}")

# ─── Training ──────────────────────────────────────────────────────────────────────────────────
# By default, a library is read once, and without its text there are no prompt windows. The command
# line refuses what would be ignored, because it is not in SETTINGS. The presets novel and writer
# choose a tokenizer, which a library already has.
PRESETS = ("story", "gpt2-small")
DEFAULTS = {"epochs": 1, "prompt_windows": 0.0}
SETTINGS = [name for cls in (story_llm.GPTConfig, story_llm.TrainConfig)
            for name in story_llm.names_of(cls) if name not in ("vocab_size", *DEFAULTS)
            if name == "val_fraction" or name not in story_llm.SPLIT]
RESUME_OPTIONS = ("data", "model", "resume", "epochs", "max_steps", "eval_every", "device")

def new_run(args):
    """Return (an untrained run, its corpus)."""
    preset = story_llm.preset_settings(args.given.get("preset", "story"), n_bytes=0)
    settings = {**preset, **DEFAULTS, **args.given}
    config = story_llm.override_settings(story_llm.GPTConfig(), settings)
    train_config = story_llm.override_settings(story_llm.TrainConfig(), settings)
    corpus = library_corpus(args.data, train_config.val_fraction, config.context_length)
    run = story_llm.new_run(corpus, config, train_config, args.device)
    run.prompt = args.given.get("prompt", run.prompt)
    return run, corpus

def resume_run(args):
    """Return (the saved run, its corpus). All settings come from the checkpoint, except those that
    decide how long to train."""
    others = sorted(args.given.keys() - set(RESUME_OPTIONS))
    story_llm.refuse_options(args, others, "cannot be combined with --resume, because the "
                             "checkpoint determines it")
    run = story_llm.load_checkpoint(args.model, args.device)
    corpus = library_corpus(args.data, run.train_config.val_fraction, run.config.context_length)
    check(corpus.fingerprint == run.fingerprint, f"{args.model} was not trained on {args.data}, "
          "but on a different text: give that text with --data, or train a new model without "
          "--resume")
    story_llm.change_length(run, args)
    check(run.step < run.total_steps, f"{args.model} has already been trained for {run.step} "
          "steps: set a larger --epochs or --max-steps")
    return run, corpus

def command_train(args):
    story_llm.check_writable(args.model)
    check(os.path.realpath(args.model) != os.path.realpath(args.data), "--model and --data are "
          f"the same file, {args.data}")
    run, corpus = resume_run(args) if args.resume else new_run(args)
    log(f"{len(corpus.train_ids):,} tokens for training, {len(corpus.val_ids):,} for validation; "
        f"{story_llm.count_parameters(run.model):,} parameters; {run.total_steps} steps of "
        f"{run.train_config.batch_size} windows of {run.config.context_length} tokens")
    story_llm.train(run, corpus, args.model)
    log(f"saved {args.model} after step {run.step} of {run.total_steps}")
    if run.step < run.total_steps:
        command = shlex.join(["train", "--resume", "--data", args.data, "--model", args.model])
        log(f"stopped; to continue: python extras/library.py {command}", sys.stderr)
        return 130

# ─── The command line ──────────────────────────────────────────────────────────────────────────
def command_tokenize(args):
    if args.tokenizer == "gpt2":
        story_llm.refuse_options(args, ["vocab_size"], "can only be used with --tokenizer story")
    count = tokenize(args.text, args.out, args.tokenizer, args.vocab_size)
    log(f"wrote {args.out}: {count:,} tokens")

def parse(argv):
    """Parse a command line into a namespace. Its `given` contains what was really given."""
    parser = story_llm.Parser(prog="extras/library.py",
                              description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(title="commands", dest="command", required=True)

    command = commands.add_parser("tokenize", help="write the token ids of a text to a file",
                                  allow_abbrev=False)
    command.add_argument("--text", required=True, help="a text file")
    command.add_argument("--out", default="library.bin",
                         help="the file of token ids (default: library.bin)")
    command.add_argument("--tokenizer", choices=("gpt2", "story"), default="gpt2",
                         help="gpt2: all of GPT-2's tokens; story: tokens learned from the text "
                         "(default: gpt2)")
    story_llm.add_option(command, "vocab_size")

    command = commands.add_parser("train", help="train a model on a file of token ids",
                                  allow_abbrev=False)
    command.add_argument("--data", default="library.bin",
                         help="the file of token ids (default: library.bin)")
    command.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                         help="story: the small model of the lesson; gpt2-small: the shape of "
                         "GPT-2 (default: story)")
    command.add_argument("--epochs", type=int, default=argparse.SUPPRESS, metavar="N",
                         help="passes over the library (default: 1)")
    for name in (*SETTINGS, "prompt", "model", "resume", "device"):
        story_llm.add_option(command, name)

    given = vars(parser.parse_args(argv))
    handler = {"tokenize": command_tokenize, "train": command_train}[given.pop("command")]
    return story_llm.make_namespace(given, handler)

def run_command(argv):
    args = parse(argv)
    return args.handler(args)

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")      # as story_llm.py does when it runs
    story_llm.keep_freed_memory()
    sys.exit(main())
