"""The rows of a projection that are values: against what each row does to the attention weights, row by row.

The judge moves one output of the projection at a time and looks at what every softmax of the layer gives: queries and
keys change a weight, values change none and change the layer's output. It uses no derivative and no name.
"""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import FalconConfig, FalconForCausalLM, GPTBigCodeConfig, GPTBigCodeForCausalLM

from datatools import CoLM, DataError
from datatools.colm.exact import exact_gradients
from datatools.colm.last_layer import LastLayer
from datatools.colm.paper_code import central_differences
from datatools.colm.probes import directional_derivatives
from datatools.colm.replay import evaluating
from pipelines.models.losses import row_losses
from tests.datatools.colm.test_last_layer import brute, some_batch
from tests.zoo import build as zoo

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
BIGCODE = {"vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 48}


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) / 4)
    return model.eval()


def heads(*ranges):
    return [i for first, last in ranges for i in range(first, last)]


OWN = {
    "falcon, one key for all": lambda: FalconForCausalLM(FalconConfig(**SMALL, multi_query=True)),
    "falcon, interleaved": lambda: FalconForCausalLM(FalconConfig(**SMALL, multi_query=False, alibi=True)),
    "falcon, groups": lambda: FalconForCausalLM(
        FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2, multi_query=False)
    ),
    "bigcode, one key for all": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**BIGCODE, multi_query=True)),
    "bigcode, interleaved": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**BIGCODE, multi_query=False)),
}
EACH_HEAD_LAST = heads((16, 24), (40, 48), (64, 72), (88, 96))
LATENT = heads((8, 16), (24, 32), (40, 48), (56, 64))
ROWS = {
    "falcon, one key for all": heads((40, 48)),
    "falcon, interleaved": EACH_HEAD_LAST,
    "falcon, groups": heads((24, 32), (56, 64)),  # two groups of two queries, a key and a value
    "bigcode, one key for all": heads((40, 48)),
    "bigcode, interleaved": EACH_HEAD_LAST,
    "BloomForCausalLM": EACH_HEAD_LAST,
    "CodeGenForCausalLM": heads((8, 16), (32, 40), (56, 64), (80, 88)),  # queries, values, keys; four parts
    "DbrxForCausalLM": heads((40, 48)),
    "DeepseekV3ForCausalLM": LATENT,
    "GPT2LMHeadModel": heads((64, 96)),
    "GPTNeoXForCausalLM": EACH_HEAD_LAST,
    "HYV4ForCausalLM": LATENT,  # with attention sinks
    "JetMoeForCausalLM": heads((16, 32)),
    "LongcatFlashForCausalLM": LATENT,
    "MptForCausalLM": heads((64, 96)),
    "OpenAIGPTLMHeadModel": heads((64, 96)),
    "PersimmonForCausalLM": EACH_HEAD_LAST,
    "Phi3ForCausalLM": heads((48, 64)),
}
"""Layout of a joint projection -> its value rows, as the models' own code splits it."""
WHOLE = [
    "BertLMHeadModel", "CTRLLMHeadModel", "CpmAntForCausalLM", "FalconH1ForCausalLM", "GptOssForCausalLM",
    "LlamaForCausalLM", "OPTForCausalLM", "ProphetNetForCausalLM", "Qwen3NextForCausalLM", "XLMWithLMHeadModel",
]  # fmt: skip


def build(name, dtype=torch.float32):
    if name in OWN:
        torch.manual_seed(0)
        return randomized(OWN[name]()).to(dtype)
    return zoo.build(name, dtype=dtype)


class Softmaxes(TorchFunctionMode):
    """Every result of a softmax inside, or of fused attention its scores."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k = (*args, *(kwargs[key] for key in ("query", "key")[len(args) :]))[:2]
            self.seen.append(torch.cat([q.flatten(1), k.flatten(1)], 1))
        found = func(*args, **kwargs)
        if getattr(func, "__name__", "") == "softmax" and found.ndim >= 3:
            self.seen.append(found.flatten(1) if found.ndim > 3 else found.flatten())
        return found


def judged(model, target):
    """Rows of the target's projection that change no attention weight of its layer, and change its output."""
    width = target.parameter.shape[1 if target.transposed else 0]
    tokens = torch.randint(8, 60, (1, 6), generator=torch.Generator().manual_seed(3))
    runs, layer, row = [], target.layers[-1], None

    def move(_, args, output):
        if row is None:
            return output
        output = output.clone()
        noise = torch.randn(output.shape[:-1], generator=torch.Generator().manual_seed(4))
        output[..., row] += noise.to(output)  # another one for each token: weights do not see what all keys share
        return output

    def attention_only(_, args):
        runs[-1].append(Softmaxes().__enter__())

    def done(_, args, output):
        runs[-1][-1].__exit__(None, None, None)
        runs[-1].append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    handles = [
        target.projection.register_forward_hook(move),
        layer.register_forward_pre_hook(attention_only),
        layer.register_forward_hook(done),
    ]
    with torch.no_grad():
        for row in (None, *range(width)):  # noqa: B007 (read by `move`)
            runs.append([])
            model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    (first, output), *others = runs
    assert first.seen, "the layer has no softmax"
    return [
        i
        for i, (found, moved) in enumerate(others)
        if torch.allclose(found.seen[0], first.seen[0], atol=1e-7, equal_nan=True) and not torch.equal(moved, output)
    ]


