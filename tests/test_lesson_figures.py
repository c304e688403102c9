"""The figures that the lesson quotes of the untrained and of the trained model, each computed here in another way, and
those of the experiments, which experiments.py has recorded."""
import json
import math
import re
from collections import Counter

import pytest
import torch

import story_llm
from helpers import ROOT, STORY
from story_llm import SlidingWindowDataset, attention_maps, load_checkpoint, token_names

LESSON = (ROOT / "story_llm.py").read_text(encoding="utf-8").partition("# ═══ Workshop")[0]
PROSE = re.sub(r"\s+", " ", re.sub(r"\n\s*# ?", "\n", LESSON))


def quoted(pattern):
    """The numbers that the groups of a pattern match in the lesson, which has it exactly once."""
    found = re.findall(pattern, PROSE)
    assert len(found) == 1, (pattern, found)
    groups = found[0] if isinstance(found[0], tuple) else found
    return [float(number.replace(",", "")) for number in groups]


@pytest.fixture(scope="module")
def trained(gpt2, trained_with_defaults):
    """(the run that `train` saved, its corpus)"""
    run = load_checkpoint(trained_with_defaults[0] / "story_llm.pt")
    return run, story_llm.corpus_from_text(story_llm.load_text(STORY), run.tokenizer)


@pytest.fixture(scope="module")
def his(trained):
    """(the token ids of "Once Aadhan renounced his", the id of " kingdom")"""
    encode = trained[0].tokenizer.encode
    return torch.tensor([encode("Once Aadhan renounced his")]), encode(" kingdom")[0]


def end_to_end(token_ids):
    """(inputs, targets), each (windows, 32), that lie end to end"""
    windows = SlidingWindowDataset(token_ids, 32, 32)
    return windows[torch.arange(len(windows))]


def losses(run, token_ids):
    inputs, targets = end_to_end(token_ids)
    with torch.no_grad():
        probabilities = run.model(inputs).softmax(dim=-1)
    return -probabilities.gather(-1, targets[..., None])[..., 0].log(), targets


def test_the_attention_of_his_before_and_after_training(trained, his):
    run, _ = trained
    names = [name.strip("␣") for name in token_names(run.tokenizer, his[0][0].tolist())]
    number = r"(\d\.\d\d) "
    rows = [number * 6] * 4
    shown = quoted(" ".join(names) + " head 3 before {}after {}most on Aad head 4 before {}after {}".format(*rows))
    before = attention_maps(story_llm.new_model(run.config, seed=42), his[0])[0, :, -1]
    after = attention_maps(run.model, his[0])[0, :, -1]
    expected = torch.cat([before[2], after[2], before[3], after[3]])
    assert shown == pytest.approx(expected.tolist(), abs=0.03)


def test_kingdom_becomes_less_probable_when_one_head_may_not_attend_to_one_token(trained, his, monkeypatch):
    run, _ = trained
    attention_weights = story_llm.attention_weights
    names = [name.strip("␣") for name in token_names(run.tokenizer, his[0][0].tolist())]

    def kingdom():
        with torch.no_grad():
            return 100 * run.model(his[0])[0, -1].softmax(dim=-1)[his[1]].item()

    def kingdom_without(head, token):
        calls = []

        def forbid(queries, keys, mask):
            calls.append(mask)
            masks = mask.repeat(run.config.n_heads, 1, 1)
            masks[head, -1, names.index(token)] |= len(calls) == 1         # in the first block only
            return attention_weights(queries, keys, masks)

        with monkeypatch.context() as patch:
            patch.setattr(story_llm, "attention_weights", forbid)
            return kingdom()

    def kingdom_with_equal_attention():
        calls = []

        def equal(queries, keys, mask):
            calls.append(mask)
            return attention_weights(0 * queries if len(calls) == 1 else queries, keys, mask)

        with monkeypatch.context() as patch:
            patch.setattr(story_llm, "attention_weights", equal)
            return kingdom()

    shown = quoted(r'if all four heads of this block averaged equally, "kingdom" would still have (\d+)%')
    assert shown == pytest.approx([kingdom_with_equal_attention()], abs=4)
    shown = quoted(r'falls from (\d+)% to (\d+)%, and if head 4 may not attend to "ounced", to (\d+)%')
    assert shown == pytest.approx([kingdom(), kingdom_without(2, "Aad"), kingdom_without(3, "ounced")], abs=4)


