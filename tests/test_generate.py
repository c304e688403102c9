import copy
import inspect
import itertools

import pytest
import torch

import story_llm
from conftest import lively_model
from story_llm import BPETokenizer, GPTConfig, GPTModel, choose_token, generate, generate_text, generate_text_simple

LONG = 25  # three times the context of a lively model


def greedy_naively(model, row, count, context):
    row = list(row)
    for _ in range(count):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row[-context:]]))[0, -1].argmax()))
    return row


def test_simple_generation_has_the_promised_signature():
    names = list(inspect.signature(generate_text_simple).parameters)
    assert names == ["model", "idx", "max_new_tokens", "context_size"]


def test_simple_generation_is_greedy_for_each_row():
    model = lively_model()
    prompts = torch.randint(40, (3, 5))
    out = generate_text_simple(model, prompts, LONG, 8)
    assert out.tolist() == [greedy_naively(model, row, LONG, 8) for row in prompts.tolist()]
    assert len(out.unique()) > 5  # it does wander


def test_simple_generation_sees_no_more_than_the_context_size():
    model = lively_model()
    prompt = torch.randint(40, (1, 8))
    other = torch.cat([(prompt[:, :4] + 1) % 40, prompt[:, 4:]], dim=1)
    assert torch.equal(generate_text_simple(model, prompt, 9, 4)[:, 4:],
                       generate_text_simple(model, other, 9, 4)[:, 4:])


@pytest.mark.parametrize("config", [{"position": "learned"}, {"position": "sinusoidal"}, {"position": "rotary"},
                                    {"tie_weights": True, "qkv_bias": True}, {"context_length": 1}], ids=str)
@pytest.mark.parametrize("prompt_length", [1, 3, 7, 8, 20])
def test_cached_generation_equals_the_simple_one_within_and_past_the_context(config, prompt_length):
    model = lively_model(seed=prompt_length, **config)
    prompt = torch.randint(40, (3, prompt_length))
    expected = generate_text_simple(model, prompt, LONG, model.config.context_length)[:, prompt_length:]
    assert torch.equal(torch.stack(list(generate(model, prompt, LONG)), dim=1), expected)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [5, 3]])
def test_a_text_in_parts_with_a_cache_has_the_logits_of_the_whole(position, parts):
    model, token_ids = lively_model(position=position), torch.randint(40, (2, 8))
    cache, start, logits = model.new_cache(2), 0, []
    for part in token_ids.split(parts, dim=1):
        logits.append(model(part, cache, start))
        start += part.shape[1]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(token_ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_generation_leaves_the_mode_as_it_was_at_every_token_and_drops_nothing(training):
    model = lively_model(drop_rate=0.5)
    prompt = torch.randint(40, (1, 4))
    expected = [token.item() for token in generate(model, prompt, LONG)]
    model.train(training)
    seen = []
    for token in generate(model, prompt, LONG):
        assert model.training is training and torch.is_grad_enabled()
        seen.append(token.item())
    next(generate(model, prompt, LONG))  # abandoned
    assert seen == expected and model.training is training


def test_the_prompt_is_left_as_it_was():
    prompt = torch.randint(40, (2, 5))
    before = prompt.clone()
    list(generate(lively_model(), prompt, 9))
    generate_text_simple(lively_model(), prompt, 9, 8)
    assert torch.equal(prompt, before)


def test_no_new_tokens_are_none():
    prompt = torch.tensor([[1, 2]])
    assert list(generate(lively_model(), prompt, 0)) == []
    assert torch.equal(generate_text_simple(lively_model(), prompt, 0, 8), prompt)


# choosing

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.5, 0.0], [-3.0, 4.0, 1.0, 0.0, 3.5]])


@pytest.mark.parametrize("how", [{}, {"temperature": 0, "top_k": 3}, {"temperature": 1.7, "top_k": 1},
                                 {"temperature": 1e-3}])
def test_without_chance_the_likeliest_is_chosen(how):
    assert choose_token(LOGITS, **how).tolist() == [0, 1]


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.5, None), (3.0, None), (1.0, 2), (2.0, 4), (1.0, 99)])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature, top_k):
    count = 20_000
    drawn = choose_token(LOGITS[:1].expand(count, -1), temperature, top_k, torch.Generator().manual_seed(1))
    weights = [pow(2.718281828459045, x / temperature) for x in LOGITS[0].tolist()]
    smallest_kept = sorted(weights)[-min(top_k or 5, 5)]
    weights = [w if w >= smallest_kept else 0.0 for w in weights]
    for share, weight in zip(drawn.bincount(minlength=5) / count, weights):
        expected = weight / sum(weights)
        assert abs(share - expected) <= 5 * (expected * (1 - expected) / count) ** 0.5


