"""Thoughts: the marks that models put around their reasoning and around their answer, and the answer without them.

Marks in quotation marks, and those in an answer that is JSON as a whole, belong to the answer. It knows no model.
"""

from __future__ import annotations

import json
import re

NO_END = "the answer has its thoughts in it, and no mark shows where they end"
NO_ANSWER = "the answer has its thoughts in it, and nothing follows them"

_TAGS = "think|thinking|thoughts?|reasoning|reflection|analysis|seed:think"
_UNQUOTED = "(?<![\"'`“‘])"
_OPENING = re.compile(
    rf"{_UNQUOTED}(?:(?i:<(?:{_TAGS})(?:\s[^<>]{{0,40}})?>)|^[ \t]*\[THINK\]|◁think▷|<\|channel\|?>|<unused94>"
    r"|<\|begin_of_thought\|>|<\|START_THINKING\|>)",
    re.MULTILINE,
)
_CLOSING = re.compile(
    rf"{_UNQUOTED}(?:(?i:</(?:{_TAGS})\s{{0,4}}>)|\[/THINK\]|◁/think▷|<channel\|>|<unused95>"
    r"|<\|end_of_thought\|>|<\|END_THINKING\|>"
    r"|<\|channel\|>\s?final[^<]{0,40}(?:<\|constrain\|>[^<]{0,40})?<\|message\|>)"
)
_WRAPPERS = "caption|description|answer|response|output|result|final|final_answer"
_WRAPPER = re.compile(
    rf"(?i:<(?P<name>{_WRAPPERS})>)|(?P<box><\|begin_of_box\|>|<\|begin_of_solution\|>|<\|START_RESPONSE\|>)"
)
_WRAPPER_END = re.compile(rf"(?i:</(?:{_WRAPPERS})>)|<\|end_of_box\|>|<\|end_of_solution\|>|<\|END_RESPONSE\|>")
_ENDS_OF_TURN = (
    "<|im_end|>", "<|end|>", "<|return|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>"
)  # fmt: skip
_BARE_CHANNELS = ("analysis", "assistantfinal")  # OpenAI's channels where special tokens are not decoded
_ANY_MARK = re.compile(rf"[<◁]|\[/?THINK\]|\A{_BARE_CHANNELS[0]}")  # the beginning of each of them


def extract_answer(text: str) -> tuple[str, str]:
    """Returns the answer without thoughts and marks, and what is wrong with it; "" if nothing is.

    An answer follows the last mark that closes thoughts. A text without any marks is returned as it is.

    >>> extract_answer("<think>Let me see.</think> A red cat.")
    ('A red cat.', '')
    """
    if not _ANY_MARK.search(text):
        return text, ""
    answer = _strip_ends_of_turn(text)
    if _is_json(answer):
        return answer, ""
    closings = [match.end() for match in _CLOSING.finditer(answer)]
    if answer.startswith(_BARE_CHANNELS[0]) and _BARE_CHANNELS[1] in answer:
        closings.append(answer.rindex(_BARE_CHANNELS[1]) + len(_BARE_CHANNELS[1]))
    if closings:
        answer = answer[max(closings) :].strip()
        if not answer:
            return text, NO_ANSWER
    if _OPENING.search(answer):
        return text, NO_END
    answer = _unwrap(answer)
    return (answer, "") if answer.strip() or not text.strip() else (text, NO_ANSWER)


def _strip_ends_of_turn(text: str) -> str:
    if not text.rstrip().endswith(_ENDS_OF_TURN):
        return text
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        mark = next((mark for mark in _ENDS_OF_TURN if text.endswith(mark, 0, end)), None)
        if mark is None:
            return text[:end]
        end -= len(mark)


def _is_json(text: str) -> bool:
    if not (text.lstrip().startswith("{") and text.rstrip().endswith("}")):
        return False
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def _unwrap(text: str) -> str:
    """Takes what is between the marks around an answer, of which one may be missing at the text's end or beginning."""
    stripped = text.strip()
    opening = _WRAPPER.search(stripped)
    start = opening.end() if opening else 0
    closing = _WRAPPER_END.search(stripped, start)
    if opening and (closing or opening.start() == 0):
        return stripped[start : closing.start() if closing else None].strip()
    if closing and closing.end() == len(stripped):
        return stripped[: closing.start()].strip()
    return text
