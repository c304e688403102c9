"""A library in place of a story: a text of any size, for a model that shall learn the language.

    python extras/library.py tokenize --text library.txt --out library.bin
    python extras/library.py train --data library.bin --preset gpt2-small --max-steps 10000
    python story_llm.py generate --prompt "Once upon a time"

Gigabytes of text have no place in memory as a list of tokens. So `tokenize` goes through them once,
block by block, and writes the token ids to a file: two bytes each (four if the vocabulary has more
than 65,536 entries) and nothing else, as nanoGPT's train.bin. library.bin.json, beside it, says by
which tokenizer. `train` maps that file into memory: the disk is read where a window is taken.
"""
import argparse
import array
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # there stands story_llm.py
import story_llm
from story_llm import check, log

BLOCK = 1 << 20         # characters that are read and encoded in one go
DTYPES = {"uint16": ("H", torch.uint16), "uint32": ("I", torch.uint32)}     # array's names, torch's

# Both split patterns of story_llm begin a new piece at the last white space before a word. So a
# text can be cut there, and its tokens stay as they are. (`.+`: as late in the text as can be.)
CUT = re.compile(r".+(?=[ \n\t\u3000]\S)", re.DOTALL)

def text_blocks(file, size):
    """The text of an open file in blocks of about `size` characters, cut between words. A block
    without such a place is cut at its end: a token or two may be others there than in the whole."""
    rest = ""
    more = file.read(size)
    while more:
        rest += more
        found = CUT.match(rest)
        end = found.end() if found else len(rest)
        yield rest[:end]
        rest = rest[end:]
        more = file.read(size)
    yield rest

def tokenize(text, out, kind="gpt2", vocab_size=2048):
    """Write the token ids of the UTF-8 file `text` to `out`, and what they are to `out`.json;
    returns their number. The memory that it takes does not grow with the text. "gpt2" is GPT-2's
    whole vocabulary, "story" one of `vocab_size` entries, learned from the text's beginning.
    Raises OSError or ValueError if that cannot be done; an old `out` remains then."""
    story_llm.check_writable(out, (".bin",))
    check(Path(text).is_file(), f"{text} is not a file: give a text file with --text")
    check(Path(text).resolve() != Path(out).resolve(), f"--text and --out are both {text}")
    temporary = Path(f"{out}.tmp")
    digest = hashlib.sha256()
    count = 0
    try:
        with open(text, encoding="utf-8-sig") as text_file, open(temporary, "wb") as ids_file:
            beginning = text_file.read(story_llm.LEARN_FROM)
            check(beginning.strip(), f"{text} is empty: there is nothing to tokenize")
            tokenizer = story_llm.make_tokenizer(kind, beginning, "", vocab_size, full_vocab=True)
            dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
            text_file.seek(0)
            for block in text_blocks(text_file, BLOCK):
                token_ids = array.array(DTYPES[dtype][0], tokenizer.encode(block))
                ids_file.write(token_ids)
                digest.update(token_ids)
                count += len(token_ids)
                if sys.stderr.isatty():     # a line that the next one replaces
                    log(f"{count:,} tokens", sys.stderr, end="\x1b[K\r")
        about = {"dtype": dtype, "sha256": digest.hexdigest(),
                 "tokenizer": story_llm.tokenizer_state(tokenizer)}
        Path(f"{out}.json").write_text(json.dumps(about))
        temporary.replace(out)      # last: a file of that name is whole
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text ({error.reason}). Convert it first, for "
                         f"example: iconv -f WINDOWS-1252 -t UTF-8 {text} > utf8.txt") from None
    finally:
        temporary.unlink(missing_ok=True)
    return count

def read_library(path):
    """(tokenizer, token ids (N,) mapped from the disk, their SHA-256) of what `tokenize` wrote.
    Raises OSError or ValueError if a file is missing or damaged, or if the two do not fit."""
    for name in (path, f"{path}.json"):
        check(Path(name).is_file(), f"there is no {name}: it is made by library.py tokenize")
    try:
        about = json.loads(Path(f"{path}.json").read_text())
        tokenizer = story_llm.tokenizer_from(about["tokenizer"])
        dtype = DTYPES[about["dtype"]][1]
        expected = about["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}.json does not describe a file of tokens ({error})") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        count = file.tell() // dtype.itemsize
    check(digest == expected and count > 0, f"{path} and {path}.json do not fit: tokenize again")
    token_ids = torch.from_file(str(path), size=count, dtype=dtype)
    largest = max(part.long().max().item() for part in token_ids.split(BLOCK))
    check(largest < tokenizer.vocab_size, f"{path} has the token {largest}, which its tokenizer "
          f"does not know, with its {tokenizer.vocab_size} entries: tokenize again")
    return tokenizer, token_ids, digest

