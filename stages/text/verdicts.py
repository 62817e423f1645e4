"""Probabilities of verdicts, from the tokens of an answer.

Where a structured answer names a verdict, the tokens that the model might have written instead say how likely the other
verdicts were. It knows no rubric.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from pipeline.engines import TokenChoice

_VERDICT = re.compile('"verdict":"')
_BARE = re.compile(r'(?<!\\)"(?=[^"\\]*(?:\\.[^"\\]*)*"$)')  # before the last string


def read_probabilities(
    tokens: Sequence[TokenChoice], verdicts: Sequence[Sequence[str]], *, is_bare: bool = False
) -> Iterator[Mapping[str, float] | None]:
    """The probabilities of each question's verdicts in an answer that names them in this order; they sum to 1.

    Whitespace is ignored: decoded one by one, tokens of some vocabularies lose theirs.

    Args:
        tokens: of the whole answer.
        verdicts: for each question, its possible verdicts.
        is_bare: the answer ends with the one verdict as a JSON string, and no key is before it.

    Yields:
        None for a question whose verdict is not found, or has no likely token in common with any verdict.
    """
    pieces = [_squeeze(token.text) for token in tokens]
    # Quotes within a string are escaped, so the key is found only as a key. Thoughts before the answer may have it too.
    places = [match.end() for match in (_BARE if is_bare else _VERDICT).finditer("".join(pieces))]
    missing = max(0, len(verdicts) - len(places))
    yield from [None] * missing
    for place, names in zip(places[len(places) - len(verdicts) + missing :], verdicts[missing:], strict=True):
        yield _follow_tokens(tokens, pieces, place, names)


def _follow_tokens(
    tokens: Sequence[TokenChoice], pieces: Sequence[str], place: int, verdicts: Sequence[str]
) -> Mapping[str, float] | None:
    """Shares the probability of each token among the verdicts that it begins, from `place` until one is left."""
    ends = list(accumulate(map(len, pieces)))
    index = next(i for i, end in enumerate(ends) if end > place)
    written = "".join(pieces)[ends[index] - len(pieces[index]) : place]  # of this token, before the verdict
    spelled = {name: written + _squeeze(json.dumps(name, ensure_ascii=False)[1:]) for name in verdicts}
    found: defaultdict[str, float] = defaultdict(float)
    scale, begun = 1.0, ""
    while spelled and index < len(tokens):
        if not pieces[index]:
            index += 1
            continue
        shares: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for text, logprob in tokens[index].logprobs.items():
            whole = begun + _squeeze(text)
            fitting = tuple(name for name, full in spelled.items() if full.startswith(whole) or whole.startswith(full))
            if fitting and len(whole) > len(begun):
                shares[fitting] += math.exp(logprob)
        total = math.fsum(shares.values())
        if not total:
            return None
        begun += pieces[index]
        open_names = tuple(n for n, full in spelled.items() if full.startswith(begun) or begun.startswith(full))
        for names, share in shares.items():
            if names != open_names or len(names) == 1:
                for name in names:  # where tokens that were not written would have led is unknown
                    found[name] += scale * share / total / len(names)
        scale *= shares[open_names] / total if len(open_names) > 1 else 0.0
        spelled = {name: spelled[name] for name in open_names} if len(open_names) > 1 else {}
        index += 1
    for name in spelled:  # the answer ended before they differed
        found[name] += scale / len(spelled)
    return {name: found[name] for name in verdicts}


def _squeeze(text: str) -> str:
    return "".join(text.split())
