"""Step 13: generation with a key-value cache, sampling, and text that arrives piece by piece."""
import dataclasses
import functools
import itertools
import math
import types

import pytest
import torch
from hypothesis import assume, given, strategies as st

from helpers import TEXT, lively_model, story_llm, trained
from story_llm import (BPETokenizer, GPTConfig, GPTModel, KeyValueCache, Sampling, StoryError, encode_prompt, generate,
                       generate_text, generate_text_simple, next_token_probabilities, predict_next, train_bpe)

LONG = 25  # three times the context length of a lively model


def some_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(shape[-1]))


# the key-value cache

def test_until_the_window_is_full_only_the_new_token_is_computed_then_all_of_them():
    model, widths = lively_model(), []
    model.tok_emb.register_forward_hook(lambda part, given, output: widths.append(given[0].shape[1]))
    list(generate(model, some_ids(1, 5), 7))
    assert widths == [5, 1, 1, 1, 8, 8, 8]


@pytest.mark.parametrize("config", [{}, {"position": "rotary"}, {"context_length": 1}], ids=str)
@pytest.mark.parametrize("known", [0, 1, 5])
def test_the_next_token_has_the_same_probabilities_whatever_the_cache_already_knows(config, known):
    model, window = lively_model(**config), some_ids(2, 7)[:, :lively_model(**config).config.context_length]
    known, cache, sampling = min(known, window.shape[1] - 1), KeyValueCache(), Sampling(temperature=1.0)
    if known > 0:
        predict_next(model, window[:, :known], sampling, cache)
    found = predict_next(model, window, sampling, cache)
    with torch.no_grad():
        expected = next_token_probabilities(model(window)[:, -1], sampling)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_rule_for_sampling_is_given_all_token_ids_of_the_window(monkeypatch):
    """For example, one that makes repetitions less likely."""
    seen = []

    def probabilities(logits, sampling, window, original=next_token_probabilities):
        seen.append(window.tolist())
        return original(logits, sampling, window)

    monkeypatch.setattr(story_llm, "next_token_probabilities", probabilities)
    prompt = some_ids(2, 6)
    text = torch.cat([prompt, torch.stack(list(generate(lively_model(), prompt, 5)), dim=1)], dim=1)
    assert seen == [text[:, max(0, end - 8):end].tolist() for end in range(6, 11)]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_k=9, top_p=0.9, seed=3)])
def test_generation_uses_no_dropout_and_leaves_random_state_and_gradients_alone(sampling):
    model, prompt = lively_model(drop_rate=0.5), some_ids(1, 4)
    expected = [token.item() for token in generate(model, prompt, LONG, sampling)]
    torch.manual_seed(1)
    before, seen = torch.get_rng_state(), []

    def all_is_as_before():
        return not model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)

    for token in generate(model, prompt, LONG, sampling):
        assert all_is_as_before() and not token.requires_grad
        seen.append(token.item())
    next(generate(model, prompt, LONG, sampling))       # left early
    assert seen == expected and all_is_as_before()


# probabilities

HOW = st.builds(dict, top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 99]),
                top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.3, 0.57, 0.9, 0.99, 2.0]),
                temperature=st.sampled_from([0, 1e-30, 1e-3, 0.1, 0.5, 1, 1.0, 1.7, 30.0, 4e9]))
# Logits in 64ths, whose differences a float32 holds exactly. They are so few that some are equal.
A_ROW = st.lists(st.one_of(st.integers(-3000, 3000), st.integers(-70, 70), st.sampled_from([-64, 0, 64])), min_size=1,
                 max_size=9)


def probabilities_by_hand(logits, temperature=0.0, top_k=0, top_p=1.0):
    """The probabilities that are kept, the largest first, in Python's numbers."""
    logits = sorted(logits, reverse=True)
    if temperature < 1e-4:
        return [1.0]
    powers = [math.exp((logit - logits[0]) / temperature) for logit in logits]
    powers, kept = powers[:top_k or len(powers)], []
    for power in powers:
        if kept and sum(kept) >= top_p * sum(powers):
            break
        kept.append(power)
    return [power / sum(kept) for power in kept]


