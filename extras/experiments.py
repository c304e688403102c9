"""Break the model on purpose, and see what each of its parts is for.

    python extras/experiments.py --list
    python extras/experiments.py no-mask
    python extras/experiments.py
    python extras/experiments.py --precision fp32 --json extras/experiments.json

The lesson in story_llm.py gives a reason for every part of the model and of its training. Here you
can test these reasons. Each experiment changes one thing, which is a line or two of the program or
a setting. (Gradient descent also gets a learning rate of its own.) It trains the changed program
and prints the results next to those of the unchanged one, with the model for a short story. Without
a name, all experiments run, one after the other. The results vary a little with the processor, and
more with --seed. With --json, everything that was measured also goes into a file, together with
two recordings of the unchanged training: how the prediction of one word grows, and what AdamW makes
of the gradients of one parameter. The figures of the lesson's page (figures.py) are drawn from it.

No file of the program is changed. The source of story_llm.py is changed in memory, and the result
is run as a module of its own. Your own experiment is one more entry in EXPERIMENTS.
"""
import contextlib
import datetime
import json
import math
import sys
import textwrap
import types
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # the folder of story_llm.py
import story_llm
from story_llm import check, log

@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A change of the program, and what came of it."""
    step: int                   # the step of the lesson that explains the part
    change: str
    shows: str                  # what we measured: Short_Story.txt, GPT-2's tokens, seed 42
    replacements: tuple = ()    # ((a text that occurs once in story_llm.py, its replacement), ...)
    settings: dict = field(default_factory=dict)        # of GPTConfig and TrainConfig

EXPERIMENTS = {
    "no-attention": Experiment(
        step=6, change="tokens exchange no information",
        shows="The loss is still 2.15, and no sentence is recited: each token is predicted from the "
              "one before it and its position.",
        replacements=(("x = x + self.dropout(self.att(self.norm1(x), cache))", "pass"),)),
    "no-feed-forward": Experiment(
        step=6, change="blocks have no feed-forward network",
        shows="The loss is 0.65 instead of 0.22, and recall is 55 %.",
        replacements=(("x = x + self.dropout(self.ff(self.norm2(x)))", "pass"),)),
    "average": Experiment(
        step=6, change="every token attends equally to all tokens up to itself",
        shows="The loss is 0.37 instead of 0.22, and yet recall is 98 %. For a short story, it is "
              "nearly enough to know which words came before.",
        replacements=(("keys.transpose(-2, -1) / math.sqrt(D)", "keys.transpose(-2, -1) * 0"),)),
    "no-scaling": Experiment(
        step=6, change="attention scores are not divided by the root of D",
        shows="The model learns far more slowly. After 180 steps the loss is 0.95 instead of "
              "0.22, and recall is 23 %.",
        replacements=((" / math.sqrt(D)", ""),)),
    "no-mask": Experiment(
        step=6, change="every token may attend to the tokens after it",
        shows="The loss falls much faster (0.36 instead of 2.04 after 60 steps), and yet the "
              "model is useless. In training it copies the next token instead of predicting it, "
              "so it cannot continue a single sentence.",
        replacements=(("scores.masked_fill(mask, -math.inf)", "scores"),)),
    "one-head": Experiment(
        step=6, change="each block has one attention head instead of four",
        shows="This makes no difference here. The loss is the same, 0.22, and another "
              "--seed changes it more. A short story can be memorized with a single head.",
        settings={"n_heads": 1}),
    "one-block": Experiment(
        step=6, change="one block instead of two",
        shows="This makes hardly any difference. The loss is 0.23, and recall is 100 %.",
        settings={"n_layers": 1}),
    "no-residual": Experiment(
        step=6, change="the output of attention and of the feed-forward network replaces x",
        shows="The model learns hardly anything. The loss is still 4.34, recall is 0 %, and the "
              "model repeats frequent words.",
        replacements=(("x + self.dropout(self.att(", "self.dropout(self.att("),
                      ("x + self.dropout(self.ff(", "self.dropout(self.ff("))),
    "no-norm": Experiment(
        step=6, change="nothing is normalized",
        shows="The model learns far more slowly. The loss is 2.23, and no sentence is recited.",
        replacements=(("nn.LayerNorm(config.emb_dim)", "nn.Identity()"),)),
    "post-norm": Experiment(
        step=6, change="norm(x + f(x)), as in the original transformer, instead of x + f(norm(x))",
        shows="The loss falls faster in the first 20 steps and more slowly from then on, down "
              "to 0.63 instead of 0.22. Recall is 74 %.",
        replacements=(("x + self.dropout(self.att(self.norm1(x), cache))",
                       "self.norm1(x + self.dropout(self.att(x, cache)))"),
                      ("x + self.dropout(self.ff(self.norm2(x)))",
                       "self.norm2(x + self.dropout(self.ff(x)))"))),
    "no-positions": Experiment(
        step=6, change="the positional embedding is not added to the token embedding",
        shows="The loss falls faster at first (1.31 instead of 2.04 after 60 steps), and "
              "recall is still 99 %. This story can be memorized without positional embeddings.",
        replacements=((" + self.pos_emb(positions)", ""),)),
    "gradient-descent": Experiment(
        step=10, change="plain gradient descent instead of AdamW",
        shows="The loss is 3.06, and no sentence is recited, even with a learning rate of 1.0, "
              "the best of those that we tried. It is 3.98 with 0.3, 4.98 with 3, and 7.25 "
              "with the 0.0025 of AdamW.",
        replacements=(("p.addcdiv_(m, usual_size, value=-lr / (1 - beta1 ** self.n_steps))",
                       "p.sub_(lr * p.grad)"),),
        settings={"learning_rate": 1.0}),
    "high-learning-rate": Experiment(
        step=10, change="a learning rate ten times as high",
        shows="The loss is still 4.15, and no sentence is recited.",
        settings={"learning_rate": 0.025}),
    "no-warm-up": Experiment(
        step=10, change="the learning rate is at its peak from the first step on",
        shows="The model learns a little more slowly. The loss is 0.30 instead of 0.22, but "
              "recall is still 100 %.",
        settings={"warmup_steps": 0}),
    "no-clipping": Experiment(
        step=10, change="gradients are not clipped",
        shows="The model learns more slowly (2.55 instead of 2.04 after 60 steps), down to 0.32 "
              "instead of 0.22. Recall is still 100 %.",
        settings={"grad_clip": 1e9}),
    "no-prompt-windows": Experiment(
        step=10, change="all windows are sliding windows, and none starts where a prompt would",
        shows="The loss is lower (0.16 instead of 0.22), and yet recall is 94 % instead of "
              "100 %. The model knows the text even better, but not in the form of a prompt.",
        settings={"prompt_windows": 0.0})}

# AdamW's averages are recorded for this number: (the name of a parameter, an index)
RECORDED_PARAMETER = ("trf_blocks.1.ff.project.bias", (1,))

# ─── Change and train ──────────────────────────────────────────────────────────────────────────
def read_program():
    return Path(story_llm.__file__).read_text(encoding="utf-8")

def changed_program(replacements):
    """Return story_llm as a module of its own, made from its source after these replacements.
    Raises StoryError if a text to be replaced does not occur exactly once."""
    source = read_program()
    for old, new in replacements:
        count = source.count(old)
        check(count == 1, f"story_llm.py contains {old!r} {count} times and not once, so it is not "
              "clear what to replace: adapt the replacement in EXPERIMENTS")
        source = source.replace(old, new)
    program = types.ModuleType("changed_story_llm")
    sys.modules[program.__name__] = program     # where dataclasses look for the names of types
    program.__file__ = story_llm.__file__
    exec(compile(source, story_llm.__file__, "exec"), program.__dict__)
    return program

def train_changed(corpus, replacements=(), settings=None, prompt=None):
    """Train the program on a corpus after these changes, on the CPU. Return (its losses on the
    training split at every evaluation, as {step: loss}; its recall, or None if the text has no long
    sentence; what it writes after the prompt). If training stopped early, because the loss of a
    batch was no longer finite, the last loss is NaN."""
    program = changed_program(replacements)
    config, train_config = [program.override_settings(part, settings or {})
                            for part in (program.GPTConfig(), program.TrainConfig())]
    run = program.new_run(corpus, config, train_config)
    every = {"eval_every": ninth(run.total_steps)}      # evaluations do not change the training
    run.train_config = program.override_settings(train_config, every)
    with contextlib.suppress(program.StoryError):       # raised when the loss is not finite
        for _ in program.training_steps(run, corpus):
            pass
    losses = {evaluation.step: evaluation.train_loss for evaluation in run.history}
    losses.setdefault(run.total_steps, math.nan)
    prompt = prompt or run.prompt
    ids = torch.tensor([run.tokenizer.encode(prompt)])
    sample = run.tokenizer.decode(write(program, run, ids, 20)[0, ids.shape[1]:].tolist())
    return losses, written_recall(program, run, corpus.train_text), f"{prompt} ...{sample}"

def ninth(total_steps):
    """A ninth of the steps of a training: 20 of 180."""
    return max(total_steps // 9, 1)

def write(program, run, ids, n_tokens):
    """Append tokens to ids (B, T) as in step 8, where the model sees the whole text each time. (The
    cache of step 13 relies on the causal mask.)"""
    return program.generate_text_simple(run.model, ids, n_tokens, run.config.context_length)

def written_recall(program, run, text):
    """Measure recall by letting the model write. `measure_recall` is faster, but it shows the right
    continuation to the model, and a model without the mask copies from it."""
    rows_by_length = defaultdict(list)      # prompts of equal length can be continued as a batch
    for prompt, continuation in program.recall_tests(text):
        prompt_ids = run.tokenizer.encode(prompt)
        row = prompt_ids + run.tokenizer.encode(continuation)
        rows_by_length[len(prompt_ids)].append(row)
    hits = []
    for length, rows in rows_by_length.items():
        prompts = torch.tensor([row[:length] for row in rows])
        written = write(program, run, prompts, max(map(len, rows)) - length).tolist()
        hits += [ids[:len(row)] == row for ids, row in zip(written, rows)]
    return sum(hits) / len(hits) if hits else None

# ─── Record ────────────────────────────────────────────────────────────────────────────────────
def next_probabilities(run, prompt):
    """How probable the model finds each token of the vocabulary after a prompt: (V,)."""
    ids = torch.tensor([run.tokenizer.encode(prompt)], device=story_llm.device_of(run.model))
    with torch.no_grad():
        return run.model(ids)[0, -1].softmax(dim=-1).cpu()

def without_last_word(prompt):
    """What comes before the last word of a prompt, so that the model has to predict this word."""
    return prompt.rpartition(" ")[0] or prompt

def record_prediction(run, corpus, prompt, every=5, n_best=3):
    """Train a run to its end, and follow what it predicts after a prompt. Return {"prompt",
    "steps", "tokens"}; "tokens" has the probabilities, one for each of the steps, of all tokens
    that were ever among the `n_best` most probable."""
    rows = {run.step: next_probabilities(run, prompt)}
    for _ in story_llm.training_steps(run, corpus):
        if run.step % every == 0 or run.step == run.total_steps:
            rows[run.step] = next_probabilities(run, prompt)
    probabilities = torch.stack(list(rows.values()))                # (steps, V)
    best = probabilities.topk(n_best).indices.flatten().unique()
    names = story_llm.token_names(run.tokenizer, best.tolist())
    tokens = dict(zip(names, probabilities[:, best].T.tolist()))
    return {"prompt": prompt, "steps": list(rows), "tokens": tokens}

def record_averages(run, corpus, name, index, n_steps=50):
    """Train a run for some steps, and note for one number of the parameter `name` its gradient and
    AdamW's averages. Return {"parameter", "index", "gradients", "m", "v"}."""
    gradients, first, second = [], [], []
    for _ in islice(story_llm.training_steps(run, corpus), n_steps):
        m, v = run.optimizer.averages[name]
        gradients.append(run.model.get_parameter(name).grad[index].item())
        first.append(m[index].item())
        second.append(v[index].item())
    return {"parameter": name, "index": list(index), "gradients": gradients,
            "m": first, "v": second}

