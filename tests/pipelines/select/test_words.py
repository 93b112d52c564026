"""Words are counted in blocks, whose rows have small numbers; positions in the pool are larger."""

from types import SimpleNamespace

import numpy as np

from pipelines.select.words import Vocabulary, blocks_of

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
