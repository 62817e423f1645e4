"""Words: SQL and Python count alike, texts of scripts with blanks as ever, and others by their characters."""

from __future__ import annotations

import string
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.words import count_words, read_macro

# "Two red squares stand left of a blue circle on a grey table." in the languages that write without blanks.
SENTENCES = {
    "zh": ("两个红色方块位于灰色桌子上一个蓝色圆圈的左边。", 22),
    "ja": ("灰色のテーブルの上で、2つの赤い四角が青い円の左にあります。", 25),
    "th": ("สี่เหลี่ยมสีแดงสองอันอยู่ทางซ้ายของวงกลมสีน้ำเงินบนโต๊ะสีเทา", 15),
    "lo": ("ສີ່ຫຼ່ຽມສີແດງສອງອັນຢູ່ເບື້ອງຊ້າຍຂອງວົງມົນສີຟ້າ", 12),
    "km": ("ការ៉េក្រហមពីរនៅខាងឆ្វេងរង្វង់ខៀវ", 8),
    "my": ("အနီရောင်စတုရန်းနှစ်ခုသည်အပြာရောင်စက်ဝိုင်း၏ဘယ်ဘက်တွင်ရှိသည်", 15),
}


@pytest.fixture(scope="module")
def connection() -> Any:
    with duckdb.connect() as duck:
        duck.execute(read_macro())
        yield duck


def count_in_sql(connection: Any, text: str) -> int:
    return int(connection.execute("SELECT count_words(?)", [text]).fetchone()[0])


SCRIPTS = st.sampled_from(
    "aZé9-_.,'’ \t\n\v\f\r\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000"
    "的龠豈𠀀ひらがなカタカナー・ｶﾅㇰ。、！「」ไทยสี่ลาวລາວខ្មែរမြန်မာ한국어Привет한"
)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(SCRIPTS, max_size=60), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)))
def test_sql_and_python_count_alike(connection: Any, text: str) -> None:
    if "\0" not in text:
        assert count_in_sql(connection, text) == count_words(text)


@given(st.lists(st.text(string.ascii_letters + string.punctuation + "éßжф한국λ٣", min_size=1), max_size=30), st.data())
def test_texts_of_scripts_with_blanks_are_counted_by_blanks(words: list[str], data: st.DataObject) -> None:
    blanks = [data.draw(st.text(" \n\t\xa0\u2003", min_size=1, max_size=3)) for _ in words]
    text = "".join(blank + word for blank, word in zip(blanks, words, strict=True))
    assert count_words(text) == len(text.split()) == len(words)


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_without_blanks_have_about_as_many_words_as_others(language: str) -> None:
    text, expected = SENTENCES[language]
    assert count_words(text) == expected
    assert 8 <= count_words(text) < 30
    assert len(text.split()) < 3
