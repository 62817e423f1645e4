"""The scenes world: it is determined by its seed, knows its own truth, and has faults like the web's."""

import io
import json
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from pipeline.sections import stamped
from pipeline.sources import scenes
from pipeline.sources.scenes import (
    Config,
    Raw,
    assign_cells,
    draw_scene,
    find_relation,
    find_scene,
    is_related,
    render_scene,
)


def read_corpus(config: Config) -> list[Raw]:
    return [raw for piece in scenes.pieces(config) for raw in scenes.read(piece, config)]


def is_picture(raw: Raw) -> bool:
    try:
        Image.open(io.BytesIO(raw.data or b"")).load()
    except (UnidentifiedImageError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def raws() -> list[Raw]:
    return read_corpus(Config(num_images=400, seed=5, broken_share=0.1, duplicate_share=0.2))


@pytest.mark.slow
def test_a_corpus_is_determined_by_its_config(raws: list[Raw]) -> None:
    config = Config(num_images=400, seed=5, broken_share=0.1, duplicate_share=0.2, samples_per_piece=7)
    assert read_corpus(config) == raws
    assert read_corpus(Config(num_images=20, seed=6))[0].data != raws[0].data


@pytest.mark.slow
def test_growth_moves_no_sample(raws: list[Raw]) -> None:
    assert read_corpus(Config(num_images=450, seed=5, broken_share=0.1, duplicate_share=0.2))[:400] == raws


def test_source_keys_are_unique_and_identify_the_scene(raws: list[Raw]) -> None:
    assert len({raw.source_key for raw in raws}) == len(raws)
    for raw in raws:
        truth = json.loads(raw.metadata)["scene"]
        scene = find_scene(raw.source_key)
        assert (scene.background, len(scene.things)) == (truth["background"], len(truth["things"]))


def test_broken_files_have_the_configured_share(raws: list[Raw]) -> None:
    broken = [raw for raw in raws if not is_picture(raw)]
    assert {raw.source_key for raw in broken} == {
        raw.source_key for raw in raws if json.loads(raw.metadata)["broken"] is not None
    }
    assert 20 <= len(broken) <= 60
    assert any(raw.data is None and raw.error for raw in broken)


def test_copies_are_exact_or_near(raws: list[Raw]) -> None:
    whole = {raw.source_key: raw.data for raw in raws if is_picture(raw)}
    copies = [key for key in whole if "copy" in key and "/".join(key.split("/")[:3]) in whole]
    exact = sum(whole[key] == whole["/".join(key.split("/")[:3])] for key in copies)
    assert 0.25 * len(copies) < exact < 0.75 * len(copies)


def test_half_of_the_alt_texts_are_right(raws: list[Raw]) -> None:
    kinds = Counter(json.loads(raw.metadata)["alt_text"] for raw in raws)
    assert 160 <= kinds["right"] <= 240
    assert set(kinds) == {"right", "wrong", "short", "file name", "none"}


@pytest.mark.slow
def test_all_words_of_the_world_occur() -> None:
    things = [thing for index in range(1500) for thing in draw_scene(1, index).things]
    assert len({t.shape for t in things}) == 8
    assert len({t.colour for t in things}) == 8
    assert {t.size for t in things} == {"small", "large"}
    assert {t.texture for t in things} == {"solid", "striped", "dotted"}
    assert {len(draw_scene(1, index).things) for index in range(1500)} == {1, 2, 3, 4, 5, 6}
    words = Counter(find_relation(a, b) for i in range(1500) for a, b in pairwise(draw_scene(1, i).left_to_right))
    assert all(words[word] > 20 for word in ("left of", "above", "below", "touching", "inside", "around"))
    raws = read_corpus(Config(num_images=30, broken_share=0.0))
    sizes = {Image.open(io.BytesIO(raw.data or b"")).size for raw in raws}
    assert len(sizes) > 15


@given(st.integers(0, 5), st.integers(0, 10**6))
def test_relations_agree_with_each_other(seed: int, index: int) -> None:
    turned = {"left of": "right of", "above": "below", "inside": "around", "touching": "touching"}
    turned |= {opposite: word for word, opposite in turned.items()}
    for a, b in combinations(draw_scene(seed, index).things, 2):
        assert find_relation(b, a) == turned[find_relation(a, b)]
        assert is_related(a, find_relation(a, b), b)
        assert not (is_related(a, "left of", b) and is_related(b, "left of", a))


@given(st.integers(0, 5), st.integers(0, 10**6))
def test_things_have_different_names(seed: int, index: int) -> None:
    names = [thing.name for thing in draw_scene(seed, index).things]
    assert 1 <= len(names) == len(set(names)) <= 6


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(0, 10**6))
def test_every_thing_is_visible(seed: int, index: int) -> None:
    truth = draw_scene(seed, index)
    grid = assign_cells(truth, columns=24, rows=24)
    assert set(np.unique(grid)) - {-1} == set(range(len(truth.things)))
    assert -1 in grid