def library_corpus(path, val_fraction, context_length):
    """A library as a corpus; its end is kept for validation, if that fills a window. It is without
    its text: so no openings can be practised, and no recall can be measured."""
    tokenizer, token_ids, digest = read_library(path)
    n_val = int(len(token_ids) * val_fraction)
    if n_val <= context_length:
        n_val = 0
    n_train = len(token_ids) - n_val
    return story_llm.Corpus(tokenizer, "", token_ids[:n_train], token_ids[n_train:],
                            fingerprint=f"{digest} {n_train}")

def saved_run(path, asked):
    """The run saved at `path`, to go on with for as long as `asked`, a new run, would. Raises
    ValueError if it was begun with another library, or with other settings."""
    run = story_llm.load_checkpoint(path, asked.model.tok_emb.weight.device.type)
    check(run.fingerprint == asked.fingerprint, f"{path} was begun with another library: give the "
          "same --data as then, or train anew without --resume")
    may_change = {name: getattr(asked.train_config, name) for name in story_llm.MAY_CHANGE}
    run.train_config = replace(run.train_config, **may_change)
    run.total_steps = asked.total_steps
    same = run.config == asked.config and run.train_config == asked.train_config
    check(same, f"{path} was begun with other settings: give the same options as then, or train "
          "anew without --resume")
    return run

def train(args):
    """Train as `story_llm.train` does, on the library at `args.data`."""
    story_llm.check_writable(args.model)
    config = story_llm.chosen(story_llm.PRESETS[args.preset], args)
    once = story_llm.TrainConfig(epochs=1, openings=0.0)      # a library is read once, usually
    train_config = story_llm.chosen(once, args)
    corpus = library_corpus(args.data, train_config.val_fraction, config.context_length)
    run = story_llm.new_run(corpus, config, train_config, args.device)
    if args.resume:
        run = saved_run(args.model, run)
    run.prompt = args.given.get("prompt", run.prompt)
    log(f"{len(corpus.train_ids):,} tokens to train on, {len(corpus.val_ids):,} for validation; "
        f"{story_llm.count_parameters(run.model):,} parameters; {run.total_steps} steps of "
        f"{run.train_config.batch_size} windows of {run.config.context_length} tokens")
    with story_llm.Progress(args.model) as progress:
        story_llm.train(run, corpus, progress)
    log(f"saved {args.model} after step {run.step} of {run.total_steps}")
    if run.step < run.total_steps:
        story_llm.note("stopped; to go on: the same command with --resume")
        raise KeyboardInterrupt

def parse(argv):
    """The command line as a namespace, with `given`: what of it was really given."""
    parser = argparse.ArgumentParser(prog="library.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    command = commands.add_parser("tokenize", help="make a file of token ids", allow_abbrev=False)
    command.add_argument("--text", required=True, help="a UTF-8 text file")
    command.add_argument("--out", default="library.bin", help="the file to write (library.bin)")
    command.add_argument("--tokenizer", choices=("gpt2", "story"), default="gpt2",
                         help="GPT-2's, or one that is learned from the text (gpt2)")
    story_llm.add_option(command, "vocab_size")
    command = commands.add_parser("train", help="train on a file of token ids", allow_abbrev=False)
    command.add_argument("--data", default="library.bin", help="the file of ids (library.bin)")
    options = f"preset {story_llm.SHAPE} {story_llm.TRAINING} prompt model resume device".split()
    options.remove("openings")      # these are made of the text
    for name in options:
        story_llm.add_option(command, name)
    given = vars(parser.parse_args(argv))
    return argparse.Namespace(**{**story_llm.USUAL, **given, "given": given})

def main(argv=None):
    """Run the program; returns the exit status, as story_llm's."""
    return story_llm.exit_status(run_command, argv)

def run_command(argv):
    args = parse(argv)
    if args.command == "train":
        return train(args)
    check(args.tokenizer == "story" or "vocab_size" not in args.given,
          "--vocab-size is for --tokenizer story: GPT-2's vocabulary is kept whole")
    count = tokenize(args.text, args.out, args.tokenizer, args.vocab_size)
    log(f"wrote {args.out}: {count:,} tokens")

if __name__ == "__main__":
    story_llm.keep_memory()
    sys.exit(main())
