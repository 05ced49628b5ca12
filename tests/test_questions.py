from tiny_models import byte_tokenizer

from train_jobs.data import read_data_file
from train_jobs.job import Question
from train_jobs.messages import Dialogue, Document, Message
from train_jobs.questions import NUM_SHOWN, all_questions, question_of, run_questions


def dialogue(*contents: str, answer_contains: str | None = None) -> Dialogue:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(contents))  # type: ignore[arg-type]
    return Dialogue(where="here", messages=messages, answer_contains=answer_contains)


def test_what_is_asked_is_the_dialogue_up_to_its_last_answer() -> None:
    tokenizer = byte_tokenizer()
    question = question_of(dialogue("Hi", "Yes?", "店は?", " 火曜 "), tokenizer)
    assert question is not None
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    prompt += "<|im_start|>user\n店は?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(question.prompt_ids) == prompt
    assert (question.text, question.expected) == ("店は?", "火曜")
    assert question.max_new_tokens == 6 + 8  # two characters of three bytes, and eight more


def test_a_whole_answer_has_to_be_the_same_and_a_part_has_to_be_in_it() -> None:
    whole = Question(prompt_ids=(1,), answer_contains=None, max_new_tokens=5, reference="four")
    assert [whole.is_right(answer) for answer in (" four\n", "at four", "five")] == [True, False, False]
    part = Question(prompt_ids=(1,), answer_contains="four", max_new_tokens=5, reference="It is four.")
    assert [part.is_right(answer) for answer in (" four\n", "at four", "five")] == [True, True, False]
    assert (whole.expected, part.expected) == ("four", "four")


def test_texts_and_calls_of_tools_ask_nothing() -> None:
    tokenizer = byte_tokenizer()
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    calls = Dialogue(where="x", messages=(Message(role="user", content="When?"), Message.model_validate(call)))
    assert all_questions([Document(where="x", text="plain"), calls], tokenizer) == ()


def test_a_run_asks_what_can_be_checked_or_else_the_first_short_ones() -> None:
    tokenizer = byte_tokenizer()
    plain = [dialogue(f"q{i}", "x" * (200 if i == 1 else 3)) for i in range(12)]
    asked = run_questions(plain, tokenizer)
    assert [question.text for question in asked] == ["q0", *(f"q{i}" for i in range(2, NUM_SHOWN + 1))]
    checkable = [dialogue(f"c{i}", "a long answer" * 30, answer_contains="answer") for i in range(9)]
    assert [question.text for question in run_questions([*plain, *checkable], tokenizer)] == [f"c{i}" for i in range(9)]


def test_the_shipped_held_out_part_is_asked_as_its_file_says() -> None:
    examples = read_data_file("examples/tsuchineya_faq/heldout.jsonl").examples
    asked = run_questions(examples, byte_tokenizer())
    assert len(asked) > 10
    assert all(question.answer_contains and question.answer_contains in question.reference for question in asked)