def rounded(value, digits=4):
    """Round every number in nested lists and dictionaries to significant digits. (JSON knows no
    NaN, so it becomes null.)"""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value

def make_record(corpus, settings, results, prompt):
    """All that was measured, with two recordings of the unchanged training, in values that JSON can
    express."""
    config = story_llm.TrainConfig(**settings)

    def new_run():
        return story_llm.new_run(corpus, train_config=config)

    measured = {name: dict(zip(("losses", "recall", "sample"), result))
                for name, result in results.items()}
    return rounded({
        "measured": datetime.date.today().isoformat(), "torch": torch.__version__,
        "fingerprint": corpus.fingerprint, "tokenizer": corpus.tokenizer.kind,
        "settings": asdict(config), "experiments": measured,
        "prediction": record_prediction(new_run(), corpus, without_last_word(prompt)),
        "averages": record_averages(new_run(), corpus, *RECORDED_PARAMETER)})

# ─── Print ─────────────────────────────────────────────────────────────────────────────────────
def log_description(name):
    """Print what an experiment changes, as lines of the program and settings, and what it shows."""
    experiment = EXPERIMENTS[name]
    log(f"{name} (step {experiment.step}): {experiment.change}")
    code = [line.split("  #")[0].strip() for line in read_program().splitlines()]
    for old, new in experiment.replacements:
        for line in code:
            if old in line:
                log(f"    - {line}\n    + {line.replace(old, new)}")
    for setting, value in experiment.settings.items():
        log(f"    - {setting} = {story_llm.FIELDS[setting].default}\n    + {setting} = {value}")
    log(textwrap.fill(experiment.shows, 96, initial_indent="  ", subsequent_indent="  ") + "\n")

