"""Step 8: greedy generation, which always takes the most likely next token."""
import inspect

import pytest
import torch

from helpers import lively_model, tiny
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


@pytest.mark.parametrize("length", [1, 8, 11])
@pytest.mark.parametrize("context_size", [8, 4])
def test_simple_generation_is_greedy_for_each_row_and_sees_no_more_than_the_context_size(length, context_size):
    model, prompts = lively_model(), some_prompts(3, length)
    before = prompts.clone()
    out = generate_text_simple(model, prompts, LONG, context_size)
    assert out.tolist() == [greedy_naively(model, row, LONG, context_size) for row in prompts.tolist()]
    assert len(out.unique()) > 5 and torch.equal(prompts, before)   # the text does not repeat one token


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
