"""Step 8: greedy generation, which always takes the most likely next token."""
import inspect

import pytest
import torch

from helpers import KINDS, lively_model, tiny
from story_llm import generate_text_simple

LONG = 25  # three times the context length of a lively model


def greedy_naively(model, row, count, context_size):
    row = list(row)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([row[-context_size:]]))[0, -1].tolist()
        row.append(max(range(len(logits)), key=logits.__getitem__))
    return row


def some_prompts(rows, length):
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(length))


def test_simple_generation_has_the_promised_signature():
    names = list(inspect.signature(generate_text_simple).parameters)
    assert names == ["model", "idx", "max_new_tokens", "context_size"]


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_simple_generation_is_greedy_for_each_row(length):
    model, prompts = lively_model(), some_prompts(3, length)
    before = prompts.clone()
    out = generate_text_simple(model, prompts, LONG, 8)
    assert out.tolist() == [greedy_naively(model, row, LONG, 8) for row in prompts.tolist()]
    assert len(out.unique()) > 5 and torch.equal(prompts, before)   # the text does not repeat one token


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_simple_generation_is_greedy_for_every_kind_of_model(kind):
    model = lively_model(**kind)
    T, prompt = model.config.context_length, torch.tensor([[1, 2, 3]])
    out = generate_text_simple(model, prompt, LONG, T)
    assert out[0].tolist() == greedy_naively(model, [1, 2, 3], LONG, T)


def test_simple_generation_sees_no_more_than_the_context_size():
    model, prompt = lively_model(), some_prompts(1, 8)
    other = torch.cat([(prompt[:, :4] + 1) % 40, prompt[:, 4:]], dim=1)
    ends = [generate_text_simple(model, ids, 9, 4)[:, 4:] for ids in (prompt, other)]
    assert torch.equal(*ends)
    assert ends[0][0].tolist() == greedy_naively(model, prompt[0, 4:].tolist(), 9, 4)


def test_zero_new_tokens_leave_the_prompt_as_it_is():
    prompt = torch.tensor([[1, 2]])
    assert torch.equal(generate_text_simple(lively_model(), prompt, 0, 8), prompt)


def test_gradients_are_off_during_generation_and_on_again_afterwards():
    seen = []

    def model(ids):
        seen.append(torch.is_grad_enabled())
        return torch.zeros(*ids.shape, 3)

    generate_text_simple(model, torch.tensor([[1]]), 2, 8)
    assert seen == [False, False] and torch.is_grad_enabled()


def test_an_untrained_run_generates_without_dropout():
    """`generate --untrained --drop-rate 0.5` must write the same text twice. Only a training step turns dropout on."""
    run, _ = tiny(drop_rate=0.5)
    before = torch.get_rng_state()
    prompt = torch.zeros(4, 5, dtype=torch.long)
    texts = [generate_text_simple(run.model, prompt, 20, 12) for _ in range(2)]
    assert torch.equal(*texts) and torch.equal(torch.get_rng_state(), before)
