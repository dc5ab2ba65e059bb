"""JSON lines files and prompts: what is read, and errors that name file, line and remedy."""

import pytest
from helpers import tiny_tokenizer, write_lines

from hf_jetflow.errors import JetFlowError
from hf_jetflow.jsonl import read_jsonl
from hf_jetflow.prompts import encode_chat, read_prompts


def test_json_lines_are_read_in_order_and_blank_lines_skipped(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, "", {"x": 2})
    assert list(read_jsonl(path)) == [{"x": 1}, {"x": 2}]


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, '{"x": ', end="")
    assert list(read_jsonl(path)) == [{"x": 1}]


def test_a_complete_last_line_without_newline_is_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, {"x": 2}, end="")
    assert list(read_jsonl(path)) == [{"x": 1}, {"x": 2}]


def test_a_line_cut_off_within_a_character_is_left_out_at_the_end_and_named_elsewhere(tmp_path):
    cut = '{"x": "é'.encode()[:-1]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\n' + cut)
    assert list(read_jsonl(path)) == [{"x": 1}]
    path.write_bytes(cut + b'\n{"x": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not UTF-8 text"):
        list(read_jsonl(path))


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": 2}\n', encoding="utf-16")
    with pytest.raises(JetFlowError, match=r"a\.jsonl, line 1: not UTF-8 text; save the file as UTF-8"):
        list(read_jsonl(path))


def test_a_bad_line_is_named_with_file_and_number(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, "{'x': 2}", {"x": 3})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON \(Expecting [^:]*, column 2\); repair"):
        list(read_jsonl(path))


def test_plain_text_in_place_of_objects_is_refused_with_an_example_of_a_line(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", "Why is the sky blue?")
    with pytest.raises(
        JetFlowError, match=r'line 1: not valid JSON .*; write one object .* such as \{"prompt": "..."\}'
    ):
        read_prompts([path])


def test_a_line_that_holds_no_object_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"x": 1}, [1, 2])
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, got a list"):
        list(read_jsonl(path))


def test_prompts_are_read_from_messages_turns_and_prompt(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write_lines(
        tmp_path / "a.jsonl",
        {"id": 7, "messages": messages},
        {"turns": ["first", "second"]},
        {"prompt": "text", "source": "web"},
    )
    assert read_prompts([path]) == [
        {"id": "7", "source": "a", "messages": messages},
        {"id": "a-2", "source": "a", "messages": [{"role": "user", "content": "first"}]},
        {"id": "a-3", "source": "web", "messages": [{"role": "user", "content": "text"}]},
    ]


def test_a_prompt_without_text_is_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "x"}, {"text": "y"})
    with pytest.raises(ValueError, match=r"line 2: expected `messages`, `turns` or `prompt`, got \['text'\]"):
        read_prompts([path])


def test_a_prompt_id_that_occurs_twice_is_named(tmp_path):
    paths = [write_lines(tmp_path / name, {"id": "one", "prompt": name}) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: the id 'one' occurs twice"):
        read_prompts(paths)


def test_a_conversation_is_encoded_by_the_chat_template():
    messages = [{"role": "user", "content": "t009 t008"}]
    assert encode_chat(tiny_tokenizer(20), messages) == [3, 9, 8, 4, 5]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 7}, "expected text in `prompt`, got 7"),
        ({"turns": "one"}, 'expected a list of texts in `turns`, got "one"'),
        ({"turns": [{"content": "one"}]}, "expected a list of texts in `turns`"),
        (
            {"messages": "one"},
            'expected `messages` to be a list of objects with `role` and text as `content`, got "one"',
        ),
        ({"messages": []}, "expected `messages` to be a list"),
        ({"messages": [{"role": "user"}]}, "expected `messages` to be a list"),
        ({"messages": ["one"]}, "expected `messages` to be a list"),
        ({"messages": [{"role": "user", "content": 5}]}, "with `role` and text as `content`, got [{"),
        ({"prompt": "", "turns": []}, "`prompt` is empty; fill it, or remove the line"),
        ({"turns": []}, "`turns` is empty; fill it, or remove the line"),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_file_and_line(tmp_path, record, message):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "x"}, "", record)
    with pytest.raises(JetFlowError, match=r"a\.jsonl, line 3: ") as error:
        read_prompts([path])
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n", '{"prompt": '])
def test_a_file_without_prompts_is_refused(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(JetFlowError, match=r"a\.jsonl holds no prompts; write one on each line, such as"):
        read_prompts([path])


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    with pytest.raises(JetFlowError, match="does not exist or is a folder; give the path of a JSON lines file"):
        read_prompts([tmp_path / name])
