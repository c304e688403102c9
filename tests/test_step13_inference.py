"""Step 13: generation with a cache, chance, and text that comes piece by piece."""
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, strategies as st

from helpers import TEXT, lively_model, some_text, story_llm
from story_llm import (BPETokenizer, GPTConfig, GPTModel, KeyValueCache, Sampling, generate, generate_text,
                       generate_text_simple, learn_byte_pairs, next_token_probabilities)

LONG = 25  # three times the context of a lively model
OPTIONS = [{"position": "learned"}, {"position": "sinusoidal"}, {"position": "rotary"},
           {"tie_weights": True, "qkv_bias": True}, {"context_length": 1}, {"context_length": 1, "position": "rotary"}]


def some_ids(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(shape[-1]))


# the cache

@pytest.mark.parametrize("config", OPTIONS, ids=str)
@pytest.mark.parametrize("prompt_length", [1, 3, 7, 8, 20])
def test_cached_generation_equals_the_simple_one_within_and_past_the_context(config, prompt_length):
    model, prompt = lively_model(seed=prompt_length, **config), some_ids(3, prompt_length)
    before = prompt.clone()
    expected = generate_text_simple(model, prompt, LONG, model.config.context_length)[:, prompt_length:]
    columns = list(generate(model, prompt, LONG))
    assert all(column.shape == (3,) for column in columns) and torch.equal(prompt, before)
    assert torch.equal(torch.stack(columns, dim=1), expected)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [5, 3]], ids=str)
def test_a_text_in_parts_with_a_cache_has_the_logits_of_the_whole_at_the_last_places(position, parts):
    model, token_ids, cache = lively_model(position=position), some_ids(2, 8), KeyValueCache()
    assert cache.length == 0
    with torch.no_grad():
        whole, end = model(token_ids), 0
        for part in token_ids.split(parts, dim=1):
            end += part.shape[1]
            logits = model(part, cache)
            assert logits.shape == (2, 1, 40) and cache.length == end
            torch.testing.assert_close(logits, whole[:, end - 1:end], rtol=0, atol=1e-3)


def test_until_the_context_is_full_only_the_new_token_is_calculated_then_the_whole_window():
    model, widths = lively_model(), []
    model.tok_emb.register_forward_hook(lambda part, given, output: widths.append(given[0].shape[1]))
    list(generate(model, some_ids(1, 5), 7))
    assert widths == [5, 1, 1, 1, 8, 8, 8]


@pytest.mark.parametrize("prompt_length", [1, 8, 20])
def test_no_new_tokens_are_none(prompt_length):
    assert list(generate(lively_model(), some_ids(1, prompt_length), 0)) == []


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_k=9, top_p=0.9)])
@pytest.mark.parametrize("training", [True, False])
def test_generation_drops_nothing_and_leaves_mode_chance_and_gradients_as_they_were_at_every_token(training, sampling):
    model, prompt = lively_model(drop_rate=0.5), some_ids(1, 4)
    expected = [token.item() for token in generate(model, prompt, LONG, sampling)]
    model.train(training)
    torch.manual_seed(1)
    before, seen = torch.get_rng_state(), []

    def all_is_as_before():
        return model.training is training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)

    for token in generate(model, prompt, LONG, sampling):
        assert all_is_as_before() and not token.requires_grad
        seen.append(token.item())
    next(generate(model, prompt, LONG, sampling))  # abandoned
    assert seen == expected and all_is_as_before()


# probabilities

HOW = st.builds(dict, top_k=st.sampled_from([0, 0, 1, 2, 3, 7, 99]),
                top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.3, 0.57, 0.9, 0.99, 2.0]),
                temperature=st.sampled_from([0, 1e-39, 1e-30, 1e-3, 0.1, 0.5, 1, 1.0, 1.7, 30.0, 1e38, 1e300]))
# in 64ths, of which a float32 holds all differences without error; few enough to be often the same
A_ROW = st.lists(st.one_of(st.integers(-3000, 3000), st.integers(-70, 70), st.sampled_from([-64, 0, 64])), min_size=1,
                 max_size=9)