@pytest.mark.parametrize("name", [*ROWS, *WHOLE])
def test_value_rows_are_those_that_change_no_attention_weight(name):
    model = build(name)
    target = LastLayer.of(model)
    assert target.kind == "values"
    rows = list(range(target.parameter.shape[1 if target.transposed else 0]))
    if name != "LongcatFlashForCausalLM":  # whose layer has two attentions: the first one's weights are seen
        assert judged(model, target) == ROWS.get(name, rows)
    found = rows[target.outputs] if isinstance(target.outputs, slice) else target.outputs.tolist()
    assert found == ROWS.get(name, rows)


def test_values_that_are_clipped_on_a_few_tokens_are_values():
    config = zoo.config("MptForCausalLM")
    config.attn_config.clip_qkv = 0.05
    model = randomized(zoo.model_class("MptForCausalLM")(config))
    assert LastLayer.of(model).outputs == slice(64, 96)


def everything(model, *, tolerance=1e-5, smooth=True):
    """Exact gradients, probes and differences of a model in float64 equal a backward pass per row; nothing is moved."""
    target = LastLayer.of(model)
    batch, _ = some_batch(4, 10)
    batch["input_ids"].clamp_(8, 60)
    want = brute(model, batch, target).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z = torch.randn(3, *target.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    with evaluating(model):
        grads = exact_gradients(model, row_losses, batch, target).double()
        slopes = directional_derivatives(model, row_losses, batch, target, z, chunk=2).double()
        steps = central_differences(model, row_losses, batch, target, z[0], eps=1e-4).double()
    along = torch.einsum("nij,kij->nk", want, z)
    assert want.norm() > 0
    assert float((grads - want).norm() / want.norm()) < tolerance
    assert float((slopes - along).norm() / along.norm()) < 10 * tolerance
    assert not smooth or float((steps - along[:, 0]).norm() / along[:, 0].norm()) < 0.03
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    return target


SHAPES = {
    "FlaubertWithLMHeadModel": "lists of parts, not of layers",
    "Gemma3nForCausalLM": "several streams, inputs per layer, outputs written into, keys shared by later layers",
    "MambaForCausalLM": "no attention",
    "MiniMaxForCausalLM": "the last layer is linear attention",
    "NemotronHForCausalLM": "the last layer is an MLP",
    "OPTForCausalLM": "flattened tokens",
    "RwkvForCausalLM": "recurrent, by name",
    "Zamba2ForCausalLM": "one attention layer used at several depths",
    "xLSTMForCausalLM": "recurrent, by name",
}


JOINT = ["bigcode, interleaved", "falcon, groups", "CodeGenForCausalLM", "DeepseekV3ForCausalLM", "GPT2LMHeadModel"]


@pytest.mark.parametrize("name", [*JOINT, *SHAPES])
def test_gradients_are_one_backward_pass_per_row(name):
    everything(build(name, torch.float64))


def test_which_layer_counts():
    names = {name: LastLayer.of(build(name)) for name in SHAPES}
    assert {name: (found.name, found.kind) for name, found in names.items()} == {
        "FlaubertWithLMHeadModel": ("transformer.attentions.1.v_lin.weight", "values"),
        "Gemma3nForCausalLM": ("model.layers.1.self_attn.v_proj.weight", "values"),
        "MambaForCausalLM": ("backbone.layers.1.mixer.out_proj.weight", "output"),
        "MiniMaxForCausalLM": ("model.layers.0.self_attn.v_proj.weight", "values"),
        "NemotronHForCausalLM": ("model.layers.2.mixer.v_proj.weight", "values"),
        "OPTForCausalLM": ("model.decoder.layers.1.self_attn.v_proj.weight", "values"),
        "RwkvForCausalLM": ("rwkv.blocks.1.attention.value.weight", "values"),
        "Zamba2ForCausalLM": ("model.layers.1.shared_transformer.self_attn.v_proj.weight", "values"),
        "xLSTMForCausalLM": ("backbone.blocks.1.mlstm_layer.v.weight", "values"),
    }
    assert len(names["Zamba2ForCausalLM"].sharing) == 2
    assert [name for name, found in names.items() if not found.replays] == ["FlaubertWithLMHeadModel"]


ADAPTERS = {
    "plain": ("LoraConfig", {"r": 3}),
    "rslora": ("LoraConfig", {"r": 3, "use_rslora": True}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
}


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name in ("CodeGenForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM")
        for kind in ADAPTERS
        if (name, kind) != ("GPT2LMHeadModel", "oft")  # peft has none for Conv1D
    ],
)
def test_adapters_on_joint_and_transposed_projections(name, kind):
    """LoRA's B has the projection's rows; adapters without one leave the weight, whatever they do to it."""
    import peft

    config, settings = ADAPTERS[kind]
    if name == "GPT2LMHeadModel":
        settings = {**settings, "fan_in_fan_out": True}
    model = zoo.build(name, dtype=torch.float64)
    plain = LastLayer.of(model)
    where = plain.name.removesuffix(".weight").rpartition(".")[2]
    model = peft.get_peft_model(model, getattr(peft, config)(target_modules=[where], **settings)).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4
    target = everything(model.eval(), smooth=kind != "dora")  # DoRA's gradient leaves the norm of its weight out
    assert torch.equal(torch.arange(96)[target.outputs], torch.arange(96)[plain.outputs])
    assert ("lora_B" in target.name) == (config != "IA3Config" and config != "OFTConfig")


