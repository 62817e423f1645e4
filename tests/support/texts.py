"""Texts and a schema that several tests of stages/text use."""

from __future__ import annotations

from typing import Any

MARKET_CAPTION = (
    "A busy street market stretches along a narrow lane between two rows of old brick houses. In the foreground, a"
    " woman in a yellow raincoat leans over a wooden crate of oranges while the seller, a bearded man in a green"
    " apron, weighs a bag on a brass scale that reads 1.5 kg. Behind them, three more stalls offer bread, cheese and"
    " flowers under striped awnings. A hand-painted sign reads “FRESH FISH 3.50”. Wet cobblestones reflect the grey"
    " sky, and a bicycle with a wicker basket leans against a lamp post on the right."
)


HEALTHY = {
    "prose": MARKET_CAPTION,
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
    "a chorus": f'{MARKET_CAPTION} A poster quotes "Row, row, row your boat, gently down the stream. Merrily, merrily,'
    ' merrily, merrily, life is but a dream."',
    "a rule": f"{MARKET_CAPTION}\n{'-' * 40}\n{MARKET_CAPTION[:90]}",
    "a refrain": f'{MARKET_CAPTION} The banner says "We shall overcome." twice: "We shall overcome."',
    "scenes": "There are three objects. There is a small red circle. There is a large striped blue star. There is a"
    " small dotted green ring. The red circle is left of the blue star. The red circle is above the green ring. The"
    " blue star is right of the green ring. The background is grey.",
    "one word": "Cat.",
    "nothing": "",
}


LOOPS = {
    "a phrase": f"{MARKET_CAPTION} a bag of oranges" + " and a bag of oranges" * 12,
    "a phrase in the middle": "A shop." + " on the shelf" * 14 + f" {MARKET_CAPTION}",
    "a word": "The dog is very" + " very" * 40,
    "a sentence": "There is a small red circle. " * 3,
    "a long sentence": f"{MARKET_CAPTION} {MARKET_CAPTION[:88]} {MARKET_CAPTION[:88]} {MARKET_CAPTION[:88]}",
    "the whole text": f"{MARKET_CAPTION}\n\n{MARKET_CAPTION}",
    "lines": "\n".join(["- A wooden chair", "- A wooden table"] * 12),
    "numbered lines": "\n".join(f"{n}. A red chair stands by the wall." for n in range(1, 40)),
    "numbered items": "The shelf holds " + ", ".join(f"box {n}" for n in range(1, 60)),
    "two in turn": "The man looks at the dog. The dog looks at the man. " * 8,
    "characters": "It says " + "ha" * 80,
    "marks": "A cat" + "!" * 120,
    "no white space": "图片中有一只猫" + "和一只狗" * 30,
    "at the end": f"{MARKET_CAPTION} The man's hat is grey, the man's coat is grey," + " the man's shoes are grey," * 9,
}


THING = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0}}, "required": ["n"]}


ANSWER_SCHEMA: dict[str, Any] = {
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
