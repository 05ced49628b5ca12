"""Which tokens are trained."""

from pathlib import Path

import pytest
from tiny_models import CHATML, IM_END, byte_tokenizer

from train_jobs.data import DataError, Dialogue, Message
from train_jobs.tokens import IGNORED, Sample, prompt_ids, tokenize

PATH = Path("chats.jsonl")


def dialogue(*turns: tuple[str, str], line: int = 3) -> Dialogue:
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns)
    return Dialogue(line=line, messages=messages, answer_contains=None)


def trained_text(sample: Sample) -> str:
    ids = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    text: str = byte_tokenizer().decode(ids)
    return text


def test_every_answer_is_trained_with_its_end_and_nothing_else() -> None:
    turns = (("system", "s"), ("user", "q"), ("assistant", "答え"), ("user", "r"), ("assistant", "two"), ("user", "t"))
    data = tokenize([dialogue(*turns)], byte_tokenizer(), path=PATH, max_length=500)
    (sample,) = data.samples
    assert trained_text(sample) == "答え<|im_end|>two<|im_end|>"
    # what follows the last answer is not even read
    assert byte_tokenizer().decode(sample.input_ids).endswith("two<|im_end|>\n")
    # 2 characters of 3 bytes, 3 of 1, two ends
    assert data.num_trained_tokens == 6 + 3 + 2
    assert data.num_cut == 0


def test_the_trained_prompt_is_the_served_prompt() -> None:
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    tokenizer = byte_tokenizer()
    (sample,) = tokenize([dialogue(*turns)], tokenizer, path=PATH, max_length=500).samples
    prompt = prompt_ids([{"role": r, "content": c} for r, c in turns[:3]], tokenizer)
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)] == tokenizer("b").input_ids[0]


def test_stop_tokens_of_the_catalog_end_a_turn_too() -> None:
    template = CHATML.replace("<|im_end|>", "#")
    tokenizer = byte_tokenizer(template)
    (stop,) = tokenizer("#").input_ids
    asked = [dialogue(("user", "q"), ("assistant", "ok"))]
    (with_stop,) = tokenize(asked, tokenizer, path=PATH, max_length=99, stop_token_ids=[stop]).samples
    (without,) = tokenize(asked, tokenizer, path=PATH, max_length=99).samples
    assert trained_text(with_stop) == "ok#"
    assert trained_text(without) == "ok#\n"


def test_long_samples_keep_their_beginning_and_are_counted() -> None:
    turns = (("user", "q"), ("assistant", "a" * 50))
    whole, cut = (tokenize([dialogue(*turns)], byte_tokenizer(), path=PATH, max_length=n) for n in (100, 40))
    assert len(whole.samples[0].input_ids) == whole.num_tokens > 40
    assert (whole.num_cut, cut.num_cut) == (0, 1)
    assert cut.samples[0].input_ids == whole.samples[0].input_ids[:40]
    assert IM_END not in cut.samples[0].labels


def test_a_sample_with_nothing_left_to_train_is_refused_by_line() -> None:
    long = dialogue(("user", "q" * 50), ("assistant", "a"), line=12)
    with pytest.raises(DataError, match=r"chats.jsonl:12: nothing to train on is left within max_length=40"):
        tokenize([long], byte_tokenizer(), path=PATH, max_length=40)


def test_templates_that_rewrite_what_came_before_are_refused() -> None:
    # drops earlier answers, as templates of reasoning models do with thoughts
    forgetful = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else '' }}")
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"chats.jsonl:3: messages.1: the chat template does not render"):
        tokenize([dialogue(*turns)], byte_tokenizer(forgetful), path=PATH, max_length=99)


def test_what_a_template_refuses_is_reported_in_its_words() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"chats.jsonl:3: no system role"):
        tokenize([dialogue(("system", "s"), ("assistant", "a"))], byte_tokenizer(strict), path=PATH, max_length=99)


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"chats.jsonl:3: .*chat_template"):
        tokenize([dialogue(("assistant", "a"))], tokenizer, path=PATH, max_length=99)