def by_hand(logits, temperature=0.0, top_k=0, top_p=1.0):
    """The probabilities that are kept, the largest first, in Python's numbers."""
    logits = sorted(logits, reverse=True)
    if temperature == 0:
        return [1.0]
    powers = [math.exp((logit - logits[0]) / temperature) for logit in logits]
    powers, kept = powers[:top_k or len(powers)], []
    for power in powers:
        if kept and sum(kept) >= top_p * sum(powers):
            break
        kept.append(power)
    return [power / sum(kept) for power in kept]


@given(A_ROW, HOW)
def test_probabilities_are_those_by_hand_and_those_of_the_likeliest(row, how):
    row, top_p = [number / 64 for number in row], how["top_p"]
    expected = by_hand(row, **how)
    if 0 < top_p < 1:       # where rounding decides whether there is one more, we do not look
        assume(all(len(by_hand(row, **{**how, "top_p": top_p + little})) == len(expected) for little in (-1e-5, 1e-5)))
    found = next_token_probabilities(torch.tensor(row), Sampling(**how)).tolist()
    in_order = sorted(found, reverse=True)
    assert in_order == pytest.approx(expected + [0.0] * (len(row) - len(expected)), rel=1e-3, abs=1e-6)
    for i, j in itertools.product(range(len(row)), repeat=2):
        assert found[i] >= found[j] or row[i] - row[j] < 1e-3 * how["temperature"] or row[i] <= row[j]


@given(st.lists(st.lists(st.integers(-300, 300), min_size=5, max_size=5), min_size=6, max_size=6), HOW)
def test_each_row_of_a_batch_has_the_probabilities_that_it_has_alone(rows, how):
    logits, sampling = torch.tensor(rows) / 64, Sampling(**how)
    before = logits.clone()
    alone = torch.stack([next_token_probabilities(row, sampling) for row in logits])
    torch.testing.assert_close(next_token_probabilities(logits, sampling), alone)
    torch.testing.assert_close(next_token_probabilities(logits.view(2, 3, 5), sampling), alone.view(2, 3, 5))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-39, 1e-45, 1e-46, 1e-300, 5e-324])
def test_however_cold_the_likeliest_remains_and_equals_share(temperature):
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.0], [5.0, 0.0, 5.0, 4.0]])
    expected = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    torch.testing.assert_close(next_token_probabilities(logits, Sampling(temperature=temperature)), expected)


@pytest.mark.parametrize("temperature", [1e6, 1e39, 1e308])
def test_however_hot_all_are_alike(temperature):
    found = next_token_probabilities(torch.tensor([5.0, -5.0, 0.0, 1.0]), Sampling(temperature=temperature))
    torch.testing.assert_close(found, torch.full((4,), 0.25), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"top_k": 3, "top_p": 0.5}, {"temperature": 1.7, "top_k": 1},
                                 {"temperature": 1.7, "top_p": 1e-9}, {"temperature": 1e-3}], ids=str)
def test_without_chance_it_is_the_likeliest(how):
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.5, 0.0], [-3.0, 4.0, 1.0, 0.0, 3.5]])
    assert torch.equal(next_token_probabilities(logits, Sampling(**how)), torch.eye(5)[:2])


@pytest.mark.parametrize("top_k", [1, 3, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.001])
def test_of_equals_as_many_are_kept_as_asked(top_k, top_p):
    found = next_token_probabilities(torch.zeros(3, 50), Sampling(temperature=1.0, top_k=top_k, top_p=top_p))
    assert (found > 0).sum(dim=-1).tolist() == [1 if top_p < 1 else top_k] * 3


@pytest.mark.parametrize("equals, top_p, kept", [(2, 0.5, 1), (4, 0.5, 2), (8, 0.25, 2), (4, 0.51, 3), (4, 0.49, 2)])
def test_the_likeliest_are_kept_until_together_they_reach_top_p_and_no_more(equals, top_p, kept):
    """Shares of 1/2, 1/4 and 1/8 have no rounding."""
    found = next_token_probabilities(torch.zeros(equals), Sampling(temperature=1.0, top_p=top_p))
    assert (found > 0).sum() == kept and found.max() == 1 / kept


