"""Simulated teachers: each errs in its own way, their consensus errs less, and labels are right."""

import json
import tomllib
from itertools import permutations
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engines import Reply, Request, Sampling
from pipeline.sections import stamped
from pipeline.sources._scene_words import draw_sign_text
from pipeline.sources.scenes import Scene, draw_scene, is_related
from stages import rubrics
from stages.scenes import teachers
from stages.scenes.claims import (
    count_claims,
    group_claims,
    make_relation,
    parse_caption,
    read_written_relation,
    write_sentence,
)
from stages.scenes.teachers import (
    RELATIONS,
    TEACHERS,
    Config,
    Teacher,
    answer_places,
    answer_statement,
    are_true,
    caption_scene,
    draw_statement,
    draw_strange_statement,
    list_swaps,
    merge_captions,
    repeat_statement,
)
from stages.text.prompts import fence_texts

MANIFESTS = Path(__file__).parents[2] / "manifests"

scenes = st.builds(draw_scene, st.integers(0, 3), st.integers(0, 10_000))


def mean_f1(captions: list[str], truths: list[Scene]) -> float:
    return sum(count_claims(text, one).f1 for text, one in zip(captions, truths, strict=True)) / len(truths)


@pytest.fixture(scope="module")
def captions_by_teacher() -> dict[str, list[str]]:
    return {name: [caption_scene(name, draw_scene(1, i), 0) for i in range(300)] for name in TEACHERS}


def test_the_consensus_is_better_than_each_teacher(captions_by_teacher: dict[str, list[str]]) -> None:
    truths = [draw_scene(1, i) for i in range(300)]
    merged = [merge_captions(captions) for captions in zip(*captions_by_teacher.values(), strict=True)]
    together = mean_f1(merged, truths)
    assert all(mean_f1(captions, truths) + 0.02 < together for captions in captions_by_teacher.values())


def test_teachers_write_in_the_grammar(captions_by_teacher: dict[str, list[str]]) -> None:
    assert not any(parse_caption(text).unparsed for captions in captions_by_teacher.values() for text in captions)
    assert all(text for captions in captions_by_teacher.values() for text in captions)


def test_blind_spots_are_not_absolute(captions_by_teacher: dict[str, list[str]]) -> None:
    """A teacher sometimes states what it mostly leaves out, so that a student can discover it."""
    small = [(i, t.name) for i in range(300) for t in draw_scene(1, i).things if t.size == "small"]
    named = {
        name: sum(
            any(c.kind == "object" and c.about == thing for c in parse_caption(captions_by_teacher[name][i]).claims)
            for i, thing in small
        )
        for name in ("hasty", "plain")
    }
    assert 0.3 * len(small) < named["hasty"] < 0.75 * len(small)
    assert named["plain"] > 0.85 * len(small)


@given(st.sampled_from(list(TEACHERS)), scenes, st.integers(0, 100))
def test_a_teacher_is_deterministic(name: str, one: Scene, seed: int) -> None:
    assert caption_scene(name, one, seed) == caption_scene(name, one, seed)


@given(scenes, st.integers())
def test_labels_are_true(one: Scene, seed: int) -> None:
    sentence = draw_statement(one, Random(seed))
    (parsed,) = parse_caption(sentence).sentences
    reason, true = answer_statement(sentence, one)
    assert true == are_true(parsed.claims, one)
    assert reason


@given(scenes, st.integers())
def test_the_second_revision_explains_relations_as_they_are_written(one: Scene, seed: int) -> None:
    rng = Random(seed)
    for _ in range(4):
        sentence = draw_statement(one, rng)
        (reason, true), (earlier, same) = (answer_statement(sentence, one, revision=n) for n in (2, 1))
        written = read_written_relation(sentence)
        assert true == same and (written or reason == earlier)
        if written and ": no " not in reason:
            about, word, other = written
            _, places, words = reason.split(": ")
            assert [place.rsplit(" ", 2)[0] for place in places.split(", ")] == [about, other]
            assert (word in words.split(", ")) == true