@given(A_ROW, HOW)
def test_the_probabilities_are_those_computed_by_hand_and_belong_to_the_most_likely_tokens(row, how):
    row, top_p = [number / 64 for number in row], how["top_p"]
    expected = probabilities_by_hand(row, **how)
    if 0 < top_p < 1:       # leave out rows in which rounding decides whether one more token is kept
        assume(all(len(probabilities_by_hand(row, **{**how, "top_p": top_p + little})) == len(expected)
                   for little in (-1e-5, 1e-5)))
    found = next_token_probabilities(torch.tensor(row), Sampling(**how)).tolist()
    descending = sorted(found, reverse=True)
    assert descending == pytest.approx(expected + [0.0] * (len(row) - len(expected)), rel=1e-3, abs=1e-6)
    for i, j in itertools.product(range(len(row)), repeat=2):
        assert found[i] >= found[j] or row[i] - row[j] < 1e-3 * how["temperature"] or row[i] <= row[j]


@given(st.lists(st.lists(st.integers(-300, 300), min_size=5, max_size=5), min_size=6, max_size=6), HOW)
def test_each_row_of_a_batch_has_the_probabilities_that_it_has_alone_whatever_is_in_the_window(rows, how):
    logits, sampling = torch.tensor(rows) / 64, Sampling(**how)
    before = logits.clone()
    alone = torch.stack([next_token_probabilities(row, sampling) for row in logits])
    torch.testing.assert_close(next_token_probabilities(logits, sampling, torch.zeros(6, 3).long()), alone)
    torch.testing.assert_close(next_token_probabilities(logits.view(2, 3, 5), sampling), alone.view(2, 3, 5))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-300, 1e-46, 1e-39, 1e-30, 1e-5, 1e-4, 1e-3])
def test_at_a_low_temperature_only_the_most_likely_token_remains_and_nothing_overflows(temperature):
    """Of two equal ones, the first: below 1e-4, sampling is the same as greedy decoding."""
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.0], [500.0, 0.0, 512.0, 4.0], [-512.0, -513.0, -600.0, -700.0]])
    found = next_token_probabilities(logits, Sampling(temperature=temperature))
    torch.testing.assert_close(found, torch.eye(4)[[0, 2, 0]])
    if temperature < 1e-4:
        assert next_token_probabilities(torch.ones(3), Sampling(temperature=temperature)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.001])
def test_of_equally_likely_tokens_as_many_are_kept_as_requested(top_k, top_p):
    found = next_token_probabilities(torch.zeros(3, 50), Sampling(temperature=1.0, top_k=top_k, top_p=top_p))
    assert (found > 0).sum(dim=-1).tolist() == [1 if top_p < 1 else top_k] * 3


@pytest.mark.parametrize("equal, top_p, kept", [(2, 0.5, 1), (8, 0.25, 2), (4, 0.51, 3), (4, 0.49, 2)])
def test_the_most_likely_tokens_are_kept_until_together_they_reach_top_p(equal, top_p, kept):
    """Probabilities of 1/2, 1/4 and 1/8 are not rounded."""
    found = next_token_probabilities(torch.zeros(equal), Sampling(temperature=1.0, top_p=top_p))
    assert (found > 0).sum() == kept and found.max() == 1 / kept


def test_top_p_is_a_share_of_what_top_k_has_left():
    found = next_token_probabilities(torch.zeros(4), Sampling(temperature=1.0, top_k=2, top_p=0.5))
    assert sorted(found.tolist()) == [0, 0, 0, 1]


def test_without_limits_every_token_keeps_its_probability_however_small():
    logits = 6 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    found = next_token_probabilities(logits, Sampling(temperature=1.0))
    torch.testing.assert_close(found, logits.softmax(dim=-1), rtol=1e-4, atol=0)


def test_the_logits_may_be_half_precision_and_far_from_0():
    found = next_token_probabilities(torch.tensor([30000.0, 29952.0, 30000.0]).half(), Sampling(temperature=96.0))
    powers = [1.0, math.exp(-0.5), 1.0]
    torch.testing.assert_close(found.float(), torch.tensor(powers) / sum(powers), rtol=1e-3, atol=0)


# sampling

OTHER_VALUES = {"temperature": 2.0, "top_k": 2, "top_p": 0.2, "seed": 1}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Sampling)])
def test_every_sampling_setting_has_an_effect(name):
    """A new setting needs another value in the dictionary above, so none can be without effect."""
    model, usual = lively_model(), Sampling(temperature=1.0, seed=2)
    changed = dataclasses.replace(usual, **{name: OTHER_VALUES[name]})
    one, other = [torch.stack(list(generate(model, some_ids(1, 5), 50, each))) for each in (usual, changed)]
    assert changed != usual and not torch.equal(one, other)


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 3.0},
                                 {"temperature": 1.0, "top_k": 2}, {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
                                 {"temperature": 1.0, "top_p": 0.6}], ids=str)