def test_the_logit_lens(trained, his):
    model = trained[0].model
    with torch.no_grad():
        x = model.tok_emb(his[0]) + model.pos_emb(torch.arange(his[0].shape[1]))
        stream = [x]
        for block in model.trf_blocks:
            stream.append(stream[-1] + block.att(block.norm1(stream[-1])))
            stream.append(stream[-1] + block.ff(block.norm2(stream[-1])))
        seen = [100 * model.out_head(model.final_norm(x))[0, -1].softmax(dim=-1)[his[1]].item() for x in stream]
    assert quoted(r"feed-forward 2 (\d+)% (\d+)% (\d+)% (\d+)% (\d+)%") == pytest.approx(seen, abs=6)


def test_the_scores_of_the_untrained_model(trained, monkeypatch):
    """Their standard deviation, and the largest attention weight of the last of 32 tokens, without the division by
    sqrt(D) and with it."""
    run, corpus = trained
    attention_weights, measured = story_llm.attention_weights, []

    def measure(queries, keys, mask):
        scores = queries @ keys.transpose(-2, -1)
        largest = [scores[..., -1, :].div(d).softmax(dim=-1).amax(dim=-1).mean().item() for d in (1, math.sqrt(48))]
        measured.append([scores[..., ~mask].std().item(), *largest])
        return attention_weights(queries, keys, mask)

    monkeypatch.setattr(story_llm, "attention_weights", measure)
    with torch.no_grad():
        story_llm.new_model(run.config, seed=42)(end_to_end(corpus.train_ids)[0])
    deviation, without, divided = torch.tensor(measured).mean(dim=0).tolist()
    assert quoted(r"untrained model, (\d\.\d) against (\d\.\d)\.") == pytest.approx(
        [deviation, deviation / math.sqrt(48)], abs=0.05)
    assert quoted(r"its favourite an attention weight of (\d\.\d\d) on average") == pytest.approx([without], abs=0.01)
    assert quoted(r"and \d\.\d\d becomes (\d\.\d\d)\.") == pytest.approx([divided], abs=0.005)


def test_the_vectors_of_the_untrained_model_are_small(trained):
    run, corpus = trained
    model = story_llm.new_model(run.config, seed=42)
    x = model.tok_emb(end_to_end(corpus.train_ids)[0]) + model.pos_emb(torch.arange(32))
    assert quoted(r"first block with a standard deviation of (\d\.\d\d)") == pytest.approx([x.std().item()], abs=0.005)


def test_the_vectors_of_tokens_and_positions_are_nearly_at_right_angles(trained):
    model = story_llm.new_model(trained[0].config, seed=42)
    tokens, positions = (torch.nn.functional.normalize(part.weight, dim=-1) for part in (model.tok_emb, model.pos_emb))
    cosine = (tokens @ positions.T).abs().mean().item()
    assert quoted(r"a position's is (\d\.\d\d) in magnitude") == pytest.approx([cosine], abs=0.005)


def test_the_losses_of_the_trained_model_by_position(trained):
    by_position = losses(trained[0], trained[1].train_ids)[0].mean(dim=0)
    first, fourth, later = quoted(r"There, the loss is (\d\.\d) \(in the 143 windows that lie end to end\); at the fourth position it is (\d\.\d), and from the "
                                  r"eleventh on (\d\.\d\d)\.")
    assert first == pytest.approx(by_position[0].item(), abs=0.1)
    assert fourth == pytest.approx(by_position[3].item(), abs=0.1)
    assert later == pytest.approx(by_position[10:].mean().item(), abs=0.02)


def test_the_unlikely_token_of_the_validation_split(trained):
    run, corpus = trained
    per_token, targets = losses(run, corpus.val_ids)
    ids = run.tokenizer.encode(" back and forth with")
    stream = corpus.val_ids.tolist()
    position = next(i for i in range(len(stream)) if stream[i:i + len(ids)] == ids) + len(ids) - 1
    loss = per_token.flatten()[position - 1].item()             # the first token is no target
    assert targets.flatten()[position - 1] == ids[-1]
    chance, before, after = quoted(r"after 180, it gives 1/([\d,]+), and the loss of this one token has risen from "
                                   r"(\d\.\d) to (\d\.\d\d)\.")
    assert after == pytest.approx(loss, abs=0.4) and math.log(chance) == pytest.approx(loss, abs=0.4)
    assert before == pytest.approx(math.log(quoted(r"a probability of about 1/(\d+); after 180")[0]), abs=0.05)
    known = set(corpus.train_ids.tolist())
    unknown = sum(token not in known for token in targets.flatten().tolist())
    assert quoted(r"Worst off are the (\d+) of the (\d+) validation targets") == [unknown, targets.numel()]