def test_top_p_is_a_share_of_what_top_k_has_left():
    found = next_token_probabilities(torch.zeros(4), Sampling(temperature=1.0, top_k=2, top_p=0.5))
    assert sorted(found.tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("top_p", [1.0, 2.0])
def test_a_top_p_of_1_leaves_every_token_its_probability_however_small(top_p):
    logits = 6 * torch.randn(8, 2000, generator=torch.Generator().manual_seed(0))
    found, softmax = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=top_p)), logits.softmax(dim=-1)
    torch.testing.assert_close(found, softmax, rtol=1e-4, atol=0)


def test_logits_of_two_bytes_and_far_from_zero_are_no_trouble():
    found = next_token_probabilities(torch.tensor([30000.0, 29952.0, 30000.0]).half(), Sampling(temperature=96.0))
    powers = [1.0, math.exp(-0.5), 1.0]
    torch.testing.assert_close(found.float(), torch.tensor(powers) / sum(powers), rtol=1e-3, atol=0)


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": "1"},
    {"top_k": -1}, {"top_k": 1.5}, {"top_p": -0.1}, {"top_p": 0.0}, {"top_p": float("nan")}, {"seed": -1}, {"seed": 1 << 63}], ids=str)
def test_a_senseless_way_to_choose_is_refused_by_name_and_value(wrong):
    with pytest.raises(ValueError) as refusal:
        Sampling(**wrong)
    name, value = *wrong, *wrong.values()
    assert name in str(refusal.value) and repr(value) in str(refusal.value)


def test_a_way_to_choose_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().seed = 1


# chance

@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 3.0},
                                 {"temperature": 1.0, "top_k": 2}, {"temperature": 2.0, "top_k": 4, "top_p": 0.8},
                                 {"temperature": 1.0, "top_p": 0.6}], ids=str)
def test_tokens_are_drawn_as_often_as_the_probabilities_by_hand_say(how):
    model, count = lively_model(vocab_size=6), 20_000
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2]]))[0, -1].tolist()
    drawn, = generate(model, torch.tensor([[1, 2]]).expand(count, -1), 1, Sampling(**how))
    shares = (drawn.bincount(minlength=6) / count).tolist()
    order = sorted(range(6), key=lambda i: -logits[i])
    for i, expected in itertools.zip_longest(order, by_hand(logits, **how), fillvalue=0.0):
        assert abs(shares[i] - expected) <= 5 * (expected * (1 - expected) / count) ** 0.5


def test_each_token_is_drawn_anew():
    """Where all tokens are alike, two in a row are the same ones one time in six."""
    model = GPTModel(GPTConfig(vocab_size=6, context_length=4, emb_dim=8, n_heads=1, n_layers=1))
    torch.nn.init.zeros_(model.out_head.weight)
    drawn = torch.stack(list(generate(model, torch.zeros(500, 1, dtype=torch.long), 9, Sampling(temperature=1.0))))
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert (one == other).float().mean().item() == pytest.approx(1 / 6, abs=0.03)


BYTES = BPETokenizer([bytes([byte]) for byte in range(256)], "story")


def test_sampled_text_depends_on_the_seed_alone():
    model, texts = lively_model(vocab_size=257), []
    for seed in (1, 1, 2, (1 << 63) - 1):
        torch.manual_seed(len(texts))  # torch's own chance must not matter
        sampling = Sampling(temperature=1.0, top_k=50, seed=seed)
        texts.append("".join(generate_text(model, BYTES, "A", 40, sampling)))
    assert texts[0] == texts[1] and len(set(texts)) == 3


# text