def test_tokens_are_sampled_as_often_as_the_probabilities_computed_by_hand_say(how):
    model, count = lively_model(vocab_size=6), 20_000
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]]))[0, -1].tolist()
    sampled, = generate(model, torch.tensor([[1, 2]]).expand(count, -1), 1, Sampling(**how, seed=1))
    shares = (sampled.bincount(minlength=6) / count).tolist()
    order = sorted(range(6), key=lambda i: -logits[i])
    for i, expected in itertools.zip_longest(order, probabilities_by_hand(logits, **how), fillvalue=0.0):
        assert abs(shares[i] - expected) <= 5 * (expected * (1 - expected) / count) ** 0.5


def test_each_token_is_sampled_independently():
    """If all six tokens are equally likely, two samples are equal one time in six."""
    model = GPTModel(GPTConfig(vocab_size=6, context_length=4, emb_dim=8, n_heads=1, n_layers=1))
    torch.nn.init.zeros_(model.out_head.weight)
    sampling = Sampling(temperature=1.0, seed=1)
    sampled = torch.stack(list(generate(model, torch.zeros(500, 1, dtype=torch.long), 9, sampling)))
    for one, other in ((sampled[:-1], sampled[1:]), (sampled[:, :-1], sampled[:, 1:])):
        assert (one == other).float().mean().item() == pytest.approx(1 / 6, abs=0.03)


BYTES = BPETokenizer([bytes([byte]) for byte in range(256)], "story")


def test_a_seed_repeats_a_text_and_without_one_each_text_is_another():
    """Neither uses or changes torch's own random state."""
    model, texts = lively_model(vocab_size=257), []
    for seed in (1, 1, 2, (1 << 32) - 1, 0, 0, 0):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        sampling = Sampling(temperature=1.0, top_k=50, seed=seed)
        texts.append("".join(generate_text(model, BYTES, "A", 40, sampling)))
        assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] and len(set(texts)) == 6


# text

MANY_BYTES = "é€😀漢字 é€ 字€é 漢字漢字 😀😀 ab éé"
TOKENIZERS = {"bytes": BYTES, "story": BPETokenizer(train_bpe(MANY_BYTES * 3, 300), "story")}


