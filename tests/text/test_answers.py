"""How an answer is read: where sentences end, what loops, what follows a schema, and what is noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import Reply
from stages import flags
from stages.text import answers, json_schema
from stages.text.answers import AnswerFormat
from stages.text.repetition import find_loop
from stages.text.sentences import split_sentences

SPLITS = [
    "A cat sleeps.|A dog barks!|Is it raining?|Perhaps…",
    "The tower is 3.5 m high and 1.2 m wide.|Its top is red.",
    "Dr. Brown and Mr. Smith stand by St. Mary's Church.|They wave.",
    "Fruit, e.g. Apples and pears, lies on the table.|It costs approx. 5 euros.",
    "J. R. R. Tolkien is written on the cover.|The book is old.",
    "Fig. 3 shows a map of the U.S. 101 road.|No. 7 is circled.",
    'The sign reads "Stop. Go back." in red.|A car waits.',
    'The sign reads "STOP."|A car waits.',
    "The sign reads “Danger! Keep out.” and hangs low.|It is rusty.",
    'A 12" ruler lies on the desk.|A pen lies beside it.',
    'A label says "SALE.|50 % off on Mondays.',  # a quotation that is never closed protects nothing
    "The clock shows 10:30 a.m. and the shop is open.|Nobody is there.",
    "The street is crowded at 5 p.m.|People carry umbrellas, bags, etc.|One wears a hat.",
    "1. A red car is parked.\n2. A blue car drives by.".replace("\n", "|"),
    "- A red car\n- A blue car".replace("\n", "|"),
    "Wait... what is this?|It is a cat.",
    "He has vitamin C.|It is orange.".replace("|", " "),  # an initial as like as not
    "It was I.|Nobody else came.",
    "猫が眠る。|犬が吠える！|雨ですか？",
    "The URL example.com/a.b is printed below.|It is small.",
    "Three (3) boats float.|(One is red.)|The sky is grey.",
    "One sentence without an end",
]


@pytest.mark.parametrize("marked", SPLITS)
def test_a_sentence_ends_where_it_ends(marked: str) -> None:
    parts = marked.split("|")
    joint = "" if "猫" in marked else "\n" if marked[:2] in ("1.", "- ") else " "
    assert split_sentences(joint.join(parts)) == parts


@given(st.text(alphabet="ab A1.!?\"“”'()\n。 e.g.", max_size=60))
def test_splitting_loses_nothing_but_white_space(text: str) -> None:
    found = split_sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() and "\n" not in sentence for sentence in found)
    assert len(found) > 0 or not text.strip()


MARKET = (
    "A busy street market stretches along a narrow lane between two rows of old brick houses. In the foreground, a"
    " woman in a yellow raincoat leans over a wooden crate of oranges while the seller, a bearded man in a green"
    " apron, weighs a bag on a brass scale that reads 1.5 kg. Behind them, three more stalls offer bread, cheese and"
    " flowers under striped awnings. A hand-painted sign reads “FRESH FISH 3.50”. Wet cobblestones reflect the grey"
    " sky, and a bicycle with a wicker basket leans against a lamp post on the right."
)
HEALTHY = {
    "prose": MARKET,
    "a list": "\n".join(
        f"- {colour} {thing} on the {shelf} shelf"
        for shelf in ("top", "middle", "bottom")
        for colour, thing in (("A red", "vase"), ("A blue", "bowl"), ("A green", "bottle"), ("A white", "plate"))
    ),
    "a grid": "The top row has a red square, a blue square and a green square. The middle row has a red square, a"
    " blue square and a green square. The bottom row has a red square, a blue square and a green square.",
    "a chess board": "The first rank shows white, black, white, black, white, black, white and black squares.",
    "left and right": "On the left there is a man wearing a blue shirt and black trousers. On the right there is a man"
    " wearing a blue shirt and black trousers. Between them there is a dog.",
    "a clock face": "The clock shows the numbers 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 12 around its white face.",
    "a calendar": "The calendar lists " + " ".join(str(n) for n in range(1, 32)) + " below the word MAY.",
    "decimals": "The scale reads 0.5 kg, 0.5 kg, 0.5 kg, 1.5 kg and 2.5 kg for the five bags on the counter.",
    "an elevator": "The panel has " + ", ".join(f"floor {n}" for n in range(1, 15)) + " and two arrows.",
    "laughter": 'A cartoon man with a wide open mouth says "HA HA HA HA HA HA HA HA!" to a startled bird.',
    "emphasis": "A very, very, very long dachshund lies on a very, very small sofa.",
    "a chorus": f'{MARKET} A poster quotes "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily,'
    ' merrily, life is but a dream."',
    "a rule": f"{MARKET}\n{'-' * 40}\n{MARKET[:90]}",
    "a refrain": f'{MARKET} The banner says "We shall overcome." twice: "We shall overcome."',
    "scenes": "There are three objects. There is a small red circle. There is a large striped blue star. There is a"
    " small dotted green ring. The red circle is left of the blue star. The red circle is above the green ring. The"
    " blue star is right of the green ring. The background is grey.",
    "one word": "Cat.",
    "nothing": "",
}
LOOPS = {
    "a phrase": f"{MARKET} a bag of oranges" + " and a bag of oranges" * 12,
    "a phrase in the middle": "A shop." + " on the shelf" * 14 + f" {MARKET}",
    "a word": "The dog is very" + " very" * 40,
    "a sentence": "There is a small red circle. " * 3,
    "a long sentence": f"{MARKET} {MARKET[:88]} {MARKET[:88]} {MARKET[:88]}",
    "the whole text": f"{MARKET}\n\n{MARKET}",
    "lines": "\n".join(["- A wooden chair", "- A wooden table"] * 12),
    "numbered lines": "\n".join(f"{n}. A red chair stands by the wall." for n in range(1, 40)),
    "numbered items": "The shelf holds " + ", ".join(f"box {n}" for n in range(1, 60)),
    "two in turn": "The man looks at the dog. The dog looks at the man. " * 8,
    "characters": "It says " + "ha" * 80,
    "marks": "A cat" + "!" * 120,
    "no white space": "图片中有一只猫" + "和一只狗" * 30,
    "at the end": f"{MARKET} The man's hat is grey, the man's coat is grey," + " the man's shoes are grey," * 9,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_people_write_does_not_loop(name: str) -> None:
    assert find_loop(HEALTHY[name]) == ""


@pytest.mark.parametrize("name", LOOPS)
def test_what_models_write_without_end_loops(name: str) -> None:
    assert find_loop(LOOPS[name]) != ""


words = st.lists(st.sampled_from([f"word{chr(97 + i)}" for i in range(26)]), min_size=1, max_size=12, unique=True)


@given(words, st.integers(0, 30))
def test_any_phrase_said_often_enough_loops(phrase: list[str], before: int) -> None:
    repeated = " ".join(phrase * (40 // len(phrase) + 3))
    assert find_loop(f"{' '.join(MARKET.split()[:before])} {repeated}") != ""


@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=300, unique=True))
def test_words_that_never_come_again_do_not_loop(letters: list[str]) -> None:
    assert find_loop(" ".join(letters)) == ""


# Schemas

THING = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}
FORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["cat", "dog"]},
        "names": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 4}, "maxItems": 2},
        "thing": THING,
        "share": {"anyOf": [{"type": "number", "maximum": 1}, {"type": "null"}]},
    },
    "required": ["kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "cat", "names": ["Tom"], "thing": {"n": 0, "more": 1}, "share": None}, ""),
        ({"kind": "cow"}, "kind is 'cow', not one of cat, dog"),
        ({}, "'kind' is missing"),
        ({"kind": "cat", "size": 1}, "'size' is not allowed"),
        ({"kind": "cat", "names": ["Tom", ""]}, "names[1] is below its minLength of 1"),
        ({"kind": "cat", "names": ["Thomas"]}, "names[0] is above its maxLength of 4"),
        ({"kind": "cat", "names": ["a", "b", "c"]}, "names is above its maxItems of 2"),
        ({"kind": "cat", "names": "Tom"}, "names is not of type array"),
        ({"kind": "cat", "thing": {}}, "'n' is missing in thing"),
        ({"kind": "cat", "thing": {"n": True}}, "thing.n is not of type integer"),
        ({"kind": "cat", "thing": {"n": -1}}, "thing.n is below its minimum of 0"),
        ({"kind": "cat", "share": 2}, "share matches no alternative of anyOf"),
        ([], "the answer is not of type object"),
    ],
)
def test_what_breaks_a_schema_is_named(value: Any, message: str) -> None:
    assert json_schema.find_problem(value, FORM) == message


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "object", "properties": {"a": {"pattern": "x"}}}, "schema.properties.a: 'pattern' is not supported"),
        ({"type": "text"}, "'text' is not a type"),
        ({"type": "array", "items": {"anyOf": [{"not": {}}]}}, "schema.items.anyOf\\[0\\]: 'not' is not supported"),
        ([], "schema is not a table"),
    ],
)
def test_a_schema_that_says_more_than_is_checked_is_refused(schema: Any, message: str) -> None:
    json_schema.check_schema(FORM)
    with pytest.raises(ValueError, match=message):
        json_schema.check_schema(schema)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        max_leaves=10,
    )
)
def test_json_is_read_also_from_a_code_fence(value: Any) -> None:
    text = json.dumps(value)
    assert json_schema.parse_json(text) == json_schema.parse_json(f"```json\n{text}\n```\n") == value


def test_a_string_may_have_line_breaks_and_tabs_as_they_are() -> None:
    assert json_schema.parse_json('{"reason": "a\tred\nring"}') == {"reason": "a\tred\nring"}


@pytest.mark.parametrize("text", ["", "{", "NaN", "[1,]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        json_schema.parse_json(text)


# Answers


def form(value: Any) -> str:
    return f"A {value['kind']}."


@pytest.mark.parametrize(
    ("reply", "structured", "status"),
    [
        (Reply(text=f" {MARKET}\n", finish_reason="stop"), False, "ok"),
        (Reply(error="too long"), False, "error"),
        (Reply(text=" \n", finish_reason="stop"), False, "empty"),
        (Reply(text="", finish_reason="length"), False, "empty"),
        (Reply(text=MARKET, finish_reason="length"), False, "truncated"),
        (Reply(text=LOOPS["a phrase"], finish_reason="stop"), False, "repeated"),
        (Reply(text=LOOPS["a phrase"], finish_reason="length"), False, "repeated"),
        (Reply(text='{"kind": "cat"}', finish_reason="stop"), True, "ok"),
        (Reply(text='{"kind": "ca', finish_reason="length"), True, "truncated"),
        (Reply(text='{"kind": "ca', finish_reason="stop"), True, "invalid"),
        (Reply(text='{"kind": "cow"}', finish_reason="stop"), True, "invalid"),
        (Reply(text='{"kind": "cat"' + "}" * 90, finish_reason="stop"), True, "repeated"),
    ],
)
def test_an_answer_is_accepted_or_the_row_says_why_not(reply: Reply, structured: bool, status: str) -> None:
    answer = answers.read_answer(reply, AnswerFormat(schema=FORM, to_prose=form) if structured else None)
    assert answer.status == status and (answer.error is None) == (status == "ok")
    if status == "ok":
        assert (answer.text, answer.fields) == (("A cat.", '{"kind": "cat"}') if structured else (MARKET, None))
    else:
        assert (answer.text, answer.fields) == (reply.text.strip(), None)


# Flags

NOTICED = {
    MARKET: [],
    "A sign reads “I'm sorry, we're closed” on a shop door.": [],
    "A woman in this photograph album smiles; the picture frame is gold.": [],
    "I'm sorry, but I cannot describe this image.": ["refusal"],
    "I am unable to provide a description of the people.": ["refusal"],
    "Unfortunately, I can’t help with that.": ["refusal"],
    "As an AI language model, I have no eyes.": ["refusal"],
    "The image shows a cat on a mat.": ["meta_commentary"],
    "This image depicts a cat.": ["meta_commentary"],
    "A cat sits. The photo also captures a dog.": ["meta_commentary"],
    "In this picture, a cat sits on a mat.": ["meta_commentary"],
    "Here is a detailed caption for the image: A cat.": ["meta_commentary"],
    "Sure! A description follows: a cat.": ["meta_commentary"],
    "A cat on a mat. Let me know if you need more.": ["meta_commentary"],
    "A cat, unlike the alt text says.": ["prompt_leak"],
    "assistant: A cat on a mat.": ["prompt_leak"],
    "A cat. This description is highly accurate and complete.": ["meta_commentary", "self_praise"],
    "A cat.<|im_end|>": ["special_token"],
    "**Subject**: a cat.": ["markdown"],
    "Things:\n- a cat\n- a dog": ["markdown"],
}


@pytest.mark.parametrize("text", NOTICED)
def test_what_is_noticed(text: str) -> None:
    patterns = flags.load("english", run=None)
    assert list(flags.find_flags(text, patterns)) == NOTICED[text]


def test_an_answer_that_quotes_the_prompt_is_noticed() -> None:
    prompt = "Describe the picture. Say only what can be seen, and begin with the subject."
    assert flags.find_flags("A cat. Say only what can be seen, and begin with it.", {}, prompt=prompt) == (
        "prompt_leak",
    )
    assert flags.find_flags("A cat that can be seen begins with the subject.", {}, prompt=prompt) == ()
