"""peft on bnbref's layers, without bitsandbytes: adapters train, merge, unmerge and are loaded again."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bnbref
from bnbref import functional, int8
from bnbref.nn import Linear4bit, Linear8bitLt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("bnbref.integrations.hf.transformers")
lora = pytest.importorskip("bnbref.integrations.hf.peft")

AutoModelForCausalLM = transformers.AutoModelForCausalLM
lora_model = peft.tuners.lora.model
FIXTURES = Path(__file__).parent / "fixtures" / "checkpoints"
KINDS = ("nf4_nested", "nf4_plain", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No bitsandbytes to import, bnbref in its place, kernels uncompiled."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    caches = (peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available)
    for cached in caches:
        cached.cache_clear()
    hf.take_over_bitsandbytes()
    with bnbref.eager():
        yield
    hf.give_back_bitsandbytes()
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(scope="module")
def ids():
    return load_file(FIXTURES / "int8" / "reference.safetensors")["ids"]


def quantized(kind, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(FIXTURES / kind, dtype=dtype)


def config(**options):
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.0} | options
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def with_adapter(kind, **options):
    """A model with an adapter that does something."""
    model = peft.get_peft_model(quantized(kind), config(**options))
    stir(model)
    return model.eval()


def stir(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def values(layer):
    """The weight of a quantized layer as float32."""
    if isinstance(layer, Linear4bit):
        return layer.quant_state.dequantize(layer.weight, torch.float32)
    return int8.dequantize(layer.weight.data, layer.weight.SCB, torch.float32)


def codes(model):
    """The codes of every quantized layer, in the model's order."""
    return [m.weight.data.clone() for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ---- training -------------------------------------------------------------------------------------------------------


@each_kind
def test_adapters_train_and_are_loaded_again(kind, ids, tmp_path):
    torch.manual_seed(0)
    model = peft.prepare_model_for_kbit_training(
        quantized(kind, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8 if kind == "int8" else torch.uint8}
    before = codes(model)
    model = peft.get_peft_model(model, config()).train()
    assert isinstance(model.get_submodule(Q), lora.LoraLinear)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert same(codes(model), before)
    model.eval()
    want = logits(model, ids)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        peft.prepare_model_for_kbit_training(quantized(kind, torch.bfloat16)), tmp_path
    ).eval()
    assert torch.equal(logits(again, ids), want)
    again.merge_adapter()
    assert not same(codes(again), before)
    again.unmerge_adapter()
    assert same(codes(again), before)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gradients_are_those_of_the_dequantized_model(quant_type, ids):
    """The same operations on the same values, so the same bits."""
    gradients = []
    for plain in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(
            FIXTURES / "base", dtype=torch.float32, quantization_config=hf.BnbRefConfig(quant_type)
        )
        model = peft.get_peft_model(base.dequantize() if plain else base, config())
        stir(model)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["nf4_nested", "int8"])
def test_training_is_one_graph(kind, ids):
    """Forward and backward of QLoRA under torch.compile(fullgraph=True), against eager."""
    settings = transformers.AutoConfig.from_pretrained(FIXTURES / kind, num_hidden_layers=1)
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / kind, config=settings, dtype=torch.float32)
    model = peft.get_peft_model(base, config())
    stir(model)
    model.train()

    def step(run):
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return [loss.detach(), *found]

    want = step(model)
    torch._dynamo.reset()
    got = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert len(got) == 7
    for a, b in zip(got, want, strict=True):
        # Float sums in another order: a few ulps, of a loss of 6 and of gradients below 1.
        torch.testing.assert_close(a, b)


# ---- merging --------------------------------------------------------------------------------------------------------


@each_kind
def test_merging_is_one_rounding_and_unmerging_is_exact(kind, ids):
    model = with_adapter(kind)
    layer = model.get_submodule(Q)
    base = layer.base_layer
    want = logits(model, ids)
    before, old = codes(model), values(base)
    delta = layer.get_delta_weight("default")
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert not same(codes(model), before)
        if kind == "int8":
            expected, absmax, _ = int8.quantize(old + delta)
            assert torch.equal(base.weight.data, expected)
            assert torch.equal(base.weight.SCB, absmax)
        else:
            expected, state = functional.quantize_4bit(
                old + delta, quant_type="nf4", compress_statistics=kind == "nf4_nested"
            )
            assert torch.equal(base.weight.data, expected)
            state.dtype = torch.bfloat16  # as the checkpoint says
            assert base.quant_state == state
        merged = logits(model, ids)
        assert not torch.equal(merged, want)
        assert (merged - want).abs().max() < (want - logits(quantized(kind), ids)).abs().max() / 2
        model.unmerge_adapter()
        assert same(codes(model), before)
        assert torch.equal(logits(model, ids), want)