def ask_labeller(sentence: str, *, before: str = "", source_key: str = "scenes/0/3") -> dict[str, str]:
    """The second revision's answer under the rubric that lets it say that it cannot say."""
    rubric = rubrics.load("scenes_open", run=None)
    engine = teachers.open(Config(teacher="labeller", revision=2))
    prompt = rubric.build_prompt(caption=sentence, sentence=sentence, alt_text=None, before=before)
    schema = json.dumps(rubric.schema)
    (reply,) = engine.generate([Request(id="x", prompt=prompt, source_key=source_key, schema=schema)])
    answer: dict[str, str] = json.loads(reply.text)
    return answer


def test_the_second_revision_knows_repeats_and_its_limits() -> None:
    one = draw_scene(0, 3)
    thing = one.things[0]
    sentence = f"A {thing.size} {thing.name}."
    assert ask_labeller(sentence)["verdict"] == "yes"
    again = ask_labeller(sentence, before=f"All is calm. There is a {thing.name}.")
    assert again == {"reason": f"{thing.name} was named before", "verdict": "no"}
    assert ask_labeller(sentence, before=f"The background is {one.background}.")["verdict"] == "yes"
    assert ask_labeller("A dog.")["verdict"] == "cannot say"


@given(st.integers())
def test_strange_statements_have_no_claims(seed: int) -> None:
    (sentence,) = parse_caption(draw_strange_statement(Random(seed))).sentences
    assert not sentence.claims


@given(scenes, st.integers(0, 20))
def test_a_repeater_says_the_last_sentence_again(one: Scene, seed: int) -> None:
    (*before, last) = parse_caption(repeat_statement(caption_scene("plain", one, seed), Random(seed))).sentences
    assert last.claims[0] in {claim for sentence in before for claim in sentence.claims}


def test_a_labeller_of_the_first_revision_has_the_fingerprint_that_it_had() -> None:
    assert stamped(Config(teacher="labeller")) == {"teacher": "labeller", "shared": False}
    sentence = "The blue star is right of the red ring."
    assert read_written_relation(sentence.upper()) == ("blue star", "right of", "red ring")
    assert read_written_relation("A red ring.") is None


def test_half_of_the_statements_are_true() -> None:
    rng = Random(0)
    for teacher in (None, "boxy"):
        texts = [
            (draw_statement(one, rng, text=teacher and caption_scene(teacher, one, 0)), one)
            for i in range(800)
            if (one := draw_scene(2, i))
        ]
        share = sum(answer_statement(text, one)[1] for text, one in texts) / len(texts)
        assert (0.45 if teacher is None else 0.25) < share < 0.55


@given(scenes, st.integers())
def test_a_swap_changes_one_word(one: Scene, seed: int) -> None:
    rng = Random(seed)
    group = rng.choice(group_claims(parse_caption(caption_scene("plain", one, seed)).sentences[0].claims))
    for other in list_swaps(group):
        before, after = (set(write_sentence(g, Random(1)).lower().replace(".", "").split()) for g in (group, other))
        noise = {"is", "are", "object", "objects", "a", "an"}
        assert len((before - after) - noise) <= 3


def ask_engine(voice: str, prompt: str, source_key: str = "scenes/0/3", seed: int = 0) -> tuple[str, str | None]:
    engine = teachers.open(Config(teacher=voice))  # type: ignore[arg-type]
    (reply,) = engine.generate([Request(id="x", prompt=prompt, source_key=source_key, seed=seed)])
    return reply.text, reply.error