def test_the_same_generator_draws_the_same_tokens():
    draws = [[choose_token(LOGITS, 1.0, generator=g).tolist() for _ in range(20)]
             for g in (torch.Generator().manual_seed(seed) for seed in (5, 5, 6))]
    assert draws[0] == draws[1] != draws[2]


# text

BYTES = BPETokenizer([bytes([b]) for b in range(256)], "story")


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


def chain(text, end=True):
    ids = BYTES.encode(text) + [BYTES.end_of_text] * end
    return chain_model(dict(itertools.pairwise(ids)))


def test_text_comes_in_whole_characters_until_the_end_of_the_text():
    pieces = list(generate_text(chain("Aé€😀z"), BYTES, "A", 50))
    assert [piece for piece in pieces if piece] == ["é", "€", "😀", "z"]


@pytest.mark.parametrize("count, expected", [(0, ""), (1, ""), (2, "é"), (4, "é"), (5, "é€"), (8, "é€"), (9, "é€😀")])
def test_text_that_ends_within_a_character_ends_before_it(count, expected):
    assert "".join(generate_text(chain("Aé€😀z"), BYTES, "A", count)) == expected


def test_bytes_that_are_no_text_are_shown_as_such_and_what_follows_is_not_lost():
    model = chain_model({ord("A"): 0xE2, 0xE2: ord("b"), ord("b"): ord("c"), ord("c"): BYTES.end_of_text})
    assert "".join(generate_text(model, BYTES, "A", 50)) == b"\xe2bc".decode(errors="replace")


@pytest.mark.parametrize("prompt", ["The old ferryman", "and", "he said, \"", "ferryman's laptop"])
def test_the_pieces_together_are_the_decoded_continuation(knows_text, prompt):
    run = knows_text
    ids = run.tokenizer.encode(prompt)
    out = generate_text_simple(run.model, torch.tensor([ids]), 40, run.config.context_length)[0].tolist()
    continuation = run.tokenizer.decode(out)[len(run.tokenizer.decode(ids)):]
    assert "".join(generate_text(run.model, run.tokenizer, prompt, 40)) == continuation


def test_an_empty_prompt_is_refused(knows_text):
    with pytest.raises(ValueError, match="prompt"):
        next(generate_text(knows_text.model, knows_text.tokenizer, "", 5))


@pytest.mark.parametrize("how", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")},
                                 {"temperature": 1.0, "top_k": -1}, {"top_k": 0}, {"max_new_tokens": -1}])
def test_a_senseless_way_to_choose_is_refused_by_name(how):
    with pytest.raises(ValueError, match=f"{[*how][-1]}.*{[*how.values()][-1]}"):
        next(generate_text(lively_model(vocab_size=257), BYTES, "A", **{"max_new_tokens": 3, **how}))


def test_sampled_text_depends_on_the_seed_alone():
    model = lively_model(vocab_size=257)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(texts))  # the global generator must not matter
        texts.append("".join(generate_text(model, BYTES, "A", 40, temperature=1.0, top_k=50, seed=seed)))
    assert texts[0] == texts[1] != texts[2]


def test_generating_text_leaves_the_global_generator_alone():
    model = lively_model(vocab_size=257)
    before = torch.get_rng_state()
    list(story_llm.generate_text(model, BYTES, "A", 9, temperature=1.0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_packed_model_says_the_same_as_before_and_a_small_one_stays_as_it_is(precision, dtype):
    small, large = lively_model(), lively_model(emb_dim=768, n_heads=12, n_layers=8, vocab_size=700)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    story_llm.pack(small, precision)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    token_ids = torch.randint(700, (1, 8))
    with torch.no_grad():
        plain = copy.deepcopy(large).to(dtype)(token_ids).float()
        story_llm.pack(large, precision)
        packed, one = large(token_ids).float(), large(token_ids[:, :1]).float()
    assert large.out_head.weight.dtype == dtype
    torch.testing.assert_close(packed, plain, rtol=0.05, atol=0.02 * plain.std().item())
    torch.testing.assert_close(one, plain[:, :1], rtol=0.05, atol=0.02 * plain.std().item())
    assert len([*story_llm.generate(large, token_ids, 3)]) == 3
