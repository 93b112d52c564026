"""The end of an error message about an unknown name: the name that was probably meant.

This module serves all three packages and imports only the standard library, because the command line needs it before
it loads torch.
"""

import difflib
from collections.abc import Iterable
from os.path import commonprefix

_NEAREST_TEXT = """
adamw: a2grad adabound adaboundw adai adamax adamc adamg adamod adams adan adanorm adapnm adashift adasmooth
    adastar aida ano avagrad diffgrad fadam laprop msvag padam pnm qhadam radam ranger ranger21 sara swats tam
    yogi
adafactor: adalite adalomo alada amos sm3 smmf galore2 lomo
adagrad: adadelta ftrl kate madgrad
adopt: adago amsgradw
ademamix: aggmo grokfast simplified_ademamix dualadam
lamb: fromage nero novograd
lion: clion tiger rosen sgdlion
muon: adago adamuon dion2 dion3 gluon limuon muonbp muonclip muonplus polargrad scion scionlight turbomuon
prodigy: alig bcos dadaptadam dadaptation dadaptlion dadaptsgd dog dowg emonavi sps
rmsprop: rprop
schedule_free_adamw: asgd schedulefree schedulefreeadam schedulefreeradam swa
sgd: lbfgs lookahead pid qhm sam sadam vsgd wsam
signsgd: signum
soap: adadiag alice kron klsoap psgd racs shampoo splus distributedshampoo kfac
adamw_8bit: adamw4bit flashadamw
"""
"""Optimizer that is here: published ones that are not and resemble it most, which are no slips of the pen."""

_NEAREST = dict(entry.split(": ") for entry in _NEAREST_TEXT.replace("\n    ", " ").strip().split("\n"))

_OTHERS = {name: kind for kind, names in _NEAREST.items() for name in names.split()}

_SAME = {  # what another name means in terms of an optimizer that is here
    "adam8bit": "'adamw_8bit' without weight decay is 8-bit Adam",
    "amsgrad": "'adamw' with amsgrad=True and without weight decay is AMSGrad",
    "cadamw": "optim.Cautious(inner=AdamWRule()) is it",
    "grams": "optim.Grams(inner=AdamWRule()) is it",
    "mezo": "'sgd' with training.gradient=zo is MeZO",
    "sgdm": "'sgd' with momentum=0.9 is SGD with momentum",
    "sgdw": "'sgd' has decoupled weight decay",
    "sophia": "'sophia_g' and 'sophia_h' estimate the curvature in two ways",
    "adamwtorch": "'adamw' is it",
    "adamwtorchfused": "'adamw' is it",
    "adamwhf": "'adamw' is it",
    "adamwbnb8bit": "'adamw_8bit' is it",
    "lion32bit": "'lion' is it",
    "pagedadamw32bit": "'adamw' is it, without paging",
    "pagedadamw8bit": "'adamw_8bit' is it, without paging",
    "pagedlion8bit": "'lion_8bit' is it, without paging",
}


def instead_of(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown algorithm.

    An algorithm is offered for a slip of its own name alone: another case, underscores, or one letter. What is known to
    be the name of another algorithm is no slip, however near: the message says which algorithm here resembles it most.
    """
    known = sorted(known)
    bare = _letters(word)
    same = [name for name in known if _letters(name) == bare]
    if bare in _SAME and not same:
        return f"; {_SAME[bare]}. Known: {', '.join(known)}"
    if _OTHERS.get(bare) in known and not same:
        return f"; it is not in the suite; nearest in kind: {_OTHERS[bare]!r}. Known: {', '.join(known)}"
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