def test_pixels_have_the_colours_of_the_scene() -> None:
    truth = next(s for i in range(100) if len((s := draw_scene(2, i)).things) == 1 and s.things[0].texture == "solid")
    image = np.asarray(render_scene(truth, short=128)).astype(int)
    inside = assign_cells(truth, columns=image.shape[1], rows=image.shape[0]) == 0
    background = np.median(image[~inside], axis=0) - scenes.BACKGROUNDS[truth.background]
    thing = np.median(image[inside], axis=0) - scenes.COLOURS[truth.things[0].colour]
    assert np.abs(background).max() <= 14
    assert np.abs(thing).max() <= 14


def test_pictures_are_as_crowded_as_asked_and_show_ordinary_scenes() -> None:
    config = Config(num_images=300, seed=5, broken_share=0.0, duplicate_share=0.0, crowded_share=0.6)
    drawn = [find_scene(raw.source_key) for raw in read_corpus(config)]
    assert len({scene.index for scene in drawn}) == len(drawn)
    assert 0.52 < sum(len(scene.things) >= scenes.CROWD for scene in drawn) / len(drawn) < 0.68
    for share, crowded in ((0.0, False), (1.0, True)):
        some = read_corpus(replace(config, num_images=20, crowded_share=share))
        assert {len(find_scene(raw.source_key).things) >= scenes.CROWD for raw in some} == {crowded}
        assert [json.loads(raw.metadata)["scene"]["index"] for raw in some] == [
            find_scene(raw.source_key).index for raw in some
        ]


def test_copies_in_a_crowded_corpus_show_the_scene_of_their_original() -> None:
    raws = read_corpus(Config(num_images=60, seed=5, broken_share=0.0, duplicate_share=0.5, crowded_share=1.0))
    copies = [raw for raw in raws if "/copy-" in raw.source_key]
    originals = {raw.source_key for raw in raws}
    assert copies and all(raw.source_key.rsplit("/copy-")[0] in originals for raw in copies)
    assert all(json.loads(raw.metadata)["copy_of"] == find_scene(raw.source_key).index for raw in copies)


def test_the_worlds_own_crowding_leaves_fingerprints_as_they_were() -> None:
    assert "crowded_share" not in stamped(Config()) and stamped(Config(crowded_share=0.0))["crowded_share"] == 0.0


def test_alt_texts_name_things_some_of_which_are_not_there() -> None:
    config = Config(num_images=60, seed=5, broken_share=0.0, duplicate_share=0.0, named_share=0.5)
    plain = read_corpus(replace(config, named_share=0.0))
    right = Counter[bool]()
    for raw, before in zip(read_corpus(config), plain, strict=True):
        metadata = json.loads(raw.metadata or "")
        assert raw.data == before.data
        if metadata["alt_text"] != "named":
            assert raw == before
            continue
        things = {thing.name for thing in find_scene(raw.source_key).things}
        for named in scenes.name_things(find_scene(raw.source_key)):
            assert named.sentence in (raw.alt_text or "") and (named.thing in things) == named.is_right
            right[named.is_right] += 1
        assert metadata["names"] and len({named["name"] for named in metadata["names"]}) == len(metadata["names"])
    assert min(right[True], right[False]) > 10


def test_a_sign_is_below_its_picture() -> None:
    config = Config(num_images=40, seed=5, broken_share=0.0, duplicate_share=0.0, sign_share=0.5)
    signs = 0
    for raw, before in zip(read_corpus(config), read_corpus(replace(config, sign_share=0.0)), strict=True):
        sign = json.loads(raw.metadata or "").get("sign")
        assert sign == scenes.find_sign(find_scene(raw.source_key), config)
        sizes = [Image.open(io.BytesIO(one.data or b"")).size for one in (raw, before)]
        taller, shape = (height / width for width, height in sizes)
        assert taller > 1.1 * shape if sign else sizes[0] == sizes[1]
        assert max(sizes[0]) <= config.long_side
        signs += bool(sign)
    assert 10 < signs < 30