def test_an_adapter_that_is_off_or_merged_leaves_the_weight():
    import peft

    model = peft.get_peft_model(
        zoo.build("LlamaForCausalLM"), peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    )
    assert LastLayer.of(model).adapter == "default"
    with model.disable_adapter():
        assert LastLayer.of(model).name.endswith("v_proj.base_layer.weight")
    model.merge_adapter()
    assert LastLayer.of(model).name.endswith("v_proj.base_layer.weight")


def test_wrappers_are_looked_through_by_colm_and_refused_by_last_layer():
    model = zoo.build("LlamaForCausalLM")
    compiled = torch.compile(model)  # which compiles at its first call
    assert CoLM(compiled, row_losses, keep=2).model is model
    with pytest.raises(DataError, match="OptimizedModule is a wrapper .* pass the inner model"):
        LastLayer.of(compiled)


def test_a_projection_is_named_as_the_model_without_adapters_names_it():
    import peft

    model = peft.get_peft_model(
        zoo.build("LlamaForCausalLM"), peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    )
    for name in ("model.layers.1.self_attn.o_proj", "self_attn.o_proj", "o_proj"):
        assert LastLayer.of(model, name).name == (
            "base_model.model.model.layers.1.self_attn.o_proj.lora_B.default.weight"
        )


def test_a_named_projection():
    """Any linear layer of any decoder layer; of a joint one the values; of routed experts all of it, row by row."""
    model = zoo.build("GPTNeoXForCausalLM")
    named = LastLayer.of(model, "gpt_neox.layers.0.attention.query_key_value")
    assert named.kind == "values" and torch.equal(named.outputs, LastLayer.of(model).outputs) and len(named.layers) == 1
    assert LastLayer.of(model, "attention.dense").name == "gpt_neox.layers.1.attention.dense.weight"
    with pytest.raises(DataError, match="no decoder layer uses 'lm_head'"):
        LastLayer.of(model, "lm_head")
    with pytest.raises(DataError, match=r"gpt_neox.layers.1.attention is a GPTNeoXAttention; expected a linear layer"):
        LastLayer.of(model, "gpt_neox.layers.1.attention")
    with pytest.raises(DataError, match=r"no layer 'v_proj'; its linear layers are gpt_neox.layers.\*.attention.query"):
        LastLayer.of(model, "v_proj")


def test_models_without_value_rows_say_which_layer_can_be_named():
    model = zoo.build("XLNetLMHeadModel")
    with pytest.raises(
        DataError, match=r"no linear layer .* name one of them \(projection='transformer.layer.1.ff.lay"
    ):
        LastLayer.of(model)
    target = LastLayer.of(model, "transformer.layer.1.ff.layer_2")
    assert target.kind == "named" and not target.product, "its tokens come first, its rows second"
    with pytest.raises(DataError, match="ReformerModelWithLMHead: .* coresets cannot use this architecture"):
        LastLayer.of(zoo.build("ReformerModelWithLMHead"))


def test_a_model_that_changes_itself_on_short_rows_is_refused_and_put_back():
    model = zoo.build("BigBirdForCausalLM")
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(DataError, match="replaces modules of .* attention_type='original_full'"):
        LastLayer.of(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.config.attention_type == model.bert.attention_type == "block_sparse"


def test_time_first_layers_with_as_many_tokens_as_rows():
    """The sizes of a batch do not tell rows from tokens: it was found out before."""

    class TimeFirst(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, *args, **kwargs):
            return self.inner(hidden_states.transpose(0, 1)).transpose(0, 1)

    model = zoo.build("LlamaForCausalLM", dtype=torch.float64)
    attention = model.model.layers[-1].self_attn
    attention.v_proj = TimeFirst(attention.v_proj)
    target = LastLayer.of(model)
    assert target.name == "model.layers.1.self_attn.v_proj.inner.weight" and not target.product
    batch, _ = some_batch(6, 6)
    batch["input_ids"].clamp_(8, 60)
    with evaluating(model):
        grads = exact_gradients(model, row_losses, batch, target)
    torch.testing.assert_close(grads.double(), brute(model, batch, target), rtol=1e-5, atol=1e-6)


def test_quantized_weights_have_no_gradient():
    model = zoo.build("LlamaForCausalLM")
    projection = model.model.layers[-1].self_attn.v_proj
    weight = projection.weight.data
    projection.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    projection.forward = lambda x: x @ weight.T
    with pytest.raises(DataError, match="v_proj has quantized weights.*lora.targets.*projection="):
        LastLayer.of(model)
