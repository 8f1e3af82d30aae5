"""torchao's NF4 tensor: what is red, `pip install torchao==0.17.0 torch`."""

from rules import beside, codes, red_codes, sixteen_bits, unpack
from torchao.dtypes.nf4tensor import NF4Tensor


def quantize(block):
    return unpack(NF4Tensor.from_tensor(block, 64, 1).quantized_data)


# Values of four decimal digits: -0.6962 for -0.6961928, and thresholds between these.
red_codes("Q4-3", beside(), quantize(beside()), codes(beside()))
# At another scale too, and by more than a division could explain: 64 steps beside a threshold.
far = beside((-64, 64)) * 1.25
red_codes("Q4-2", far, quantize(far), codes(far))
# In bfloat16 scaling, table and distances have eight bits: numbers that are nowhere near a threshold are coded wrongly.
red_codes("Q4-1", *sixteen_bits(quantize))
