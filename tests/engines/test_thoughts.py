"""Answers among thoughts and marks."""

from __future__ import annotations

import json
import time

import pytest

from pipeline.engines import Reply, clean_reply
from pipeline.engines._thoughts import NO_ANSWER, NO_END
from stages.text.answers import read_answer
from tests.support.scripted import SOUND

THOUGHTS = "The user wants a caption.\n\nI see a red rectangle."
PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<Thought>", "</Thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
]


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
@pytest.mark.parametrize("space", ["", "\n", "\n\n"])
def test_the_answer_follows_the_closing_mark(opening: str, closing: str, space: str) -> None:
    for before in (opening, "", f"{opening}{THOUGHTS}{closing}{space}{opening}"):
        reply = clean_reply(Reply(text=f"{before}{THOUGHTS}{closing}{space}{SOUND}", finish_reason="stop"))
        assert (reply.text, reply.fault) == (SOUND, "")


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_thoughts_without_an_end_or_without_an_answer_are_refused_by_name(opening: str, closing: str) -> None:
    for text, fault in [
        (f"{opening}{THOUGHTS} {SOUND}", NO_END),
        (f"{opening}{THOUGHTS}{closing}{SOUND}\n{opening}{THOUGHTS}", NO_END),
        (f"{opening}{THOUGHTS}{closing}\n", NO_ANSWER),
    ]:
        answer = read_answer(clean_reply(Reply(text=text, finish_reason="stop")))
        assert (answer.status, answer.error) == ("invalid", fault)
    cut = read_answer(clean_reply(Reply(text=opening + THOUGHTS, finish_reason="length")))
    assert (cut.status, cut.error) == ("truncated", NO_END)


@pytest.mark.parametrize(
    "text",
    [
        f"<caption>{SOUND}</caption>",
        f"<caption>\n{SOUND}\n</caption>\nLet me know if you need more.",
        f"Here it is:\n<caption>{SOUND}</caption>",
        f"<caption>{SOUND}",
        f"{SOUND}</caption>",
        f"<think>{THOUGHTS}</think><answer>{SOUND}</answer>",
        f"<Description>{SOUND}</Description>",
        f"<|begin_of_box|>{SOUND}<|end_of_box|>",
        f"{SOUND}<|im_end|>",
        f"{SOUND}<|eot_id|> \n</s>\n",
        f"analysis{THOUGHTS}assistantfinal{SOUND}",
    ],
)
def test_marks_around_an_answer_are_removed(text: str) -> None:
    assert clean_reply(Reply(text=text, finish_reason="stop")) == Reply(text=SOUND, finish_reason="stop")


@pytest.mark.parametrize(
    "text",
    [
        SOUND,
        f" {SOUND}\n\n{SOUND} ",
        'A sign that reads "<think>" in red, and "</think>" below.',
        "A page of HTML: <b>bold</b> text, a < b, and a [box].",
        "An output of a printer, the answer to a caption. [Think] of it.",
        json.dumps({"text": "a sign with <think> and </think> on it <caption>"}),
        "analysis of a picture",
        "",
        " \n",
    ],
)
def test_sound_answers_are_unchanged(text: str) -> None:
    reply = Reply(text=text, finish_reason="stop")
    assert clean_reply(reply) == reply


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<caption>", "</s>", " ", "<|channel|>final", "[THINK]\n", "<think "]
)
def test_long_answers_of_marks_are_read_in_bounded_time(piece: str) -> None:
    started = time.process_time()
    clean_reply(Reply(text=piece * (250_000 // len(piece)) + "x", finish_reason="stop"))
    assert time.process_time() - started < 2
