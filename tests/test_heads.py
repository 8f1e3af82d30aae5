"""Heads and layers whose weight is not the layer's alone: resized, tied, or read by the model around it."""

import sys

import pytest
import torch
from torch import nn

import bnbref
from bnbref import as_bitsandbytes
from bnbref.nn import Embedding4bit, Embedding8bit, Linear4bit, Linear8bitLt

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("bnbref.integrations.hf.transformers")
readers = pytest.importorskip("bnbref.integrations.hf.readers")

IDS = torch.arange(3, 19).view(2, 8)
SMALL = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1}
each_kind = pytest.mark.parametrize("kind", ["nf4", "int8"])


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    hf.take_over_bitsandbytes()
    with bnbref.eager():
        yield
    hf.give_back_bitsandbytes()


def saved(folder, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


def llama(**options):
    return transformers.LlamaConfig(intermediate_size=96, num_attention_heads=4, **SMALL, **options)


def load(folder, config=None):
    options = {} if config is None else {"quantization_config": config}  # an explicit None means float to transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


# ---- resized --------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("tokens", [70, 40])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_a_quantized_head_that_is_resized_is_float_and_keeps_its_rows(kind, tokens, mean_resizing, tmp_path, caplog):
    saved(tmp_path / "base", llama())
    model = load(tmp_path / "base", hf.BnbRefConfig(kind, skip_modules=["nothing"]))
    assert isinstance(model.lm_head, Linear4bit if kind == "nf4" else Linear8bitLt)
    kept = min(tokens, 64)
    values = hf.dequantized("lm_head", model.lm_head, torch.float32).weight
    model.resize_token_embeddings(tokens, mean_resizing=mean_resizing)
    assert type(model.lm_head) is nn.Linear
    assert "lm_head was quantized" in caplog.text
    assert torch.equal(model.lm_head.weight[:kept], values[:kept])
    assert logits(model).shape == (2, 8, tokens)
    (head,) = [p for p in bnbref.report(model).parameters if p.name == "lm_head.weight"]
    assert (head.quantized, head.reason) == (False, "resized")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@each_kind
def test_a_quantized_head_of_the_same_size_stays(kind, tmp_path):
    saved(tmp_path, llama())
    model = load(tmp_path, hf.BnbRefConfig(kind, skip_modules=["nothing"]))
    head = model.lm_head
    model.resize_token_embeddings(64)
    assert model.lm_head is head


@pytest.mark.parametrize(
    ("kind", "tokens", "step", "size"),
    [
        (Embedding4bit, 70, None, 70),
        (Embedding4bit, 64, None, 64),  # packed it has 2048 rows, which transformers takes for its tokens
        (Embedding4bit, None, 64, 64),
        (Embedding8bit, 70, None, 70),
        (Embedding8bit, None, 48, 96),
        (Embedding8bit, 60, 128, 128),
    ],
)
def test_a_packed_embedding_is_not_resized(kind, tokens, step, size, tmp_path):
    model = saved(tmp_path, llama())
    model.model.embed_tokens = embedding = kind(64, 64).to("cpu")
    with pytest.raises(ValueError, match=rf"{kind.__name__}.* is packed: put a float .* to resize it to {size} tokens"):
        model.resize_token_embeddings(tokens, pad_to_multiple_of=step)
    assert model.resize_token_embeddings() is embedding
    if kind is Embedding8bit:
        assert model.resize_token_embeddings(64) is embedding
    assert (model.config.vocab_size, model.lm_head.out_features) == (64, 64)


# ---- tied -----------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("skip", [None, ["nothing"], ["lm_head"]])
@pytest.mark.parametrize("quantizer", ["bnbref's", "transformers'"])
def test_a_head_tied_to_a_float_embedding_computes_with_it(kind, skip, quantizer, tmp_path, monkeypatch):
    whole = saved(tmp_path, llama(tie_word_embeddings=True))
    bits = {"load_in_4bit": True} if kind == "nf4" else {"load_in_8bit": True}
    if quantizer == "bnbref's":
        model = load(tmp_path, hf.BnbRefConfig(kind, skip_modules=skip))
        got, head = logits(model), model.lm_head
    else:
        hf.give_back_bitsandbytes()
        monkeypatch.delitem(sys.modules, "bitsandbytes")
        with as_bitsandbytes(force=True):
            config = transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=skip, bnb_4bit_quant_type="nf4")
            model = load(tmp_path, config)
            got, head = logits(model), model.lm_head
    assert head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        want = nn.functional.linear(model.model(input_ids=IDS).last_hidden_state, whole.lm_head.weight)
    if isinstance(head, Linear8bitLt):  # which quantizes a float weight in each product
        assert (got - want).norm() < 0.05 * want.norm()
    else:
        assert torch.equal(got, want)


