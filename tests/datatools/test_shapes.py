"""The tensor functions of datatools state shapes and dtypes, and keep to them in every call.

No table of calls: small runs of everything that datatools offers are watched, and each public function and method with
a tensor must have been called in one of them.
"""

import ast
import functools
import inspect
import typing
from importlib import import_module

import pytest
import torch
from jaxtyping import jaxtyped

import datatools
from datatools import colm as colm_room
from datatools import order
from datatools.colm import CORESET_FEATURES, CORESET_METHODS, CoLM
from datatools.order.example import example_run
from tests.conftest import REPOSITORY
from tests.optim.test_shapes import fits, is_shape, randn

FILES = sorted((REPOSITORY / "datatools").rglob("*.py"))
MODULES = {path: import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts)) for path in FILES}
ON_A_GPU = {"datatools.kernels.sjlt.add_sjlt"}
"""Compared with its definition by the tests of kernels, which run where Triton does."""


FOR_CHECKERS = {"Tensor": torch.Tensor, "Candidates": datatools.Candidates}
"""Names that some modules import for type checkers only, so that they do not load torch."""


def without_shape(hint):
    """Whether an annotation has a tensor of its own (not one in a mapping or a list) without a shape."""
    if isinstance(hint, ast.BinOp):
        return without_shape(hint.left) or without_shape(hint.right)
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in ("tuple", "Iterator"):
        return any(map(without_shape, hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]))
    return isinstance(hint, ast.Name) and hint.id == "Tensor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_tensor_has_a_shape(path):
    bare = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(node for kind in kinds for node in kind.body)]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            of = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare += [f"{node.name}: {a.arg}" for a in of if a.annotation and without_shape(a.annotation)]
            bare += [node.name] * bool(node.returns and without_shape(node.returns))
        if isinstance(node, ast.AnnAssign) and without_shape(node.annotation):
            bare.append(ast.unparse(node.target))
    assert not bare


def shaped(function):
    """The hints of a function, if some of them state a shape."""
    hints = typing.get_type_hints(function, localns=FOR_CHECKERS)
    parts = [part for hint in hints.values() for part in (hint, *typing.get_args(hint))]
    return hints if any(map(is_shape, parts)) else None


def functions():
    """(owner, name, function) of each public function and method that states a shape."""
    for module in MODULES.values():
        for owner in (module, *vars(module).values()):
            ours = owner is module or (inspect.isclass(owner) and owner.__module__ == module.__name__)
            for name, function in list(vars(owner).items()) if ours else ():
                own = inspect.isfunction(function) and function.__module__ == module.__name__ and name[0] != "_"
                if own and not getattr(function, "__isabstractmethod__", False) and shaped(function):
                    yield owner, name, function


def watched(function, called):
    """The function, which compares arguments and results with its signature."""
    hints, signature = shaped(function), inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        called.add(f"{function.__module__}.{function.__qualname__}")
        with jaxtyped("context"):
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                assert fits(value, hints.get(name)), f"{function.__qualname__}: {name} is {value!r:.200}"
            result = function(*args, **kwargs)
            assert fits(result, hints.get("return")), f"{function.__qualname__} returned {result!r:.200}"
        return result

    return call


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))