def test_counting_tokens_gives_this_loss(trained):
    ids = trained[1].train_ids.tolist()
    entropy = sum(-n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())
    assert quoted(r"knowing only that would give a loss of (\d\.\d\d)") == pytest.approx([entropy], abs=0.005)


def test_three_words_are_enough_for_nearly_all_sentences(trained):
    run, corpus = trained
    hits = 0
    for prompt, continuation in corpus.recall_tests:
        text = prompt + continuation
        start = re.match(r"\s*(?:\S+\s+){2}\S+", text)[0]
        hits += story_llm.recites(run.model, run.tokenizer, start, text[len(start):])
    shown, count = quoted(r"three are enough for (\d+) of the (\d+) sentences")
    assert count == len(corpus.recall_tests) and shown == pytest.approx(hits, abs=4)


# What each experiment's loss after 180 steps, and its recall in percent, are called in the lesson.
MEASURED = {
    "unchanged": (r"\(the model as it is\) (\d\.\d\d) (\d+)%", "loss recall"),
    "no-scaling": (r"scaling by sqrt\(D\) (\d\.\d\d) (\d+)% no-scaling", "loss recall"),
    "no-attention": (r" attention (\d\.\d\d) (\d+)% no-attention", "loss recall"),
    "no-feed-forward": (r"the feed-forward network (\d\.\d\d) (\d+)% no-feed-forward", "loss recall"),
    "average": (r"\(a plain average instead\) (\d\.\d\d) (\d+)% average", "loss recall"),
    "one-head": (r"several heads \(one instead\) (\d\.\d\d) (\d+)% one-head", "loss recall"),
    "one-block": (r"a second block (\d\.\d\d) (\d+)% one-block", "loss recall"),
    "no-positions": (r"positional embeddings (\d\.\d\d) (\d+)% no-positions", "loss recall"),
    "no-residual": (r"our loss is still (\d\.\d\d) after 180 steps", "loss"),
    "no-norm": (r"the norms (\d\.\d\d) \d+% no-norm", "loss"),
    "post-norm": (r"with norm\(x \+ f\(x\)\) its loss ends at (\d\.\d\d)", "loss"),
    "high-learning-rate": (r"with ten times ours, the training loss ends at (\d\.\d\d)\.", "loss"),
    "gradient-descent": (r"its loss was still (\d\.\d\d) after 180 steps", "loss"),
    "no-warm-up": (r"without it, our loss ends at (\d\.\d\d) instead", "loss"),
    "no-clipping": (r"without clipping, the loss ends at (\d\.\d\d)\.", "loss"),
    "no-prompt-windows": (r"and recall is (\d+)% instead of 100%", "recall")}
RECORDED = json.loads((ROOT / "extras/experiments.json").read_text(encoding="utf-8"))["experiments"]


def test_the_recall_without_scaling_is_quoted_twice():
    assert quoted(r"trained without it, our model can continue only (\d+)% of") == quoted(r"sqrt\(D\) 0\.95 (\d+)% no-scaling")


@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_the_experiments_are_those_that_were_recorded(name):
    pattern, kinds = MEASURED[name]
    figures = {"loss": (RECORDED[name]["losses"]["180"], 0.0051), "recall": (100 * RECORDED[name]["recall"], 0.51)}
    for shown, kind in zip(quoted(pattern), kinds.split(), strict=True):
        recorded, rounding = figures[kind]
        assert shown == pytest.approx(recorded, abs=rounding)


def test_the_loss_of_the_model_without_a_mask_after_60_steps():
    shown = quoted(r"After 60 of 180 training steps, its loss is (\d\.\d\d), against (\d\.\d\d)")
    recorded = [RECORDED[name]["losses"]["60"] for name in ("no-mask", "unchanged")]
    assert shown == pytest.approx(recorded, abs=0.0051)
