"""The failures that the lesson describes. To show what a part of the model is for, the lesson says what happens without
it. Here the experiments that remove these parts are done with the default model, for 60 of its 180 steps, and compared
with the loss of the unchanged model that experiments.py has recorded."""
import json
import sys

import pytest

from helpers import ROOT, STORY

sys.path.insert(0, str(ROOT / "extras"))
from experiments import EXPERIMENTS, changed_program  # noqa: E402

STEPS = 60
RECORDED = json.loads((ROOT / "extras" / "experiments.json").read_text(encoding="utf-8"))["experiments"]
UNCHANGED = RECORDED["unchanged"]["losses"][str(STEPS)]


@pytest.fixture(scope="module")
def trained_without(gpt2):
    """trained_without("no-mask") gives (the changed module, a run of the default model after 60 steps, its corpus)."""
    runs = {}

    def train(part):
        if part not in runs:
            module = changed_program(EXPERIMENTS[part].replacements)
            corpus = module.corpus_from_text(module.load_text(STORY), "gpt2")
            run = module.new_run(corpus)
            for _ in module.training_steps(run, corpus):
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
    assert loss_without(trained_without, "no-mask") < UNCHANGED / 3
    module, run, corpus = trained_without("no-mask")
    for prompt, continuation in module.recall_tests(corpus.train_text):
        generated = ""
        for piece in module.generate_text(run.model, run.tokenizer, prompt, 10):
            generated += piece
            if not continuation.startswith(generated):
                break
        else:
            pytest.fail(f"without the mask, the model continued {prompt!r} with {generated!r}")


@pytest.mark.parametrize("part, least", [("no-scaling", 0.5), ("no-residual", 1.5)])
def test_without_this_part_the_model_learns_much_more_slowly(part, least, trained_without):
    assert loss_without(trained_without, part) > UNCHANGED + least
