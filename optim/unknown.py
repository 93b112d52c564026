"""The end of an error message about an unknown name: the name that was probably meant.

This module serves all three packages and imports only the standard library, because the command line needs it before
it loads torch.
"""

import difflib
from collections.abc import Iterable
from os.path import commonprefix

_OTHERS = set(  # published algorithms that are not here: such a name is no slip of the pen, however near to another
    """a2grad adabound adaboundw adadelta adafactor adagrad adai adalomo adam adam8bit adamax adamc adamg adamod adams
    adamx adamuon adan adanorm adapnm adashift adasmooth ademamix adopt aggmo aida alice alig amos amsgrad asgd avagrad
    came clion diffgrad dion fadam fromage ftrl gluon grams grokfast kate kfac kron lamb laprop lars lbfgs lomo
    lookahead madgrad mars nadamw nero novograd padam pnm prodigy psgd qhadam qhm radam ranger rmsprop rprop sam sadam
    scion sgdm sgdw shampoo signsgd signum sm3 soap sophia splus stableadamw swats tiger vsgd yogi""".split()
)

_SAME = {  # what another name means in terms of an optimizer that is here
    "adam": "'adamw' without weight decay is Adam; Adam's own weight decay, inside the gradient, is not here",
    "adam8bit": "'adamw_8bit' without weight decay is 8-bit Adam",
    "amsgrad": "'adamw' with amsgrad=True and without weight decay is AMSGrad",
    "nadamw": "'nadam' has decoupled weight decay",
    "sgdm": "'sgd' with momentum=0.9 is SGD with momentum",
    "sgdw": "'sgd' has decoupled weight decay",
    "sophia": "'sophia_g' and 'sophia_h' estimate the curvature in two ways",
    "adamwtorch": "'adamw' is it",
    "adamwtorchfused": "'adamw' is it",
    "adamwbnb8bit": "'adamw_8bit' is it",
    "lion32bit": "'lion' is it",
}


def instead_of(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown algorithm.

    An algorithm is offered for a slip of its own name alone: another case, underscores, or one letter. What is known to
    be the name of another algorithm is no slip, however near.
    """
    known = sorted(known)
    bare = _letters(word)
    if bare in _SAME:
        return f"; {_SAME[bare]}. Known: {', '.join(known)}"
    same = [name for name in known if _letters(name) == bare]
    near = [name for name in known if _one_slip(_letters(name), bare)]
    near.sort(key=lambda name: (difflib.SequenceMatcher(None, name, word).ratio(), name), reverse=True)
    close = same or ([] if bare in _OTHERS else near)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; known: {', '.join(known)}"


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter is missing, added, replaced, or changes place with the next."""
    a, b = sorted((a, b), key=len)
    start = len(commonprefix([a, b]))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    replaced = a[start + 1 :] == b[start + 1 :]
    return replaced or a[start:] == b[start + 1 : start + 2] + b[start : start + 1] + b[start + 2 :]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown word: the nearest known one in any case, or all of them.

    Args:
        word: What was given.
        known: What exists.

    Example:
        >>> from optim import did_you_mean
        >>> did_you_mean("cosin", ["cosine", "linear"])
        "; did you mean 'cosine'?"
    """
    by_lower = {name.lower(): name for name in sorted(known)}
    word = word.lower()
    close = difflib.get_close_matches(word, by_lower, n=3)
    if not close:
        return f"; known: {', '.join(by_lower.values())}"

    def nearness(name: str) -> tuple[float, int, str]:  # of "nadam" and "adamw", "adam" more likely means the second
        return difflib.SequenceMatcher(None, name, word).ratio(), len(commonprefix([name, word])), name

    return f"; did you mean {by_lower[max(close, key=nearness)]!r}?"
