"""The draw of the captions that people label: even, the same for everybody, and in proportion over scores and passes.

A draw of more captions begins with those of a smaller one, so labels are never lost. Kept captions (those that are
exported) and refused ones are two populations, drawn apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.storage import database

Population = Literal["kept", "refused"]
POPULATIONS: dict[Population, str] = {  # conditions on verdicts
    "kept": "v.chosen",
    "refused": "NOT v.keep AND c.status = 'ok'",
}
NUM_BANDS = 10  # of the mean score
MAX_POPULATION = 20_000  # captions whose features are read; of more, an even draw

# Captions of a population in the order of the draw. Within each stratum (a pass and a band of the mean score) they are
# ordered by a hash of seed and identity; across strata, by their rank over the stratum's size, so that any number of
# first rows has the strata in proportion.
ORDERED = """
    WITH scored AS (
        SELECT v.key, v.caption, v.candidate, c.text, v.reason,
            md5_number_lower(concat_ws('/', {seed}, v.key, v.caption, v.candidate)) AS chance,
            coalesce((SELECT list({{'name': s.name, 'value': s.value, 'worst': list_min(list_transform(s.criteria,
                lambda x: x.value))}} ORDER BY s.name) FROM score AS s
                WHERE s.key = v.key AND s.caption = v.caption AND s.candidate = v.candidate), []) AS scores
        FROM verdict AS v JOIN caption AS c ON c.key = v.key AND c.name = v.caption AND c.candidate = v.candidate
        WHERE {condition}
    ), banded AS (
        SELECT *, least({bands} - 1, floor({bands} * coalesce(list_avg(list_transform(scores, lambda x: x.value)), 0)))
            AS band FROM scored
    )
    SELECT key, caption, candidate, text, reason, scores, count(*) OVER () AS size
    FROM banded
    ORDER BY (row_number() OVER (PARTITION BY caption, band ORDER BY chance, key, candidate) - 0.5)
        / count(*) OVER (PARTITION BY caption, band), chance, key, caption, candidate
    LIMIT {limit}"""


@dataclass(frozen=True, kw_only=True)
class DrawnScore:
    """A caption's value by one score pass."""

    name: str
    value: float | None  # [0, 1]
    worst: float | None  # the lowest value of its criteria


@dataclass(frozen=True, kw_only=True)
class DrawnCaption:
    """A caption of a population, in the order of the draw."""

    key: str
    caption: str  # its pass
    candidate: int
    text: str
    reason: str | None  # for which it was refused
    scores: tuple[DrawnScore, ...]
    size: int  # captions in the population

    @property
    def id(self) -> tuple[str, str, int]:
        return (self.key, self.caption, self.candidate)


def draw_captions(
    connection: database.Connection, population: Population, *, seed: int, limit: int
) -> Iterator[DrawnCaption]:
    """The first `limit` captions of a population in the order of the draw."""
    sql = ORDERED.format(seed=seed, condition=POPULATIONS[population], bands=NUM_BANDS, limit=limit)
    for key, caption, candidate, text, reason, scores, size in database.query_rows(connection, sql):
        yield DrawnCaption(
            key=key,
            caption=caption,
            candidate=candidate,
            text=text,
            reason=reason,
            scores=tuple(DrawnScore(**score) for score in scores),
            size=size,
        )
