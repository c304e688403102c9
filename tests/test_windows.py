import pytest
import torch
from hypothesis import given, strategies as st

from story_llm import SlidingWindowDataset

sizes = dict(extra=st.integers(1, 60), length=st.integers(1, 20), stride=st.integers(1, 25))


@given(**sizes)
def test_the_windows_are_those_of_a_naive_loop(extra, length, stride):
    tokens = list(range(100, 100 + length + extra))
    expected = [(tokens[i:i + length], tokens[i + 1:i + length + 1]) for i in range(0, len(tokens) - length, stride)]
    dataset = SlidingWindowDataset(torch.tensor(tokens), length, stride)
    assert len(dataset) == len(expected)
    assert [(x.tolist(), y.tolist()) for x, y in (dataset[i] for i in range(len(dataset)))] == expected


@given(**sizes)
def test_every_token_but_the_first_is_a_target_unless_a_last_window_would_not_fill(extra, length, stride):
    dataset = SlidingWindowDataset(torch.arange(length + extra), length, min(stride, length))
    seen = torch.cat([targets for _, targets in (dataset[i] for i in range(len(dataset)))]).unique().tolist()
    assert seen == list(range(1, seen[-1] + 1)) and length + extra - 1 - seen[-1] < min(stride, length)


def test_windows_are_views_of_the_one_tensor():
    token_ids = torch.arange(30)
    dataset = SlidingWindowDataset(token_ids, 4, 3)
    for i in range(len(dataset)):
        inputs, targets = dataset[i]
        assert inputs.data_ptr() == token_ids.data_ptr() + i * 3 * token_ids.element_size()
        assert targets.data_ptr() == inputs.data_ptr() + token_ids.element_size()


def test_an_index_tensor_gives_a_batch():
    dataset = SlidingWindowDataset(torch.arange(30), 4, 3)
    inputs, targets = dataset[torch.tensor([2, 0, 5])]
    assert inputs.tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [15, 16, 17, 18]] and torch.equal(targets, inputs + 1)


def test_a_data_loader_can_read_it():
    loader = torch.utils.data.DataLoader(SlidingWindowDataset(torch.arange(9), 4, 2), batch_size=3)
    (inputs, targets), = loader
    assert inputs.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]] and torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("n, length, stride", [(4, 4, 1), (0, 1, 1), (9, 0, 1), (9, 4, 0), (9, -1, 1), (9, 4, -2)])
def test_too_few_tokens_and_senseless_sizes_are_refused(n, length, stride):
    with pytest.raises(ValueError):
        SlidingWindowDataset(torch.arange(n), length, stride)
