"""The failures that the lesson describes. To show what a part of the model is for, the lesson says what happens without
it. Here these parts are removed from the source one at a time, and the default model is trained for 60 of its 180
steps."""
import types

import pytest

from helpers import PROGRAM, STORY

STEPS = 60
REMOVED = {     # {what is removed: [(source, what stands there instead)]}
    "nothing": [],
    "mask": [("    return positions > positions[S - T:, None]",
              "    return positions > positions[S - T:, None] + S")],
    "root": [("    scores = queries @ keys.transpose(-2, -1) / math.sqrt(D)",
              "    scores = queries @ keys.transpose(-2, -1)")],
    "residual": [("        x = x + self.dropout(self.att(", "        x = self.dropout(self.att("),
                 ("        x = x + self.dropout(self.ff(", "        x = self.dropout(self.ff(")]}


def changed_module(replacements):
    """Return story_llm as a module of its own, made from its source after these replacements."""
    source = PROGRAM.read_text(encoding="utf-8")
    for old, new in replacements:
        assert source.count(old) == 1, f"this must occur once in {PROGRAM.name}, not {source.count(old)} times: {old}"
        source = source.replace(old, new)
    module = types.ModuleType("changed_story_llm")
    module.__file__ = str(PROGRAM)
    exec(compile(source, str(PROGRAM), "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def trained_without(gpt2):
    """trained_without("mask") gives (the changed module, a run of the default model after 60 steps, its corpus)."""
    runs = {}

    def train(part):
        if part not in runs:
            module = changed_module(REMOVED[part])
            corpus = module.corpus_from_text(module.load_text(STORY), "gpt2")
            run = module.new_run(corpus)
            for _ in module.train(run, corpus):
                if run.step == STEPS:
                    break
            runs[part] = module, run, corpus
        return runs[part]

    return train


def loss_without(trained_without, part):
    module, run, corpus = trained_without(part)
    return module.mean_loss(run.model, corpus.train_ids)


def test_without_the_mask_the_loss_is_low_and_the_model_is_useless(trained_without):
    """It reads the next token instead of predicting it, so it cannot continue a single sentence."""
    assert loss_without(trained_without, "mask") < loss_without(trained_without, "nothing") / 3
    module, run, corpus = trained_without("mask")
    for prompt, continuation in module.recall_tests(corpus.train_text):
        generated = ""
        for piece in module.generate_text(run.model, run.tokenizer, prompt, 10):
            generated += piece
            if not continuation.startswith(generated):
                break
        else:
            pytest.fail(f"without the mask, the model continued {prompt!r} with {generated!r}")


@pytest.mark.parametrize("part, least", [("root", 0.5), ("residual", 1.5)])
def test_without_this_part_the_model_learns_much_more_slowly(part, least, trained_without):
    assert loss_without(trained_without, part) > loss_without(trained_without, "nothing") + least


def test_a_replacement_that_does_not_fit_the_source_is_noticed():
    with pytest.raises(AssertionError, match="not 0 times"):
        changed_module([("this is nowhere in the source of the program", "")])
