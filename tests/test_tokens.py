"""Which tokens are trained."""

import pytest
from tiny_models import CHATML, IM_END, byte_tokenizer

from train_jobs.messages import Dialogue, Document, Message
from train_jobs.records import DataError
from train_jobs.tokenized import tokenize
from train_jobs.tokens import IGNORED, Sample, prompt_ids


def dialogue(*turns: tuple[str, str], line: int = 3) -> Dialogue:
    messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns)
    return Dialogue(where=f"chats.jsonl:{line}", messages=messages)


def trained_text(sample: Sample) -> str:
    ids = [token for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED]
    assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    text: str = byte_tokenizer().decode(ids)
    return text


def test_every_answer_is_trained_with_its_end_and_nothing_else() -> None:
    turns = (("system", "s"), ("user", "q"), ("assistant", "答え"), ("user", "r"), ("assistant", "two"), ("user", "t"))
    data = tokenize([dialogue(*turns)], byte_tokenizer(), max_length=500)
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
    (sample,) = tokenize([dialogue(*turns)], tokenizer, max_length=500).samples
    prompt = prompt_ids([{"role": r, "content": c} for r, c in turns[:3]], tokenizer)
    assert list(sample.input_ids[: len(prompt)]) == prompt
    assert sample.labels[len(prompt)] == sample.input_ids[len(prompt)] == tokenizer("b").input_ids[0]


def test_stop_tokens_of_the_catalog_end_a_turn_too() -> None:
    template = CHATML.replace("<|im_end|>", "#")
    tokenizer = byte_tokenizer(template)
    (stop,) = tokenizer("#").input_ids
    asked = [dialogue(("user", "q"), ("assistant", "ok"))]
    (with_stop,) = tokenize(asked, tokenizer, max_length=99, stop_token_ids=[stop]).samples
    (without,) = tokenize(asked, tokenizer, max_length=99).samples
    assert trained_text(with_stop) == "ok#"
    assert trained_text(without) == "ok#\n"


def test_long_samples_keep_their_beginning_and_are_counted() -> None:
    turns = (("user", "q"), ("assistant", "a" * 50))
    whole, cut = (tokenize([dialogue(*turns)], byte_tokenizer(), max_length=n) for n in (100, 40))
    assert len(whole.samples[0].input_ids) == whole.num_tokens > 40
    assert (whole.num_cut, cut.num_cut) == (0, 1)
    assert cut.samples[0].input_ids == whole.samples[0].input_ids[:40]
    assert IM_END not in cut.samples[0].labels


def test_a_sample_with_nothing_left_to_train_is_refused_by_line() -> None:
    long = dialogue(("user", "q" * 50), ("assistant", "a"), line=12)
    with pytest.raises(DataError, match=r"chats.jsonl:12: nothing to train on is left within max_length=40"):
        tokenize([long], byte_tokenizer(), max_length=40)


def test_where_a_template_rewrites_what_came_before_each_answer_is_a_sample_of_its_own() -> None:
    # drops earlier answers, as templates of reasoning models do with thoughts
    forgetful = CHATML.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last or message['role'] == 'user' }}"
    )
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    tokenizer = byte_tokenizer(forgetful)
    first, second = tokenize([dialogue(*turns)], tokenizer, max_length=99).samples
    assert [trained_text(first), trained_text(second)] == ["a<|im_end|>", "b<|im_end|>"]
    # the prompt of the second is what serving sends: without the first answer
    assert "a<|im_end|>" not in tokenizer.decode(second.input_ids)


def test_an_answer_that_does_not_follow_its_prompt_is_refused() -> None:
    # the prompt opens the answer with "> ", and the rendered answer lacks it
    crooked = CHATML + "{% if add_generation_prompt %}{{ '> ' }}{% endif %}"
    with pytest.raises(DataError, match=r"chats.jsonl:3: messages.1: the chat template does not render"):
        tokenize([dialogue(("user", "q"), ("assistant", "a"))], byte_tokenizer(crooked), max_length=99)


def test_the_last_answer_alone_is_trained_where_that_is_wished_and_none_of_weight_0() -> None:
    turns = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    (last,) = tokenize([dialogue(*turns)], byte_tokenizer(), max_length=99, train_on="last").samples
    assert trained_text(last) == "b<|im_end|>"
    spared = Message.model_validate({"role": "assistant", "content": "b", "weight": 0})
    first = dialogue(*turns)
    first = Dialogue(where=first.where, messages=(*first.messages[:3], spared))
    (sample,) = tokenize([first], byte_tokenizer(), max_length=99).samples
    assert trained_text(sample) == "a<|im_end|>"
    assert byte_tokenizer().decode(sample.input_ids).endswith("a<|im_end|>\n")  # what follows is not read


def test_a_text_is_trained_whole_in_pieces_with_its_end_marked() -> None:
    tokenizer = byte_tokenizer()
    data = tokenize([Document(where="a.txt", text="abcdefg")], tokenizer, max_length=3)
    # 7 letters and the end in pieces of 3, 3 and 2
    assert [len(sample.input_ids) for sample in data.samples] == [3, 3, 2]
    assert [sample.labels for sample in data.samples] == [sample.input_ids for sample in data.samples]
    ids = [token for sample in data.samples for token in sample.input_ids]
    assert tokenizer.decode(ids[:-1]) == "abcdefg"
    assert ids[-1] == tokenizer.eos_token_id


def test_tools_are_rendered_and_their_calls_trained_and_a_template_without_them_refuses() -> None:
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}",
    )
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    asked = Dialogue(
        where="chats.jsonl:3",
        messages=tuple(Message.model_validate(message) for message in messages),
        tools=({"type": "function", "function": {"name": "sum"}},),
    )
    tokenizer = byte_tokenizer(with_tools)
    (sample,) = tokenize([asked], tokenizer, max_length=999).samples
    assert '"arguments": {"a": 1}' in trained_text(sample)
    assert tokenizer.decode(sample.input_ids).startswith('[{"type": "function"')
    with pytest.raises(DataError, match=r"chats.jsonl:3: tools: this model's chat template has no place for them"):
        tokenize([asked], byte_tokenizer(), max_length=999)


def test_what_a_template_refuses_is_reported_in_its_words() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"chats.jsonl:3: no system role"):
        tokenize([dialogue(("system", "s"), ("assistant", "a"))], byte_tokenizer(strict), max_length=99)


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"chats.jsonl:3: .*chat_template"):
        tokenize([dialogue(("assistant", "a"))], tokenizer, max_length=99)
