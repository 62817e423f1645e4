"""The promises of the simulated teachers: each errs in its own way, together they err less, and labels are right."""

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import Request
from pipeline.sources.scenes import Scene, draw_scene
from stages.scenes import teachers
from stages.scenes.claims import count_claims, group_claims, parse_caption, write_sentence
from stages.scenes.teachers import (
    TEACHERS,
    Config,
    answer_statement,
    are_true,
    caption_scene,
    draw_statement,
    list_swaps,
    merge_captions,
)

scenes = st.builds(draw_scene, st.integers(0, 3), st.integers(0, 10_000))


def mean_f1(captions: list[str], shown: list[Scene]) -> float:
    return sum(count_claims(text, one).f1 for text, one in zip(captions, shown, strict=True)) / len(shown)


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    return {name: [caption_scene(name, draw_scene(1, i), 0) for i in range(300)] for name in TEACHERS}


def test_the_consensus_is_better_than_each_teacher(said: dict[str, list[str]]) -> None:
    shown = [draw_scene(1, i) for i in range(300)]
    together = mean_f1([merge_captions(captions) for captions in zip(*said.values(), strict=True)], shown)
    assert all(mean_f1(captions, shown) + 0.02 < together for captions in said.values())


def test_teachers_speak_the_grammar(said: dict[str, list[str]]) -> None:
    assert not any(parse_caption(text).unparsed for captions in said.values() for text in captions)
    assert all(text for captions in said.values() for text in captions)


def test_blind_spots_are_tendencies(said: dict[str, list[str]]) -> None:
    """What a teacher mostly leaves out it says at times: a student could discover it."""
    shown = [(i, t.name) for i in range(300) for t in draw_scene(1, i).things if t.size == "small"]
    named = {
        name: sum(
            any(c.kind == "object" and c.about == thing for c in parse_caption(said[name][i]).claims)
            for i, thing in shown
        )
        for name in ("hasty", "plain")
    }
    assert 0.3 * len(shown) < named["hasty"] < 0.75 * len(shown)
    assert named["plain"] > 0.85 * len(shown)


@given(st.sampled_from(list(TEACHERS)), scenes, st.integers(0, 100))
def test_a_teacher_repeats_itself(name: str, one: Scene, seed: int) -> None:
    assert caption_scene(name, one, seed) == caption_scene(name, one, seed)


@given(scenes, st.integers())
def test_labels_are_the_truth(one: Scene, seed: int) -> None:
    sentence = draw_statement(one, Random(seed))
    (parsed,) = parse_caption(sentence).sentences
    reason, true = answer_statement(sentence, one)
    assert true == are_true(parsed.claims, one)
    assert reason


def test_half_of_the_statements_are_true() -> None:
    rng = Random(0)
    for heard in (None, "boxy"):
        texts = [
            (draw_statement(one, rng, text=heard and caption_scene(heard, one, 0)), one)
            for i in range(800)
            if (one := draw_scene(2, i))
        ]
        share = sum(answer_statement(text, one)[1] for text, one in texts) / len(texts)
        assert (0.45 if heard is None else 0.25) < share < 0.55


@given(scenes, st.integers())
def test_a_swap_changes_one_word(one: Scene, seed: int) -> None:
    rng = Random(seed)
    group = rng.choice(group_claims(parse_caption(caption_scene("plain", one, seed)).sentences[0].claims))
    for other in list_swaps(group):
        before, after = (set(write_sentence(g, Random(1)).lower().replace(".", "").split()) for g in (group, other))
        noise = {"is", "are", "object", "objects", "a", "an"}
        assert len((before - after) - noise) <= 3


def ask(voice: str, prompt: str, source_key: str = "scenes/0/3", seed: int = 0) -> tuple[str, str | None]:
    engine = teachers.open(Config(teacher=voice))  # type: ignore[arg-type]
    (reply,) = engine.generate([Request(id="x", prompt=prompt, source_key=source_key, seed=seed)])
    return reply.text, reply.error


def test_as_an_engine_they_find_the_truth_by_the_source_key() -> None:
    assert ask("warm", "Describe.", "scenes/0/3/copy-9", seed=4)[0] == caption_scene("warm", draw_scene(0, 3), 4)
    assert ask("warm", "Describe.", "photos/cat.jpg")[1] is not None
    background = draw_scene(0, 3).background
    right = ask("labeller", f"Does the sentence hold?\n\nThe background is {background}.")[0]
    assert json.loads(right) == {"reason": f"{background} background", "verdict": "yes"}
    assert json.loads(ask("labeller", "Does the sentence hold?\nThis is a fine caption.")[0])["verdict"] == "no"
    assert len({ask("speaker", "", seed=seed)[0] for seed in range(20)}) > 5
