"""The ends of error messages about unknown names, which suggest the name that was probably meant.

This module serves all three packages and imports only the standard library, because the command line needs it before
it loads torch.
"""

import difflib
from collections.abc import Iterable
from os.path import commonprefix

_NEAREST_TEXT = """
adafactor: adalite adalomo alada amos galore2 lomo sm3 smmf
adagrad: adadelta ftrl kate madgrad
adamw: a2grad adabound adaboundw adagc adai adamax adamc adamg adamod adams adamwanyprecision adamwsn adan adanorm
    adapnm adashift adasmooth adastar aida ano avagrad diffgrad emofact fadam grokadamw grokfastadamw laprop
    lorarite msvag padam pnm qhadam radam ranger ranger21 rose sara sparseadam srmm swats tam yogi
adamw_8bit: adamw4bit adamwtorch4bit flashadamw
ademamix: aggmo dualadam grokfast simplifiedademamix
adopt: adago amsgradw
dion: demo dion2 dion3
kron: psgd
lamb: fromage nero novograd
lion: clion emolynx rosen sgdlion tiger
muon: adago adamuon distributedmuon gluon limuon muonbp muonclip muonplus polargrad scion scionlight spectralsphere
    turbomuon
prodigy: alig bcos dadaptadagrad dadaptadam dadaptadan dadaptation dadaptlion dadaptsgd dog dowg emonavi sps
rmsprop: rprop
schedule_free_adamw: asgd schedulefree schedulefreeadam schedulefreeradam swa
sgd: accsgd adatam apollodqn bsam focus gravity lbfgs lookahead magma pid qhm sadam sam vsgd wsam
shampoo: dash distributedshampoo kfac scalableshampoo
signsgd: signum
soap: adadiag alice klsoap racs splus
"""
"""An optimizer of this package, and the published optimizers that are missing here and resemble it most. Their names
are not treated as misspellings."""

_NEAREST = dict(entry.split(": ") for entry in _NEAREST_TEXT.replace("\n    ", " ").strip().split("\n"))

_OTHERS = {name: kind for kind, names in _NEAREST.items() for name in names.split()}

_SAME = {  # what another name means in terms of an optimizer of this package
    "adam8bit": "'adamw_8bit' without weight decay is 8-bit Adam",
    "amsgrad": "'adamw' with amsgrad=True and without weight decay is AMSGrad",
    "cadamw": "use optim.Cautious(inner=AdamWRule()), or 'adamw' with wrapper='cautious'",
    "grams": "use optim.Grams(inner=AdamWRule()), or 'adamw' with wrapper='grams'",
    "mezo": "'sgd' with training.gradient=zo is MeZO",
    "sgdm": "'sgd' with momentum=0.9 is SGD with momentum",
    "sgdw": "'sgd' has decoupled weight decay",
    "sophia": "'sophia_g' and 'sophia_h' estimate the curvature in two ways",
    "adamwtorch": "use 'adamw'",
    "adamwtorchxla": "use 'adamw'",
    "adamwtorchnpufused": "use 'adamw'",
    "adamwtorch8bit": "use 'adamw_8bit'",
    "ademamix8bit": "use optim.Quantized(inner=AdEMAMixRule())",
    "pagedademamix32bit": "use 'ademamix', which has no paging",
    "pagedademamix8bit": "use optim.Quantized(inner=AdEMAMixRule()), which has no paging",
    "apolloadamw": "use 'apollo'",
    "apolloadamwlayerwise": "use 'apollo', and optim.fuse_backward for steps layer by layer",
    "galoreadamw": "use 'galore'",
    "galoreadamw8bit": "use 'galore'; optim.LowRank around AdamW8bitRule has 8-bit states",
    "galoreadafactor": "use 'galore', whose inner rule is AdamW's",
    "galoreadamwlayerwise": "use 'galore', and optim.fuse_backward for steps layer by layer",
    "galoreadamw8bitlayerwise": "use 'galore', and optim.fuse_backward for steps layer by layer",
    "galoreadafactorlayerwise": "use 'galore', and optim.fuse_backward for steps layer by layer",
    "pagedlion32bit": "use 'lion', which has no paging",
    "rmspropbnb": "use 'rmsprop'",
    "rmspropbnb32bit": "use 'rmsprop'",
    "rmspropbnb8bit": "use optim.Quantized(inner=RMSpropRule())",
    "adamwtorchfused": "use 'adamw'",
    "adamwhf": "use 'adamw'",
    "adamwbnb8bit": "use 'adamw_8bit'",
    "lion32bit": "use 'lion'",
    "pagedadamw32bit": "use 'adamw', which has no paging",
    "pagedadamw8bit": "use 'adamw_8bit', which has no paging",
    "pagedlion8bit": "use 'lion_8bit', which has no paging",
}


def instead_of(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown algorithm.

    An algorithm is suggested only for a misspelling of its own name: another case, underscores, or one letter. The name
    of another published algorithm is never treated as a misspelling, even if it is close: then the message says which
    algorithm here resembles it most.

    Args:
        word: The name that was given.
        known: The names that exist.

    Returns:
        The end of the message, beginning with a semicolon.
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
    """Return whether one letter is missing, added, replaced, or swapped with the next."""
    a, b = sorted((a, b), key=len)
    start = len(commonprefix([a, b]))
    if len(a) < len(b):
        return a[start:] == b[start + 1 :]
    replaced = a[start + 1 :] == b[start + 1 :]
    return replaced or a[start:] == b[start + 1 : start + 2] + b[start : start + 1] + b[start + 2 :]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message about an unknown word: the most similar known word, or all of them if none is.

    Args:
        word: What was given.
        known: What exists.

    Returns:
        The end of the message, beginning with a semicolon.

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

    def nearness(name: str) -> tuple[float, int, str]:  # "adam" is more likely to mean "adamw" than "nadam"
        return difflib.SequenceMatcher(None, name, word).ratio(), len(commonprefix([name, word])), name

    return f"; did you mean {by_lower[max(close, key=nearness)]!r}?"