def test_the_engine_finds_the_truth_by_the_source_key() -> None:
    assert ask_engine("warm", "Describe.", "scenes/0/3/copy-9", seed=4)[0] == caption_scene("warm", draw_scene(0, 3), 4)
    assert ask_engine("warm", "Describe.", "photos/cat.jpg")[1] is not None
    background = draw_scene(0, 3).background
    right = ask_engine("labeller", f"Does the sentence hold?\n\nThe background is {background}.")[0]
    assert json.loads(right) == {"reason": f"{background} background", "verdict": "yes"}
    assert json.loads(ask_engine("labeller", "Does the sentence hold?\nThis is a fine caption.")[0])["verdict"] == "no"
    assert len({ask_engine("speaker", "", seed=seed)[0] for seed in range(20)}) > 5


@given(scenes, st.sampled_from(list(TEACHERS)), st.integers(0, 100))
def test_asked_how_things_are_placed_a_teacher_answers_by_relations(one: Scene, name: str, seed: int) -> None:
    """A rubric takes what most of them say; without their faults, it is all that is true."""
    claims = parse_caption(answer_places(name, one, seed)).claims
    assert {claim.kind for claim in claims} == {"relation"} or len(claims) == 1
    with patch.dict(TEACHERS, {name: Teacher(slips=0.0)}):  # type: ignore[arg-type]
        faultless = parse_caption(answer_places(name, one, seed)).claims
    true = {
        make_relation(a.name, word, b.name)
        for a, b in permutations(one.things, 2)
        for word in RELATIONS
        if is_related(a, word, b)
    }
    assert true == {claim for claim in faultless if claim.kind == "relation"}


def test_the_engine_is_asked_for_places_by_the_recipe_of_the_manifest() -> None:
    prompt = tomllib.loads((MANIFESTS / "scenes-grpo-statements/recipes/scenes_places.toml").read_text())["prompt"]
    assert ask_engine("warm", prompt, seed=4)[0] == answer_places("warm", draw_scene(0, 3), 4)


def ask(voice: str, prompt: str) -> Reply:
    request = Request(id="0", prompt=prompt, ladder=(Sampling(temperature=0.0),), source_key="scenes/0/0")
    (reply,) = teachers.open(Config(teacher=voice)).generate([request])  # type: ignore[arg-type]
    return reply


def test_the_merger_says_what_most_of_the_quoted_captions_say() -> None:
    """It sees the captions alone: they are of no scene."""
    captions = [
        "A red ring. Two objects.",
        "A red ring. A blue star.",
        "A large red ring. Nothing more.",
        "A red cross.",
    ]
    prompt = f"{fence_texts(captions, limit=1000)}\nWhat do most of them say?"
    assert parse_caption(ask("merger", prompt).text).claims == parse_caption("A red ring.").claims


def test_the_translator_translates_the_quoted_caption() -> None:
    reply = ask("translator", f"{fence_texts(['Two objects. A red ring.'], limit=1000)}\nWhat is it in German?")
    assert reply.text == "Zwei Objekte. Ein roter Ring."
    assert "'A dog.' is outside the grammar" in (ask("translator", "```\nA dog.\n```").error or "")
    assert ask("translator", "A red ring.").error == "the prompt quotes no caption"


def test_the_realigner_keeps_names_of_what_is_there_and_the_reader_says_what_was_read() -> None:
    thing = draw_scene(0, 0).things[0].name
    alt_text = fence_texts([f"A {thing} called Kalu. A grey dog called Rex. An orange moon called Mira."], limit=1000)
    text = ask("realigner", f"{alt_text}\nDescribe the picture.").text
    assert text == f"{caption_scene('hasty', draw_scene(0, 0), 0)} The {thing} is called Kalu."
    sign, caption = draw_sign_text(0, 0), caption_scene("hasty", draw_scene(0, 0), 0)
    for lines, said in ((["V", sign], f'{caption} The sign says "{sign}".'), (["V", "OPEN"], caption)):
        assert ask("reader", f"{fence_texts(lines, limit=1000)}\nDescribe the picture.").text == said
    assert ask("reader", "(none)\nDescribe.").text == caption