def pieces_of(tokenizer, prompt, token_ids):
    """The pieces of text that arrive if a model chooses these tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "generate", lambda *given: (torch.tensor([token_id]) for token_id in token_ids))
        return list(generate_text(None, tokenizer, prompt, len(token_ids)))


@pytest.mark.parametrize("count, expected", [(0, []), (1, []), (2, ["é"]), (4, ["é"]), (5, ["é", "€"]),
                                             (9, ["é", "€", "😀"]), (10, ["é", "€", "😀", "z"])])
def test_text_arrives_in_whole_characters_and_ends_before_an_incomplete_one(count, expected):
    assert [piece for piece in pieces_of(BYTES, "A", BYTES.encode("é€😀z")[:count]) if piece] == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.integers(0, 299)), st.sampled_from(["A", "é", "\ufffd", "漢字"]))
def test_whatever_tokens_are_chosen_the_pieces_are_the_continuation_up_to_its_last_whole_character(
        name, token_ids, prompt):
    tokenizer = TOKENIZERS[name]
    token_ids = [token_id % (tokenizer.vocab_size - 1) for token_id in token_ids]
    before = tokenizer.encode(prompt)
    whole = tokenizer.decode(before + token_ids)[len(prompt):]
    arrived = "".join(pieces_of(tokenizer, prompt, token_ids))
    assert whole.startswith(arrived)
    if not whole.endswith("\ufffd"):
        assert arrived == whole


@pytest.mark.parametrize("prompt", ["The old ferryman", "he said, \"", "ferryman's laptop", TEXT[:200]])
def test_the_pieces_together_are_the_decoded_continuation(knows_text, prompt):
    run = knows_text
    ids = run.tokenizer.encode(prompt)      # the last prompt is longer than the window
    out = generate_text_simple(run.model, torch.tensor([ids]), 40, run.config.context_length)[0].tolist()
    continuation = run.tokenizer.decode(out)[len(run.tokenizer.decode(ids)):].split("<|endoftext|>")[0]
    assert "".join(generate_text(run.model, run.tokenizer, prompt, 40)) == continuation != ""


@pytest.mark.parametrize("start", ["My mother took the long", "The old ferryman tied his"])
def test_generation_stops_where_the_text_ends(knows_text, start):
    prompt = TEXT[TEXT.index(start):][:len(start)]
    for count in (400, 10**6):
        found = "".join(generate_text(knows_text.model, knows_text.tokenizer, prompt, count))
        assert prompt + found == TEXT[TEXT.index(start):]


@pytest.mark.parametrize("lines", [1, 2, 5])
@pytest.mark.parametrize("prompt", ["The old ferryman tied his", "The old ferryman tied his "])
def test_as_many_sentences_are_written_as_asked(knows_text, prompt, lines):
    found = "".join(generate_text(knows_text.model, knows_text.tokenizer, prompt, 400, sentences=lines))
    assert prompt.rstrip() + " " + found.lstrip() == "\n".join(TEXT.splitlines()[:lines])


def test_more_sentences_than_there_are_end_with_the_text_and_a_whole_one_as_a_prompt_does_not_count(knows_text):
    first, *others = TEXT.splitlines()
    write = functools.partial(generate_text, knows_text.model, knows_text.tokenizer)
    assert TEXT == "The old ferryman tied his" + "".join(write("The old ferryman tied his", 400, sentences=9))
    for prompt in (first, " ".join(first.split()[-3:])):
        assert prompt + "".join(write(prompt, 400, sentences=1)) == f"{prompt}\n{others[0]}"
    assert len("".join(write("The old ferryman tied his", 3, sentences=1)).split()) == 3       # the tokens end first


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=5), sentences=st.integers(0, 4))
def test_however_the_text_is_cut_into_tokens_the_sentences_are_the_same(cuts, sentences):
    text, tokens = "He waited. It rained.\n\nNobody came! The \"end\" is near", []
    for size in itertools.cycle(cuts):
        start = sum(map(len, tokens))
        tokens.append(text[start:start + size].encode())
        if start + size >= len(text):
            break
    tokenizer = types.SimpleNamespace(encode=lambda text: [0], end_of_text=-1, decode_bytes=lambda ids: tokens[ids[0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "generate", lambda *given: map(torch.tensor, ([i] for i in range(len(tokens)))))
        found = "".join(generate_text(None, tokenizer, "Once, ", 99, sentences=sentences))
    assert found == ["He waited. It rained.\n\nNobody came! The \"end\" is near", "He waited.", "He waited. It rained.",
                     "He waited. It rained.\n\nNobody came!", text][sentences]


def test_a_prompt_with_spaces_behind_it_continues_as_without_them(knows_text):
    story = trained(tokenizer="story", max_steps=60, val_fraction=0.0, eval_every=1000)
    for run, prompt in itertools.product((knows_text, story), ("The old ferryman tied his", "At night a boy", "river")):
        without = run.write(prompt, 12).removeprefix(prompt)
        assert without.startswith((" ", ",", "\n", ".")) or run is story
        for spaces in (1, 2, 5):
            assert run.write(prompt + spaces * " ", 12) == prompt + spaces * " " + without.removeprefix(" ")


def test_line_breaks_at_the_end_of_a_prompt_are_part_of_it(knows_text):
    tokenizer = knows_text.tokenizer
    first, second, *_ = TEXT.splitlines()
    assert encode_prompt(tokenizer, "it rained.\n\n") == tokenizer.encode("it rained.\n\n")
    assert encode_prompt(tokenizer, "it rained.\n ") == tokenizer.encode("it rained.\n")
    assert encode_prompt(BYTES, "  ") == [32, 32]       # nothing else is there
    assert knows_text.write(first + "\n", sentences=1) == first + "\n" + second


# mistakes

@pytest.mark.parametrize("prompt, count, message", [("", 5, "prompt"), ("A", -1, "max_new_tokens.*-1")])
def test_an_empty_prompt_and_a_negative_number_of_tokens_are_refused(prompt, count, message):
    with pytest.raises(StoryError, match=message):
        next(generate_text(lively_model(vocab_size=257), BYTES, prompt, count))