@each_kind
def test_two_adapters_are_merged_by_one_rounding_of_their_sum(kind):
    model = with_adapter(kind)
    model.add_adapter("second", config())
    stir(model, seed=1)
    layer = model.get_submodule(Q)
    total = values(layer.base_layer) + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    before = codes(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    again = layer.base_layer.weight.unquantized(total).to("cpu")
    assert torch.equal(layer.base_layer.weight.data, again.data)
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    model.unmerge_adapter()
    assert same(codes(model), before)


@each_kind
def test_an_adapter_that_waits_for_its_tokens_is_as_over_the_dequantized_model_and_not_merged(kind, ids):
    """An aLoRA adds nothing to tokens before its own. Merged, it would add the same to all."""
    options = {"alora_invocation_tokens": ids[0, 4:6].tolist()}
    model, plain = with_adapter(kind, **options), quantized(kind)
    for layer in (*model.modules(), *plain.modules()):
        if isinstance(layer, Linear4bit):
            layer.compute_dtype = torch.float32  # that of the files rounds activations
    floats = peft.get_peft_model(quantized(kind).dequantize(), config(**options))
    peft.set_peft_model_state_dict(floats, peft.get_peft_model_state_dict(model))
    want = logits(floats.eval(), ids)
    got = logits(model, ids)
    base = logits(plain, ids)
    assert torch.equal(got[0, :4], base[0, :4])
    assert not torch.equal(got[0, 4:], base[0, 4:])
    if kind != "int8":  # whose activations are rounded, too
        torch.testing.assert_close(got, want)
    before = codes(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'default' cannot be merged into Linear\w+\(.*: aLoRA does not support"):
            merge()
    assert same(codes(model), before)
    assert torch.equal(logits(model, ids), got)


def test_a_router_of_adapters_is_not_merged():
    layer = lora.LoraLinear(Linear4bit(64, 64, quant_type="nf4").to("cpu"), "router", config(), r=4, lora_alpha=8)
    layer.lora_variant["router"] = peft.tuners.lora.variants.ArrowLinearVariant()
    with pytest.raises(ValueError, match=r"'router' cannot be merged into .*Remove it first"):
        layer.merge()


@each_kind
def test_merge_and_unload_then_save_and_load(kind, ids, tmp_path):
    model = with_adapter(kind)
    model.merge_adapter()
    want = logits(model, ids)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is (Linear8bitLt if kind == "int8" else Linear4bit)
    assert torch.equal(logits(merged, ids), want)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, ids), want)


@each_kind
def test_merging_into_the_dequantized_model(kind, ids):
    model = with_adapter(kind)
    layer = model.get_submodule(Q)
    expected = values(layer.base_layer) + layer.get_delta_weight("default")
    model.get_base_model().dequantize()
    model.merge_adapter()
    assert torch.equal(model.get_submodule(Q).base_layer.weight, expected)
    assert logits(model, ids).isfinite().all()


@each_kind
def test_an_adapter_is_taken_out_of_a_model_that_was_dequantized_after_merging(kind):
    """Not the codes from before come back: the adapter is subtracted, as peft does it in a float model."""
    model = with_adapter(kind)
    model.merge_adapter()
    layer = model.get_submodule(Q)
    expected = values(layer.base_layer) - layer.get_delta_weight("default")
    model.get_base_model().dequantize()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, expected)


def test_a_bias_is_merged_too():
    torch.manual_seed(0)
    small = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
    base = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=64, **small)
    )
    attention = base.transformer.h[0].attn
    attention.c_attn = Linear4bit(64, 192, quant_type="nf4").to("cpu")
    options = {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}
    model = peft.get_peft_model(base, config(**options)).eval()
    layer = attention.c_attn
    assert isinstance(layer, lora.LoraLinear)
    layer.lora_B["default"].bias.data.normal_()
    before = layer.base_layer.bias.detach().clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.bias, before + layer.lora_B["default"].bias * layer.scaling["default"])
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, before)
    layer.base_layer.bias.data += 1  # what it is now is what comes back the next time
    for _ in range(2):
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.bias, before + 1)


