"""datatools.bm25 against a worked example, the formula written out word by word, and its own promises."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from datatools import bm25


def by_hand(documents, queries, k1, b):
    """The formula, one word at a time, in float64."""
    n = len(documents)
    average = sum(map(sum, documents)) / n
    found = []
    for document in documents:
        row = []
        for query in queries:
            total = bound = 0.0
            for word, asked in enumerate(query):
                if not asked:
                    continue
                holding = sum(other[word] > 0 for other in documents)
                idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
                f = document[word]
                length = sum(document) / average if average else 0.0
                total += idf * (k1 + 1) * f / (f + k1 * (1 - b + b * length)) if f else 0.0
                bound += idf * (k1 + 1)
            row.append(total / bound if bound else 0.0)
        found.append(row)
    return np.array(found)


def test_worked_example():
    """Two documents; the query's one rare word is in the first, twice: 2 / (2 + 1.2 (0.25 + 0.75 * 4/3))."""
    documents = csr_matrix([[2, 2], [0, 2]])
    found = bm25(documents, csr_matrix([[1, 0]]))
    assert found[0, 0] == pytest.approx(2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3))) and found[1, 0] == 0
    both = bm25(documents, csr_matrix([[1, 1]]), b=0.0, k1=1.0)
    rare, common = math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5)
    assert both[:, 0].tolist() == pytest.approx([2 / 3, 2 / 3 * common / (rare + common)])


TABLES = st.integers(1, 5).flatmap(
    lambda words: st.tuples(
        st.lists(st.lists(st.integers(0, 4), min_size=words, max_size=words), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(0, 3), min_size=words, max_size=words), min_size=1, max_size=4),
    )
)


@given(TABLES, st.sampled_from([0.0, 0.5, 1.2, 10.0]), st.sampled_from([0.0, 0.75, 1.0]))
def test_equals_the_formula_written_out(tables, k1, b):
    documents, queries = tables
    found = bm25(csr_matrix(documents), csr_matrix(queries), k1=k1, b=b)
    assert found.shape == (len(documents), len(queries)) and found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(documents, queries, k1, b), rtol=1e-6, atol=1e-7)
    assert ((found >= 0) & (found <= 1)).all()


@given(TABLES)
def test_some_rows_have_the_values_that_they_have_among_all(tables):
    documents, queries = map(csr_matrix, tables)
    rows = np.arange(documents.shape[0])[::-2]
    assert (bm25(documents, queries, rows=rows) == bm25(documents, queries)[rows]).all()


def test_wrong_arguments_are_refused():
    one = csr_matrix([[1]])
    with pytest.raises(ValueError, match="documents over 1 words but queries over 2"):
        bm25(one, csr_matrix([[1, 1]]))
    for k1, b in ((-1, 0.5), (1, 2), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="they must be"):
            bm25(one, one, k1=k1, b=b)