def test_a_layer_that_was_never_moved_still_says_so():
    with pytest.raises(RuntimeError, match="is not quantized yet"):
        Linear4bit(64, 64)(torch.ones(1, 64))


# ---- read by the model around it ------------------------------------------------------------------------------------

TWO = {**SMALL, "num_hidden_layers": 2}
READERS = {
    "mamba": lambda: transformers.MambaConfig(state_size=8, **TWO),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(state_size=8, **TWO),
    "mamba2": lambda: transformers.Mamba2Config(state_size=8, head_dim=16, num_heads=8, n_groups=1, **TWO),
}


@each_kind
@pytest.mark.parametrize("name", READERS)
def test_what_a_mixer_reads_by_itself_stays_float(name, kind, tmp_path, caplog):
    saved(tmp_path / "base", READERS[name]())
    model = load(tmp_path / "base", hf.BnbRefConfig(kind))
    kept = {p.name: p.reason for p in bnbref.report(model).skipped if "reads its weight by itself" in p.reason}
    assert "backbone.layers.0.mixer.out_proj.weight" in kept
    assert ("backbone.layers.0.mixer.dt_proj.weight" in kept) == (name != "mamba2")
    assert isinstance(model.backbone.layers[0].mixer.in_proj, (Linear4bit, Linear8bitLt))
    (said,) = [record.getMessage() for record in caplog.records if "out_proj" in record.getMessage()]
    assert "backbone.layers.[0-1].mixer.out_proj" in said  # one line, however many layers
    assert "reads its weight by itself" in said
    got = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), got)
    model.train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert model.backbone.layers[0].mixer.out_proj.weight.grad.isfinite().all()
    if kind == "nf4":
        assert torch.equal(logits(model.eval().dequantize()), got)


def test_torch_attention_over_the_weights_of_layers(tmp_path):
    """WavLM hands the weights of its projections to torch's function."""
    config = transformers.WavLMConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, conv_dim=(32, 32), conv_stride=(5, 2),
        conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WavLMModel(config).save_pretrained(tmp_path)
    model = transformers.WavLMModel.from_pretrained(
        tmp_path, quantization_config=hf.BnbRefConfig("nf4"), dtype=torch.float32
    )
    kept = [p.name for p in bnbref.report(model).skipped if p.reason == "WavLMAttention reads its weight by itself"]
    assert len(kept) == 4
    with torch.no_grad():
        got = model.eval()(torch.linspace(-1, 1, 400)[None]).last_hidden_state
        want = model.dequantize()(torch.linspace(-1, 1, 400)[None]).last_hidden_state
    torch.testing.assert_close(got, want)


class _Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(2, 2) for _ in range(4))
        self.block = nn.ModuleDict({"e": nn.Linear(2, 2)})
        nn.init.zeros_(self.a.weight)

    def reset_parameters(self):
        nn.init.zeros_(self.a.weight)

    def forward(self, x):
        x = self.a(x.to(self.b.weight.dtype)) + self.c(x).to(self.a.weight.device)
        return self._more(x)

    def _more(self, x):
        return x @ self.block.e.weight


class _Below(_Around):
    def _more(self, x):
        return x @ self.d.weight


def test_reads_are_found_in_the_methods_that_run():
    assert readers.read_by_others(nn.Sequential(_Around())) == {"0.b": "_Around", "0.block.e": "_Around"}
    assert readers.read_by_others(_Below()) == {"b": "_Below", "d": "_Below"}
    assert readers.read_by_others(nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))) == {}