def test_the_life_of_adapters_is_that_on_the_dequantized_model(ids, tmp_path):
    """Added, chosen by row, weighted, disabled, deleted, swapped for one of another rank, unloaded: the same logits."""
    hotswap = pytest.importorskip("peft.utils.hotswap")

    def fill(model, seed):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1

    def fresh(dequantized, **options):
        spec = bnbref.BnbRefConfig("nf4")  # of float32: what it dequantizes to is not rounded again
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32, quantization_config=spec)
        model = model.dequantize() if dequantized else model
        return peft.get_peft_model(model, config(**options)).eval()

    models = [fresh(False), fresh(True)]
    rows = ids[:1].repeat(3, 1)

    def alike(look=lambda model: model(input_ids=rows).logits):
        with torch.no_grad():
            ours, plain = map(look, models)
        assert same(ours, plain)
        return ours

    for model in models:
        model.add_adapter("b", config(r=2, target_modules=["up_proj"]))
        fill(model, 1)
        model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "both", combination_type="cat")
    chosen = ["b", "__base__", "default"]
    mixed = alike(lambda model: model(input_ids=rows, adapter_names=chosen).logits)
    found = {}
    for name in ("default", "b", "both"):
        for model in models:
            model.set_adapter(name)
        found[name] = alike()
        with models[0].disable_adapter(), models[1].disable_adapter():
            found["__base__"] = alike()
    assert len({str(x[0].tolist()) for x in found.values()}) == 4
    for row, name in enumerate(chosen):
        torch.testing.assert_close(mixed[row], found[name][row])
    for model in models:
        model.delete_adapter("both")
        model.set_adapter("default")
    assert same(alike(), found["default"])
    for model, path in zip(models, (tmp_path / "ours", tmp_path / "plain"), strict=True):
        other = fresh(model is models[1], r=8)
        fill(other, 2)
        other.save_pretrained(path)
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap.hotswap_adapter(model, path, "default")
    assert not same(alike(), found["default"])
    models = [model.unload() for model in models]
    assert same(alike(), found["__base__"])
    assert isinstance(models[0].model.layers[0].self_attn.q_proj, Linear4bit)


@each_kind
def test_an_adapter_that_is_not_finite_is_refused(kind):
    model = with_adapter(kind)
    model.get_submodule(Q).lora_B["default"].weight.data[0, 0] = float("nan")
    before = codes(model)
    for safe in (False, True):
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.get_submodule(Q).merge(safe_merge=safe)
    assert same(codes(model), before)
    assert not model.get_submodule(Q).merged


@each_kind
@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_was_made_before_is_never_merged_silently(kind, safe, ids, monkeypatch):
    """Before peft was adapted, by an import or by a model that was loaded."""
    with monkeypatch.context() as patch:
        patch.setattr(lora_model, "dispatch_default", lora_model.dispatch_default.__wrapped__)
        model = with_adapter(kind)
    want, before = logits(model, ids), codes(model)
    with pytest.raises(ValueError, match=r"LORA cannot be merged into .*q_proj, .*register_lora"):
        model.merge_adapter(safe_merge=safe)
    with pytest.raises(ValueError, match=r"LORA cannot be merged into .*q_proj, .*register_lora"):
        model.merge_and_unload(safe_merge=safe)
    assert same(codes(model), before)
    assert torch.equal(logits(model, ids), want)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa"}]
)
def test_what_reads_weights_through_bitsandbytes_is_refused(options):
    with pytest.raises(ValueError, match=r"LORA with .* reads the weight of model.layers.0.self_attn.q_proj"):
        peft.get_peft_model(quantized("nf4_plain"), config(**options))


def test_other_configs_are_refused():
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got IA3Config"):
        lora.register_lora(peft.IA3Config())
    mine = config()
    assert lora.register_lora(mine) is mine


def test_merging_what_is_offloaded_is_refused(ids, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = with_adapter("nf4_plain")
    accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    assert logits(model, ids).isfinite().all()
    with pytest.raises(ValueError, match="offloaded"):
        model.get_submodule(Q).merge()


def test_a_layer_outside_of_transformers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), Linear8bitLt(64, 64, has_fp16_weights=False)).to("cpu")
    options = {"r": 4, "target_modules": ["1"]}
    model = peft.get_peft_model(net, peft.LoraConfig(**options))
    x = torch.randn(3, 64)
    assert torch.equal(model(x), net[1].base_layer(net[0](x)))
    stir(model)
    model(x).sum().backward()
    assert net[1].lora_A["default"].weight.grad.abs().max() > 0


# ---- X-LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`adapters` is:UserWarning")
def test_xlora_mixes_adapters_as_over_the_dequantized_model(ids, tmp_path):
    """Its config has none of the fields that name modules."""
    for seed in (0, 1):
        model = with_adapter("nf4_nested")
        stir(model, seed)
        model.save_pretrained(tmp_path / str(seed))

    def load():
        return quantized("nf4_nested", torch.bfloat16)  # the dtype in which its products are made

    def mixed(model):
        model.config.use_cache = False
        adapters = {str(seed): str(tmp_path / str(seed)) for seed in (0, 1)}
        sizes = {"hidden_size": model.config.hidden_size, "xlora_depth": 1}
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.XLoraConfig(task_type="CAUSAL_LM", adapters=adapters, **sizes)).eval()

    found, without = mixed(load()), load().eval()
    assert torch.equal(logits(found, ids), logits(mixed(load().dequantize()), ids))
    assert not torch.equal(logits(found, ids), logits(without, ids))