def log_results(results):
    """Print a table of {name: what `train_changed` returned}."""
    total = max(step for losses, _, _ in results.values() for step in losses)
    steps = sorted({min(step, total) for step in (ninth(total), 3 * ninth(total), total)})
    log(f"  {'loss after step':<20}" + "".join(f"{step:>8}" for step in steps) + "    recall")
    for name, (losses, recall, sample) in results.items():
        shown = "none" if recall is None else f"{recall:.1%}"
        columns = "".join(f"{losses.get(step, math.nan):8.3f}" for step in steps)
        log(f"  {name:<20}{columns}{shown:>10}")
        log("    " + " ".join(sample.split()))
    log()

def run_command(argv):
    parser = story_llm.Parser(prog="extras/experiments.py", allow_abbrev=False,
                              description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", help="an experiment (default: all of them)")
    parser.add_argument("--list", action="store_true", help="say what each experiment shows")
    parser.add_argument("--json", metavar="FILE", help="also write all that was measured as JSON")
    for name in ("text", "max_steps", "precision", "seed"):
        story_llm.add_option(parser, name)
    given = vars(parser.parse_args(argv))       # of the options added above, only those typed
    name, only_list, path = given.pop("name"), given.pop("list"), given.pop("json")
    check(name is None or name in EXPERIMENTS, f"there is no experiment {name!r}: choose one of "
          + ", ".join(EXPERIMENTS))
    names = list(EXPERIMENTS) if name is None else [name]
    if only_list:
        check(not given and path is None,
              "--list trains nothing, so it cannot be combined with another option")
        for name in names:
            log_description(name)
        return
    if path is not None:
        check(name is None, "--json records all experiments, so it cannot be combined with a name")
        story_llm.check_writable(path, (".json",))
    prompt = None if "text" in given else story_llm.DEFAULT_PROMPT
    text = story_llm.load_text(given.pop("text", story_llm.DEFAULT_TEXT))
    corpus = story_llm.corpus_from_text(text)
    run = story_llm.new_run(corpus, train_config=story_llm.TrainConfig(**given))
    settings = {**given, "max_steps": run.total_steps}      # the same for every experiment
    log(f"{corpus.tokenizer.kind} tokenizer, {run.total_steps} steps. (The texts below say what we "
        "measured with Short_Story.txt, GPT-2's tokens and 180 steps.)\n")
    log("training the unchanged program ...", sys.stderr)
    results = {"unchanged": train_changed(corpus, (), settings, prompt)}
    for name in names:
        log_description(name)
        log(f"training {name} ...", sys.stderr)
        experiment = EXPERIMENTS[name]
        results[name] = train_changed(corpus, experiment.replacements,
                                      {**settings, **experiment.settings}, prompt)
        log_results({"unchanged": results["unchanged"], name: results[name]})
    if path is not None:
        log("recording how a prediction grows, and AdamW's averages ...", sys.stderr)
        record = make_record(corpus, settings, results, prompt or run.prompt)
        lines = json.dumps(record, ensure_ascii=True, allow_nan=False, indent=1)
        Path(path).write_text(lines + "\n", encoding="utf-8", newline="\n")
        log(f"wrote {path}")

def main(argv=None):
    """Run the program with the words of a command line; return the exit status."""
    return story_llm.exit_status(run_command, sys.argv[1:] if argv is None else argv)

if __name__ == "__main__":
    sys.exit(main())
