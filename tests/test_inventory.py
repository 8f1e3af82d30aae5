"""`bnbref.report`: a line for each kind of parameter, the bytes of each, and why what is left is left."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import bnbref
from bnbref.nn import inventory
from bnbref.nn.parametrize import replace_parameter_4bit

pytestmark = pytest.mark.usefixtures("eager")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.ones(2, 64, 64)) for _ in range(2))


class OwnLinear(nn.Linear):
    pass


@pytest.fixture
def model():
    """Parameters of every kind: quantized, not yet, tied, left for a reason, and without values."""
    found = nn.ModuleDict()
    found["embed"] = nn.Embedding(64, 64)
    found["layers"] = nn.ModuleList(bnbref.nn.LinearNF4(64, 64, bias=False) for _ in range(5)).to("cpu")
    found["layers"][2] = bnbref.nn.LinearFP4(64, 64, compress_statistics=False).to("cpu")
    found["int8"] = bnbref.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    found["later"] = bnbref.nn.LinearNF4(64, 64, bias=False)
    found["experts"] = Experts()
    replace_parameter_4bit(found["experts"], "up", compress_statistics=False)
    found["norm"] = nn.LayerNorm(64)
    found["lora_A"] = nn.Linear(64, 4, bias=False)
    found["frozen_lora_B"] = nn.Linear(4, 64, bias=False).requires_grad_(False)
    found["own"] = OwnLinear(8, 8, bias=False)
    found["away"] = nn.Linear(8, 8, device="meta")
    found["head"] = nn.Linear(64, 64, bias=False)
    found["head"].weight = found["embed"].weight
    found["net"] = nn.Conv2d(4, 4, 3, bias=False)
    setattr(
        found,
        inventory.REASONS,
        {"own": "by its module", "experts.down": "by its name", "norm": "of what has no matrix"},
    )
    return found


def test_the_table(model):
    assert_expected_inline(
        str(bnbref.report(model)),
        """\
parameter                        shape  format    bytes
embed.weight                   64 x 64  float32  16,384  embedding
layers.[0-1,3-4].weight    4 x 64 x 64  nf4       8,480  blocksize 64, scales in 8 bits
layers.2.weight                64 x 64  fp4       2,304  blocksize 64
layers.2.bias                       64  float32     256  bias
int8.weight                    32 x 64  int8      2,176  row by row
later.weight                   64 x 64  float32  16,384  LinearNF4, to be quantized by .to(device)
experts.down               2 x 64 x 64  float32  32,768  by its name
experts.up                 2 x 64 x 64  nf4       4,608  blocksize 64
norm.weight                         64  float32     256  vector of LayerNorm
norm.bias                           64  float32     256  bias
lora_A.weight                   4 x 64  float32   1,024  adapter
frozen_lora_B.weight            64 x 4  float32   1,024  adapter
own.weight                       8 x 8  float32     256  by its module
away.weight                      8 x 8  float32     256  linear layer that was not replaced, on meta
away.bias                            8  float32      32  bias, on meta
head.weight                    64 x 64  tied          0  to embed.weight
net.weight               4 x 4 x 3 x 3  float32     576  4-dimensional parameter of Conv2d, which is no linear layer
63.9 % of 48,088 parameters quantized, 87,040 bytes, 14.48 bits a parameter""",
    )


def test_parameters_with_and_without_their_kind(model):
    found = bnbref.report(model)
    assert [p.name for p in found.quantized] == [
        *(f"layers.{i}.weight" for i in range(5)), "int8.weight", "experts.up",
    ]  # fmt: skip
    assert len(found.quantized) + len(found.skipped) == len(found.parameters)
    assert not any(p.quantized for p in found.skipped)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got OrderedDict"):
        bnbref.report(model.state_dict())


def test_an_adapter_of_peft_is_called_so():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(bnbref.nn.LinearNF4(64, 64)).to("cpu")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    assert {p.reason for p in bnbref.report(adapted).skipped if p.name.startswith("base_model.model.0.lora_")} == {
        "adapter"
    }