def chain_model(next_ids, context_length=4):
    """A model that knows one thing: after token t comes next_ids[t], with a probability of nearly 1."""
    model = GPTModel(GPTConfig(vocab_size=257, context_length=context_length, emb_dim=257, n_heads=1, n_layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        model.tok_emb.weight.copy_(torch.eye(257))
        for this, following in next_ids.items():
            model.out_head.weight[following, this] = 10.0
    return model.eval()


@pytest.mark.parametrize("count, expected", [(0, []), (1, []), (2, ["é"]), (4, ["é"]), (5, ["é", "€"]), (8, ["é", "€"]),
                                             (9, ["é", "€", "😀"]), (10, ["é", "€", "😀", "z"])])
def test_text_comes_in_whole_characters_and_ends_before_a_half_one(count, expected):
    model = chain_model(dict(itertools.pairwise(BYTES.encode("Aé€😀z"))))
    assert list(generate_text(model, BYTES, "A", count)) == expected


def test_bytes_that_are_no_text_are_shown_as_such_and_what_follows_is_not_lost():
    model = chain_model({ord("A"): 0xE2, 0xE2: ord("b"), ord("b"): ord("c")})
    assert "".join(generate_text(model, BYTES, "A", 3)) == b"\xe2bc".decode(errors="replace")


JOINS = "é€😀漢字 é€ 字€é 漢字漢字 😀😀 ab éé"
TOKENIZERS = {"bytes": BYTES, "story": BPETokenizer(learn_byte_pairs(JOINS * 3, 300), "story")}


def as_it_comes(tokenizer, prompt, token_ids):
    """The pieces of text if a model chose these tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story_llm, "generate", lambda *given: (torch.tensor([token_id]) for token_id in token_ids))
        return list(generate_text(None, tokenizer, prompt, len(token_ids)))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.one_of(some_text, st.text(st.sampled_from(JOINS))), st.integers(0, 3))
def test_of_a_text_that_ends_anywhere_whole_characters_come_and_all_that_there_are(name, text, missing):
    tokenizer = TOKENIZERS[name]
    assume("\ufffd" not in text)
    token_ids = tokenizer.encode(text)
    token_ids = token_ids[:max(0, len(token_ids) - missing)]
    pieces = as_it_comes(tokenizer, "é", token_ids)
    come = b"".join(tokenizer.tokens[token_id] for token_id in token_ids)
    whole = come.decode(errors="ignore")     # all but a half character at the end
    assert "\ufffd" not in "".join(pieces) and whole.startswith("".join(pieces))
    last = tokenizer.tokens[token_ids[-1]] if token_ids else b""
    assert "".join(pieces) == whole or len(whole) - len("".join(pieces)) < len(last)   # it came with the half one
    if come.decode(errors="replace") == whole:
        assert "".join(pieces) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.lists(st.integers(0, 299)), st.sampled_from(["A", "é", "\ufffd", "漢字"]))
def test_whatever_tokens_come_the_pieces_are_the_continuation_but_for_a_last_half_character(name, token_ids, prompt):
    tokenizer = TOKENIZERS[name]
    token_ids = [token_id % (tokenizer.vocab_size - 1) for token_id in token_ids]
    before = tokenizer.encode(prompt)
    whole = tokenizer.decode(before + token_ids)[len(prompt):]
    together = "".join(as_it_comes(tokenizer, prompt, token_ids))
    assert whole.startswith(together)
    if not whole.endswith("\ufffd"):
        assert together == whole


@pytest.mark.parametrize("prompt", ["The old ferryman", "and", "he said, \"", "ferryman's laptop", TEXT])
def test_the_pieces_together_are_the_decoded_continuation(knows_text, prompt):
    run = knows_text
    ids = run.tokenizer.encode(prompt)
    out = generate_text_simple(run.model, torch.tensor([ids]), 40, run.config.context_length)[0].tolist()
    continuation = run.tokenizer.decode(out)[len(run.tokenizer.decode(ids)):]
    assert "".join(generate_text(run.model, run.tokenizer, prompt, 40)) == continuation != ""


def test_text_by_heart_goes_on_as_the_text_does(knows_text):
    start, end = TEXT.index("Nobody"), TEXT.index(" the river")
    found = "".join(generate_text(knows_text.model, knows_text.tokenizer, TEXT[start:end], 20))
    assert len(found) > 60 and TEXT[end:].startswith(found)


@pytest.mark.parametrize("prompt, count, name", [("", 5, "prompt"), ("A", -1, "max_new_tokens.*-1")])
def test_no_prompt_and_fewer_than_no_tokens_are_refused(prompt, count, name):
    with pytest.raises(ValueError, match=name):
        next(generate_text(lively_model(vocab_size=257), BYTES, prompt, count))


@pytest.mark.parametrize("training", [True, False])
def test_writing_text_leaves_mode_chance_and_gradients_as_they_were(training):
    model = lively_model(vocab_size=257, drop_rate=0.5).train(training)
    before = torch.get_rng_state()
    for sampling in (None, Sampling(temperature=1.0)):
        list(generate_text(model, BYTES, "A", 9, sampling))
    assert model.training is training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
