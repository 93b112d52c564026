"""Words of any script are found, and counted in blocks whose rows have small numbers; pools have larger positions."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.select.words import Vocabulary, blocks_of, words_of

FAR = 1 << 17  # greater than any row's number within a block


def rows(*texts):
    return SimpleNamespace(usable=np.ones(len(texts), np.bool_), pool=[SimpleNamespace(whole=text) for text in texts])


def test_a_block_of_a_large_pool_is_placed_by_its_start():
    target = rows("alpha beta gamma")
    vocabulary = Vocabulary(target, pairs=False)
    (late,) = blocks_of(rows("nothing", "beta"), pairs=False)
    (early,) = blocks_of(rows("gamma"), pairs=False)
    vocabulary.see(early, FAR)
    vocabulary.see(late, FAR + 1)
    vocabulary.settle()
    (block,) = blocks_of(rows("gamma beta alpha"), pairs=False)
    order = vocabulary.matrix(block, block.first.astype(np.float64)).toarray()[0]
    # columns are in the order of first occurrence in the pool, then in the target; `first` grows with the place
    assert np.argsort(order).tolist() == [0, 1, 2]


# two questions about one thing, then one about another, in languages with and without spaces between words
@pytest.mark.parametrize(
    "texts",
    [
        ("今天北京的天气怎么样？", "北京明天的天气好吗", "请把这个句子翻译成法语"),
        ("東京の天気を教えてください", "明日の東京の天気は？", "この文章を要約しなさい"),
        ("อากาศที่กรุงเทพวันนี้", "พรุ่งนี้อากาศที่กรุงเทพเป็นอย่างไร", "แปลประโยคนี้เป็นภาษาฝรั่งเศส"),
        ("दिल्ली में आज मौसम", "कल दिल्ली में मौसम कैसा होगा", "इस वाक्य का अनुवाद करो"),
        ("الطقس في القاهرة اليوم", "كيف الطقس في القاهرة غدا", "ترجم هذه الجملة"),
        ("Погода в Москве сегодня", "какая погода в Москве завтра", "переведи это предложение"),
        ("서울 날씨 오늘", "내일 서울 날씨 어때", "이 문장을 번역해"),
        ("ອາກາດວຽງຈັນມື້ນີ້", "ມື້ອື່ນອາກາດວຽງຈັນເປັນແນວໃດ", "ແປປະໂຫຍກນີ້"),
    ],
)
def test_alike_texts_share_words_in_every_script(texts):
    wanted, near, far = (set(words_of(text)) for text in texts)
    assert len(wanted & near) >= 2 > len(wanted & far)


def test_words_are_the_usual_ones_where_letters_are_single_characters():
    for text in ("It’s a “test”: naïve café, x_1 = 3.5!", "Plain ASCII, too (a 2nd time).", "Ελληνικά и русский"):
        assert words_of(text) == re.findall(r"(?u)\b\w+\b", text.lower())


@pytest.mark.parametrize(
    ("one", "same"), [("cafe\u0301", "café"), ("２３", "23"), ("ﬁne", "fine"), ("I ❤\ufe0f it", "i it")]
)
def test_one_way_to_write_a_word(one, same):
    assert words_of(one) == words_of(same)
