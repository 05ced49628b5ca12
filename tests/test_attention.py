import torch
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from serve_apps.attention import Decoding, Prompt, find_places, lay_out, supports


def test_requests_of_similar_length_decode_together_and_prompts_alone() -> None:
    # cached tokens 5, 7, 40 with one new token each, and a prompt of 3 new tokens after 2
    layout = lay_out([0, 1, 2, 3, 6], [0, 5, 12, 52, 57], torch.arange(100, 157), torch.float32)
    short, long, prompt = layout.parts
    assert isinstance(short, Decoding)
    assert short.rows.tolist() == [0, 1]
    assert short.num_cached == 7
    assert isinstance(long, Decoding)
    assert long.rows.tolist() == [2]
    assert long.mask is None
    assert isinstance(prompt, Prompt)
    assert (prompt.rows, prompt.keys) == (slice(3, 6), slice(54, 59))
    # the first request's keys, its last one repeated as padding, then the second's
    assert layout.read_index[:14].tolist() == [100, 101, 102, 103, 104, 104, 104, *range(105, 112)]
    assert layout.read_index[14:].tolist() == list(range(112, 157))


def test_the_places_of_each_row_are_its_own_up_to_its_length() -> None:
    found = find_places(torch.tensor([0, 2, 5]), torch.arange(100, 105), num_heads=4)
    assert found.lengths.tolist() == [2, 3]
    assert found.places[0, :2].tolist() == [100, 101]
    assert found.places[1].tolist() == [102, 103, 104]
    assert found.scores.shape == (2, 4, 3)


def test_padding_is_masked() -> None:
    (part,) = lay_out([0, 1, 2], [0, 5, 12], torch.arange(12), torch.float32).parts
    assert part.mask is not None
    assert part.mask[:, 0, 0].isinf().tolist() == [[False] * 5 + [True] * 2, [False] * 7]


def test_a_later_piece_of_a_prompt_sees_the_earlier_ones() -> None:
    (part,) = lay_out([0, 2], [0, 4], torch.arange(4), torch.float32).parts
    assert part.mask is not None
    assert part.mask[0, 0].isinf().tolist() == [[False, False, False, True], [False] * 4]


def test_with_nothing_cached_every_prompt_is_plain_causal() -> None:
    layout = lay_out([0, 3, 7], [0, 3, 7], torch.empty(0, dtype=torch.long), torch.float32)
    assert layout.parts == (
        Prompt(rows=slice(0, 3), keys=slice(0, 3), mask=None),
        Prompt(rows=slice(3, 7), keys=slice(3, 7), mask=None),
    )
    assert len(layout.read_index) == 0


def test_sliding_windows_are_left_to_transformers() -> None:
    assert supports(LlamaConfig())
    assert supports(GPT2Config())
    assert supports(Qwen2Config(use_sliding_window=False))
    sliding = Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=0, num_hidden_layers=2)
    assert not supports(sliding)