def losses_of(module, batch):
    logits = module(input_ids=batch["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none").mean(1)


def coresets():
    model, tokens = tiny_llama(), torch.randint(50, (6, 5), generator=torch.Generator().manual_seed(0))
    batch, sources = {"input_ids": tokens, "labels": tokens}, ["code", *["web"] * 5]
    for kind in CORESET_FEATURES:
        colm = CoLM(model, losses_of, keep=3, small={"code"}, features=kind, probes=4)
        colm(batch, sources, step=0, watch=True)
    for method in CORESET_METHODS:
        colm = CoLM(model, losses_of, keep=3, method=method, dim=8, token_budget=8)
        datatools.kept_by_source(sources, colm(batch, sources, step=0))
    colm_room.small_sources.cluster_sources(randn(4, 3), 2, seed=0)
    generator = torch.Generator()
    datatools.colm.select_batch(randn(6, 3), sources, 3, coordinates=2, generator=generator)
    target = colm.target
    with colm_room.replay.evaluating(model):
        colm_room.probes.directional_derivatives(model, losses_of, batch, target, randn(3, *target.shape), chunk=2)
        colm_room.paper_code.central_differences(model, losses_of, batch, target, randn(*target.shape))
    with pytest.raises(datatools.DataError, match="row b"):
        colm_room.choice.choose_rows(torch.full((2, 3), torch.inf), datatools.colm.plan([0, 0], 1, generator=generator),
                                     generator=generator, names=["row a", "row b"])  # fmt: skip


def orders(folder):
    problem, reference = example_run()
    problem.samples = [batch[:2] for batch in problem.batches]
    made = {
        "table": {"projection": 2, "derivative": "exact", "order": 2},
        "reduced": {"second_moment": "expected", "anchors": None},
        "moments": {"directions": 2},
        "own-moments": {},
        "groups": {"groups": [0, 0, 1, 1]},
        "pairwise": {"anchors": 2},
    }
    for name, options in made.items():
        estimate = order.precompute(name, reference, problem, **options)
        estimate.trust((3, 2, 1, 0))
        estimate.scores([(3, 2, 1, 0), (1, 0, 2, 3)])
        estimate.matrix()
        estimate.save(folder / name, reference)
    order.precompute("reduced", reference, problem)
    order.search(estimate, "local", budget=50)
    order.exact_order(torch.eye(2))
    found = order.memory_map(
        (0, 1, 2, 3),
        lambda steps: order.train(problem, reference.recipe, steps, reference.start.params)[0],
        problem.train_loss,
        problem.held_out_loss,
        completions=2,
    )
    assert found.position_effect.shape == (4, 4) and found.counterfactual.shape == (4,)


def features(folder):
    from optim import SGDRule, UpdateMap, create

    module = torch.nn.Linear(3, 2).eval()
    rows = {datatools.files.digest(b"%d" % i): torch.full((3,), i + 1.0) for i in range(4)}
    updates = UpdateMap.of(create("sgd", list(module.named_parameters()), lr=0.1), rules=SGDRule())
    shapes = {name: p.shape for name, p in updates.params.items()}
    stores = []
    for name, kind in datatools.PROJECTORS.items():
        projector = kind.of(shapes, dim=8, seed=0)
        store = datatools.GradientFeatures.create_or_open(folder / name, meta={}, dim=8, keys=list(rows))
        stores.append(store)
        datatools.extract(
            store,
            module,
            lambda module, batch: module(batch["x"]).square().sum(1),
            lambda keys: {"x": torch.stack([rows[key] for key in keys])},
            dict.fromkeys(rows, 3),
            updates,
            projector,
        )
        projector.block("weight", torch.ones(2, 2, 3))
        projector.project({"bias": torch.ones(2, 2)})
    datatools.PROJECTORS["sjlt"].of(shapes, 8, 0).transposed(torch.ones(2, 8), "weight", torch.Size((2, 3)))
    keys = list(rows)
    groups = torch.tensor([0, 0])
    for how in datatools.AGGREGATIONS:
        datatools.less_scores(stores[:1], stores[:1], [1e-4], groups, keys=keys[:2], target_keys=keys[2:], how=how)


def gradients():
    flat = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()
    batch = {"x": randn(5, 2, 3)}
    names = [name for name, _ in flat.named_parameters()]

    def loss(module, batch):
        return module(batch["x"].flatten(0, 1)).view(len(batch["x"]), -1).sum(1)

    found = datatools.per_sample_grads(loss, flat, batch, names)
    assert torch.allclose(
        found["0.weight"], datatools.per_sample_grads(loss, flat, batch, names, method="loop")["0.weight"]
    )

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.Parameter(randn(2, 3, 4))

        def forward(self, x):
            return (x.mT @ self.experts[0]).sum((1, 2)) + (x.mT @ self.experts[1].mT.mT).square().sum((1, 2))

    datatools.per_sample_grads(
        lambda module, batch: module(batch["x"]), Experts().eval(), {"x": randn(5, 3, 2)}, ["experts"]
    )
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    assert len(list(datatools.gradients.pieces({"input_ids": ids}, [2, 3], 3))) == 2


def subsets():
    pool = {"keys": ["a", "b", "c"], "similarity": randn(3, 2), "scores": randn(3)}
    for name in datatools.SELECTORS:
        candidates = datatools.Candidates(**pool, supervised=[1, 2, 3], groups=[0, 1])
        datatools.select(name, candidates, 2, reference=datatools.Selection(torch.tensor([0])))
    datatools.influence([randn(5, 3)], [randn(4, 3).half()], torch.ones(1))
    datatools.subtask_targets(randn(4, 3), torch.ones(4), [0, 0, 1, 1])


@pytest.fixture
def called(monkeypatch):
    """The names of the functions that were called since; every call is checked."""
    names = set()
    for owner, name, function in list(functions()):
        check = watched(function, names)
        if inspect.isclass(owner):
            monkeypatch.setattr(owner, name, check)
            continue
        for module in MODULES.values():  # also where it was imported
            for alias, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, alias, check)
    return names


def test_every_function_keeps_to_its_signature(called, tmp_path):
    coresets()
    orders(tmp_path / "order")
    features(tmp_path / "features")
    gradients()
    subsets()
    names = {f"{function.__module__}.{function.__qualname__}" for *_, function in functions()}
    assert sorted(names - called - ON_A_GPU) == []


def test_another_shape_is_seen(called):
    with pytest.raises(AssertionError, match="herding: features"):
        datatools.subsets.herding.herding(torch.ones(3), 1)
    with pytest.raises(AssertionError, match="kept"):
        datatools.subsets.herding.herding(torch.ones(3, 2), 1, kept=torch.tensor([0.5]))
