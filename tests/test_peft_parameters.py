"""LoRA on parameters that are quantized by themselves: what peft does to the dequantized model it does to the quantized one."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bnbref
from bnbref.functional import dequantize_4bit, quantize_4bit

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("bnbref.integrations.hf.transformers")

IDS = torch.arange(3, 19).view(2, 8)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(intermediate_size=96, num_local_experts=3, **SIZES),
    "gpt_oss": lambda: transformers.GptOssConfig(
        intermediate_size=64, num_local_experts=3, num_experts_per_tok=2, head_dim=32, **SIZES
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Which peft says of every pattern that is a parameter's, of a float model too.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No bitsandbytes to import, kernels uncompiled."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    caches = (peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available)
    for cached in caches:
        cached.cache_clear()
    with bnbref.eager():
        yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(found[name])
    return found


@pytest.fixture
def load(folders):
    def load(name, dtype=torch.float32, double_quant=False):
        config = hf.BnbRefConfig("nf4", double_quant=double_quant, skip_modules=[".*self_attn.*", "lm_head"])
        folder = folders[name]
        return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)

    return load


def config(targets=BOTH, **options):
    settings = {"r": 2, "target_modules": [], "task_type": "CAUSAL_LM"} | options
    return peft.LoraConfig(target_parameters=targets, **settings)


def adapted(model, *args, stirred=True, **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config(*args, **options))
    return stir(model) if stirred else model


def stir(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def experts(model):
    """The module of each layer that has the experts, under whatever wraps it."""
    found = [m for m in model.modules() if type(m).__name__.endswith("Experts") and hasattr(m, "parametrizations")]
    assert len(found) == 2
    return found


def packed(model):
    steps = [steps for module in experts(model) for steps in module.parametrizations.values()]
    return [(s.original.data.clone(), s[0].quant_state.map(torch.clone)) for s in steps]


def same(a, b):
    return all(torch.equal(x, y) and s == t for (x, s), (y, t) in zip(a, b, strict=True))


# ---- found ----------------------------------------------------------------------------------------------------------

NAMES = [
    f"{prefix}{part}"
    for prefix in ("", "experts.", "mlp.experts.", "1.mlp.experts.", "model.layers.0.mlp.experts.", "perts.", "router.")
    for part in ("gate_up_proj", "down_proj", "down_proj_bias", "weight")
]


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters() if "lora" in name}


@pytest.mark.filterwarnings("ignore:.*no parameter was matched.*")
def test_the_same_parameters_are_found_as_in_a_float_model(load):
    def outcome(model, options):
        try:
            return shapes(adapted(model, **options))
        except (ValueError, peft.tuners.tuners_utils.NoMatchingPeftModuleError) as error:
            return type(error).__name__

    @settings(max_examples=12, deadline=None)
    @given(
        name=st.sampled_from(["mixtral", "gpt_oss"]), targets=st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
        modules=st.sampled_from([[], ["q_proj"]]), pattern=st.sampled_from([{}, {"experts.down_proj": 3}]),
    )  # fmt: skip
    def run(name, targets, modules, pattern):
        options = {"targets": targets, "target_modules": modules, "rank_pattern": pattern}
        want = outcome(transformers.AutoModelForCausalLM.from_config(MODELS[name]()), options)
        got = outcome(load(name), options)
        # A bias is wrapped after the matrices: the same adapters, one inside of the other in another order.
        bare = [x if isinstance(x, str) else sorted(x.values()) for x in (got, want)]
        assert bare[0] == bare[1]
        assert got == want or any("bias" in target for target in targets)

    run()


def test_the_target_is_as_the_user_wrote_it(load):
    model = adapted(load("mixtral"))
    assert model.peft_config["default"].target_parameters in (BOTH, set(BOTH))


def test_what_matches_nothing_is_said_as_ever(load):
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        adapted(load("mixtral"), ["experts.nothing"], target_modules=["q_proj"])


# ---- training -------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], ["model.layers.1.mlp.experts.down_proj"]])
def test_output_and_gradients_are_those_of_the_dequantized_model(name, targets, load):
    """The same operations on the same values, so the same bits."""
    runs = []
    for plain in (False, True):
        base = load(name, double_quant=True)
        model = adapted(base.dequantize() if plain else base, targets).train()
        for _ in range(2):  # the second finds what the first has left
            model(input_ids=IDS, labels=IDS).loss.backward()
        runs.append(({n: p.grad for n, p in model.named_parameters() if p.requires_grad}, logits(model)))
    (got, output), (want, expected) = runs
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        assert torch.equal(gradient, want[key]), key
        assert gradient.abs().max() > 0, key
    assert torch.equal(output, expected)


@each_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_and_are_loaded_again(name, checkpointing, load, tmp_path):
    options = {"use_gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    base = peft.prepare_model_for_kbit_training(load(name, torch.bfloat16), **options)
    model = adapted(base, stirred=False).train()
    before = packed(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert same(packed(model), before)
    assert all(len(steps) == 1 for module in experts(model) for steps in module.parametrizations.values())
    want = logits(model)
    model.save_pretrained(tmp_path)
    base = peft.prepare_model_for_kbit_training(load(name, torch.bfloat16))
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(again), want)


def test_two_adapters_and_none(load):
    options = {"rank_pattern": {"experts.down_proj": 3}}
    model = adapted(load("mixtral"), **options)
    base, first = logits(load("mixtral")), logits(model)
    model.add_adapter("second", config(**options))
    stir(model, seed=1)
    names = {n.replace("second", "default"): s for n, s in shapes(model).items() if "second" in n}
    assert names == {n: s for n, s in shapes(model).items() if "default" in n}
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_two_adapters_at_once_are_as_over_the_dequantized_model(load):
    outputs = []
    for plain in (False, True):
        base = load("mixtral")
        model = adapted(base.dequantize() if plain else base)
        model.add_adapter("second", config())
        stir(model, seed=1).base_model.set_adapter(["default", "second"])
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_an_adapter_is_merged_where_it_is(load):
    """The second adapter has a layer and no parameter."""
    model = adapted(load("mixtral"))
    model.add_adapter("second", config(None, target_modules=["lm_head"]))
    stir(model, seed=1)
    before = packed(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    merged = logits(model)
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    assert all(module.merged_adapters == ["default"] for module in wrappers)
    model.unmerge_adapter()
    assert same(packed(model), before)
    model.merge_adapter(["default", "second"])
    assert torch.equal(logits(model), merged)


# ---- merging --------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("double_quant", [False, True])
def test_merging_is_one_rounding_and_unmerging_is_exact(name, double_quant, load, tmp_path):
    model = adapted(load(name, double_quant=double_quant))
    want, before = logits(model), packed(model)
    wrappers = [m for m in model.modules() if type(m).__name__ == "ParamWrapper"]
    expected = {}
    for wrapper in wrappers:
        steps = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
        state = steps[0].quant_state
        total = dequantize_4bit(steps.original, state) + wrapper.get_delta_weight("default")
        expected[wrapper] = quantize_4bit(total, quant_type="nf4", compress_statistics=double_quant)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        for wrapper, (codes, state) in expected.items():
            steps = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
            assert torch.equal(steps.original, codes)
            assert steps[0].quant_state == state
        merged = logits(model)
        assert not torch.equal(merged, want)
        model.unmerge_adapter()
        assert same(packed(model), before)
        assert torch.equal(logits(model), want)
    whole = model.merge_and_unload()
    assert torch.equal(logits(whole), merged)
    whole.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), merged)


def test_two_adapters_are_merged_by_one_rounding_of_their_sum(load):
    model = adapted(load("mixtral"))
    model.add_adapter("second", config())
    stir(model, seed=1)
    before = packed(model)
    model.merge_adapter(["default", "second"])
    want = packed(model)
    model.unmerge_adapter()
    assert same(packed(model), before)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    assert same(packed(model), want)


def test_merging_into_the_dequantized_model(load):
    model = adapted(load("mixtral"))
    want = logits(model)
    model.get_base_model().dequantize()
    # The sum of the values and the delta is the same float32 number, added while reading or once.
    torch.testing.assert_close(logits(model), want)
    wrapper = next(module for module in model.modules() if type(module).__name__ == "ParamWrapper")
    expected = wrapper.get_param().detach() + wrapper.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(wrapper.get_param(), expected)
    torch.testing.assert_close(logits(model), want)


def test_an_adapter_is_taken_out_of_a_model_that_was_dequantized_after_merging(load):
    """Not the codes from before come back: the adapter is subtracted, as peft does it in a float model."""
    model = adapted(load("mixtral"))
    model.merge_adapter()
    model.get_base_model().dequantize()
    wrapper = next(module for module in model.modules() if type(module).__name__ == "ParamWrapper")
    expected = wrapper.get_param().detach() - wrapper.get_delta_weight("default")
    model.unmerge_adapter()
    assert torch.equal(wrapper.get_param(), expected)


def test_an_adapter_that_is_not_finite_is_refused(load):
    model = adapted(load("mixtral"), BOTH[:1])
    before = packed(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter()
    assert same(packed(model), before)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_what_reads_the_weight_of_a_layer_is_refused(load):
    with pytest.raises(
        ValueError, match=r"'olora' reads the weight of a layer: for '(gate_up|down)_proj' of .*Experts"
    ):
        adapted(load("mixtral"), init_lora_weights="olora")


def test_the_packed_weight_of_a_layer_is_no_target(folders):
    quantization = hf.BnbRefConfig("nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["mixtral"], quantization_config=quantization)
    with pytest.raises(ValueError, match=r"q_proj\.weight is the packed weight of Linear4bit.*target_modules"):
        adapted(model, ["q_proj.weight"])
