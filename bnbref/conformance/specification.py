"""The specification: the numbered rules that a backend is judged by, and the real bugs that cases were made from.

Both are text that is read when this module is imported. docs/content/spec shows the same text, a page for each operation.
"""

import re
from typing import NamedTuple


class Rule(NamedTuple):
    """One numbered sentence of the specification.

    id: operation and number. text: what is required. freedom: what a backend may do otherwise, and still conforms.
    """

    id: str
    operation: str
    text: str
    freedom: str = ""


class Flag(NamedTuple):
    """A bug that was real: what went wrong, where, and its number in bitsandbytes' tracker if it has one."""

    name: str
    story: str
    issue: str = ""


def _entries(block: str) -> list[str]:
    """The paragraphs of a block, each begun by a line that is not indented, without their line breaks."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?! )", block.strip())]


def _rules(text: str) -> tuple[dict[str, str], dict[str, Rule]]:
    """What each operation is, and the rules by their ids. A block is an operation, what it is, and its rules."""
    operations: dict[str, str] = {}
    found: dict[str, Rule] = {}
    for block in text.split("\n\n"):
        head, *entries = _entries(block)
        operation, _, about = head.partition(": ")
        operations[operation] = about
        for entry in entries:
            name, _, rest = entry.partition(" ")
            sentence, _, freedom = rest.partition(" Freedom: ")
            if rest.startswith("= "):  # the sentence of another operation's rule
                sentence, freedom = found[rest[2:]][2:]
            found[name] = Rule(name, operation, sentence, freedom)
    return operations, found


def _flags(text: str) -> dict[str, Flag]:
    matches = (re.fullmatch(r"(\S+): (.*?)(?: \[(#.*)\])?", entry) for entry in _entries(text))
    return {match[1]: Flag(match[1], match[2], match[3] or "") for match in matches if match}


ABOUT, RULES = _rules("""
every operation
G-1 Results have the shape and dtype that the operation defines.
G-2 Arguments are not modified.
G-3 A tensor that is not contiguous gives the result of its contiguous copy.
G-4 What is not supported is refused by an exception (ValueError, TypeError, NotImplementedError, RuntimeError).
    Freedom: Blocksizes that are no power of two, or below 32 (8 bits: 64), and int8 rows of other dtypes than float16, may be
    refused.
G-5 The sign of a floating-point zero is not compared.

quantize_blockwise: A tensor in blocks of consecutive elements, each scaled by its largest magnitude and coded in 8 bits: codes
    uint8 in the shape of x, absmax float32, one a block.
Q8-1 absmax is the largest magnitude of the block, float32, exactly.
    Freedom: A block whose largest magnitude is below 2^-126 may have absmax 0 and the codes of zero, or be scaled exactly. Where
    an element is NaN or infinite, codes and absmax of its block are free; those of other blocks are not.
Q8-2 An element is scaled in float32, by the correctly rounded reciprocal of absmax: fl(x * fl(1 / absmax)).
    Freedom: Where absmax is no power of two the scaled value may be off by 2 ulp (a hardware reciprocal, a division): the code
    may then be the one on the other side of a threshold that near. Subnormal numbers may be flushed to zero.
Q8-3 The code is that of the nearest value, by the float32 midpoint fl(fl(a + b) / 2) of neighbouring values.
Q8-4 A scaled value exactly at such a midpoint has the even code of the two.
Q8-5 A zero in a block that is not all zero has the code of the value 0, and decodes to 0.
Q8-6 An all-zero block has absmax 0 and the codes of the value 0.
    Freedom: Its codes may also be 0: times an absmax of 0 they decode to 0.
Q8-7 The last block, which may be shorter, follows the same arithmetic as the others; nothing beyond it is read or counted.

dequantize_blockwise: The values of 8-bit codes times the scales of their blocks, in float32, float16 or bfloat16.
D8-1 An element is T(fl(values[code] * absmax)): one float32 product, one rounding to nearest even.
    Freedom: Products below 2^-126 may be flushed to zero.
D8-2 Element i belongs to block floor(i / blocksize), whatever the shape.
D8-3 Where absmax is NaN the elements are NaN; beyond the range of T they are infinite.

quantize_4bit: A tensor in blocks, scaled as in 8 bits, coded in NF4 or FP4, two codes a byte: packed uint8 [(numel + 1) / 2],
    absmax float32, one a block.
Q4-1 = Q8-1
Q4-2 = Q8-2
Q4-3 The code is the number of thresholds strictly below the scaled value (NF4, whose thresholds are the float32 midpoints fl(fl(a
    + b) / 2) of its values), or strictly below its magnitude (FP4, in the order 0 1 6 7 4 5 2 3).
Q4-4 FP4's thresholds are 0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333 as float32.
Q4-5 FP4's code has 8 added if the scaled value is below 0, also where its magnitude rounds to zero; a tie has the smaller
    magnitude on both sides of zero. In a block whose absmax is stored as 0 nothing is below 0.
    Freedom: The code of -0.0 may be 0 or 8.
Q4-6 The first element of two is in the high nibble; after an odd last element comes the code of 0.0.
    Freedom: In an all-zero block the nibble may be 0, as its codes may.
Q4-7 An all-zero block has absmax 0 and the codes of the value 0: 7 (NF4), 0 (FP4).
    Freedom: NF4's code may also be 0: times an absmax of 0 it decodes to 0.
Q4-8 = Q8-7

dequantize_4bit: The values of packed 4-bit codes times the scales of their blocks, in a given shape and dtype.
D4-1 = D8-1
D4-2 Element i, in row-major order, belongs to block floor(i / blocksize): blocks run on from row to row.
D4-3 The result has the shape that was asked for: a vector is a vector, one row of one byte is one row.

quantize_4bit_nested: 4-bit quantization whose scales are quantized themselves: their mean, and 8-bit codes of what is left, in
    blocks of 256.
QN-1 offset is the mean of the absmax, and their codes are those of quantize_blockwise(absmax - offset) with the signed dynamic
    values and blocks of 256.
QN-2 An all-zero block has the codes of the value 0 without any freedom: its scale does not come back as exactly 0.
QN-3 An absmax equal to the mean has the code of the value 0.

dequantize_4bit_nested: The scales decoded from their 8-bit codes, then the weight by them.
DN-1 The scale of a block is fl(fl(values[code] * absmax2) + offset).
    Freedom: The sum may be fused: one rounding instead of two.
DN-2 Elements follow D4 with these scales, in the shape asked for.

gemm_4bit: A product with a 4-bit weight [n, k]: a [..., k] in float32, float16 or bfloat16, y [..., n] in the same.
G4-1 y = a @ W^T + bias with W as D4 decodes it to the dtype of a, and float32 accumulation.
    Freedom: With u the unit roundoff of the dtype, v that of float32: up to four roundings to the dtype in each product (value,
    scale, weight, product), any order of summation, bias before or after the last rounding: |got - y| <= (4.1 u + 2 k v) * sum |a
    w| + 2 u * (|y| + |bias|).
G4-2 Every row of a is multiplied, and leading dimensions are kept.

gemm_4bit_backward: The gradient of a product's input: grad [..., n] in float32, float16 or bfloat16, grad_a [..., k] in the same.
GB-1 grad_a = grad @ W with W as D4 decodes it to the dtype of grad, and float32 accumulation.
    Freedom: The bound of G4-1, with n for k.
GB-2 Leading dimensions are kept.

int8_quantize: LLM.int8(): rows of x scaled to 127 and rounded, columns with outliers left out.
I8-1 row absmax is the largest magnitude among the elements of the row that are below the threshold (all if it is 0).
    Freedom: A row with NaN or infinity is free, others are not. The zero of a row of outliers may be -0.0.
I8-2 The code is x * (127 / absmax) rounded to the nearest integer, ties to even.
    Freedom: Where absmax / 127 is no power of two the product may be off by 2 ulp.
I8-3 A column is an outlier column if any |x| >= threshold in it; its codes are 0 in every row, and its index is listed.
I8-4 A row of zeros has absmax 0 and codes 0.
I8-5 All dimensions but the last are rows: codes have the shape of x, absmax one element a row.

int8_matmul: The int32 product a @ b^T of int8 a [..., k] and b [n, k].
IM-1 The int32 product is exact, for every k whose sum fits in 32 bits.
IM-2 Leading dimensions are kept.

int8_mm_dequant: An int32 product scaled by the absmax of its rows and columns, over 127^2.
ID-1 y = product * row * column / 16129 + bias in float32, rounded once to the dtype.
    Freedom: Any order and rounding of the factors: |got - y| <= 5 v |product| + 2 v |y| + 2 u (|y| + |bias|), with v the unit
    roundoff of float32 and u that of the dtype.
ID-2 The range is that of the dtype, not of another one on the way.
ID-3 The shape of the product is kept.

int8_dequantize: int8 rows scaled back.
IV-1 y = code * absmax / 127 in float32.
    Freedom: Any order of the two factors, product or division: 4 ulp.

int8_backward: The gradients of y = a @ W^T by LLM.int8(), whose weight is a float tensor that is quantized on the way: a [...,
    k], weight [n, k] and grad [..., n] of one dtype.
IB-1 grad_a = grad @ W with W = code * absmax / 127 of the weight's rows, rounded to the dtype of grad.
    Freedom: The bound of G4-1, with n for k.
IB-2 grad_weight = grad^T @ a.
    Freedom: The bound of G4-1, with the number of rows m for k. Both may be quantized to int8 on the way, by the absmax of their
    columns: d_g sum |a| + d_a sum |grad| + m d_g d_a more, d being a column's absmax / 253.
IB-3 All dimensions but the last are rows; grad_a has the shape of a.

save_4bit: The tensors that bitsandbytes writes for a 4-bit weight, byte for byte.
CW-1 A file holds the packed codes, absmax, quant_map and, nested, nested_absmax and nested_quant_map, as quantization gave them.
CW-2 The state is the UTF-8 of a JSON object with the keys quant_type, blocksize, dtype, shape and, nested, nested_blocksize,
    nested_dtype, nested_offset, in this order, with ", " and ": " between.

load_4bit: The weight from such tensors.
CR-1 The tensors of a file give the weight that D4 (nested: DN) decodes, in the dtype and shape of the state.

evaluate_then_train: A Linear4bit of a packed weight, evaluated without gradients (y), then trained on the same input (grad_x),
    then saved (packed, absmax).
LE-1 In evaluation mode y = x @ W^T + bias in the dtype of x.
    Freedom: The bound of G4-1.
LE-2 In training mode afterwards the gradient of x is that of GB, as if nothing had been evaluated.
    Freedom: Its bound.
LE-3 What is saved then are the packed codes and the absmax that the layer was made of, bit for bit.

optimizer_32bit: One step of an optimizer with float32 states, p and g float32, float16 or bfloat16. Nothing is updated in place:
    the new p and states are the results.
OS-1 p = T(decay p - rate direction), states and direction by the formula of the optimizer, in float32, with g * gnorm_scale for
    the gradient. What a step depends on are its arguments alone: a run that is resumed is one that was not interrupted.
    Freedom: Any order of the operations, fused or not: each may be off by four unit roundoffs. 1 - beta may be taken of beta
    rounded to float32, beta^step be off by (step + 2) 2^-22. Numbers below 2^-126 may be flushed to zero.
OS-2 Weight decay is decoupled (adam, lamb, lion, ademamix: the old p is multiplied by 1 - lr wd) or coupled (momentum, lars,
    rmsprop, adagrad: wd p is added to the gradient, wherever the formula has it).
    Freedom: Where p has 16 bits, the decayed gradient may be rounded to them.
OS-3 gnorm_scale multiplies the gradient before anything else, wherever the formula has it.
OS-4 Where gradient and states are zero and there is no decay, p and the states are bit for bit what they were.
OS-5 lars and lamb with max_unorm > 0: the rate is multiplied by min(1, max_unorm |p| / |direction|), the Euclidean norms of the
    whole tensors, with bias corrections (lamb) and decay (lars) in the direction.
    Freedom: The sums of n squares have any order: 2 n unit roundoffs.
OS-6 A gradient that is NaN or infinite changes no other element.
    Freedom: p and states of the element itself.
OS-7 p is rounded once, to its dtype; all elements are stepped, in any shape.

optimizer_8bit: The same with states as uint8 codes and float32 absmax of blocks of 256 consecutive elements. values1 is the
    signed dynamic map, also of the squares of rmsprop and adagrad, as bitsandbytes has it, or the unsigned one; values2 is the
    unsigned one.
OB-1 States are decoded as D8 says, in blocks of 256: state1 and state3 with values1, state2 with values2. p follows OS with them.
    Freedom: That of OS.
OB-2 Each new state, before its coding in float32, is coded as Q8 says: absmax of its block, the nearest value.
    Freedom: absmax within what OS leaves; the codes on both sides of a threshold that lies within it. Where absmax is 0 codes are
    free. A negative number whose nearest value is 0 may have the code below, to keep its sign.
OB-3 Weight decay and gnorm_scale act as OS-2 and OS-3 say: on what is stepped and on what is stored.
OB-4 Zero stays zero: where gradient and states are zero the codes are those of the value 0, and p does not move.
OB-5 The last block, which may be shorter, is stepped as the others; every state has scales of its own.
OB-6 A gradient that is NaN or infinite changes neither another element nor, from what the others of its block make it, absmax.
    Freedom: p and codes of the element itself.
OB-7 lars and lamb follow OS-5.
""")
"""What each operation is, by its name, and every rule by its id."""

FLAGS = _flags("""
zero-in-nonzero-block: bitsandbytes' CPU kernel looks codes up in a table of 65,536 bins, none of which is centred on zero: 0
    becomes 2.1e-5 of absmax (signed) or 1.6e-5 (unsigned). Sparse gradients and 8-bit optimizer states drift.
binned-codes: The same table of 65,536 bins of 3e-5 each: everything below 1.5e-5 of absmax has one of two codes, a third of
    log-uniform data is not given the nearest code.
tie-to-even: CUDA gives a scaled value exactly at a midpoint the even code, other backends the lower one.
scale-index-tail-columns: The AVX512 kernel of bitsandbytes takes the scale of row * (columns // blocksize) + column // blocksize:
    wrong for every weight whose in_features are a multiple of 16 and not of the blocksize (32, 80, 96 ...). [#1828 (worked around
    by a limit on the blocksize)]
nested-absmax: Scales that are themselves quantized: a backend decoded them in half precision, or without the offset. [#1582]
nested-zero-block: CUDA gives an all-zero NF4 block code 0, which is -1. After double quantization its scale is not 0: the block
    decodes to a constant.
fp4-threshold: FP4's seven thresholds are literals of the CUDA kernel, up to 14 ulp off the midpoints that other backends compute;
    one backend had 0.00520833 for 1/192. [#2026]
fp4-zero-sign: The torch backend of bitsandbytes sorts FP4's sixteen values, and argsort puts code 8 (-0) above code 0: small
    positive numbers get code 8, small negative ones code 0.
fp4-negative-tie: Thresholds on the signed axis instead of the magnitude: a negative tie goes to the larger magnitude.
tail-block: The last, partial block was scaled by another formula, or by what lay in memory behind it. [#1884]
tail-absmax: A clamp against division by zero is stored: the absmax of an all-zero partial block is 1e-38.
zero-block: An all-zero block divides by zero: codes that depend on how the hardware compares NaN.
small-absmax: Below 2^-126 the reciprocal overflows: scales of 1e-38 instead of the true one, or codes of infinity.
absmax-floor: torchao clamps absmax to 1e-12: of gradients below 1e-6 the second moment, their square, is stored as if it were
    next to nothing of a scale of 1e-12.
large-absmax: Above 2^126 the reciprocal is subnormal: flushed to zero, every code is that of zero.
non-finite: One NaN or infinity must not change the blocks beside its own.
nan-scale: A NaN scale, rounded to bfloat16 by adding 0x7FFF to its bits, becomes -0.0.
negative-zero: The sign bit of -0.0 taken for x < 0.
odd-size: An odd number of elements leaves a nibble: it is the code of 0.0, not of what was in memory. [#2043 (reads out of
    bounds)]
blocksize: Large blocksizes ran the kernel of another blocksize. [#1160]
noncontiguous: A transposed tensor was read in the order of its memory, without a word. [#1996, #1859]
caller-mutation: An operation modified its caller's tensor. [#1863]
one-dimensional-shape: The CPU kernel of bitsandbytes makes a vector a matrix of one row to work on, and returns that: shape [1,
    n].
packed-length-one: A packed weight of one byte is taken for a transposed one: a 1 x 2 weight comes back as 2 x 1.
rounding: A scale or a codebook value rounded to the output dtype before the product: two roundings for one.
gemm-rows: A kernel for vectors, given a matrix, computed the first row alone.
int8-constant: A digit of 1/16129 is wrong in bitsandbytes' torch backend, 6.200124e-05: all results 1.8e-5 too large.
int8-3d: Operations written for matrices: 3-D input raises, loses its shape, or is reduced over the wrong axis.
int8-k-over-1040: Products summed in float32 are exact up to 2^24 only, k = 1040 in the worst case. [#1796]
int8-one-column: torch._int_mm on a CPU with VNNI returns what was in memory where k is 1, and kernels built on it do too.
float16-detour: Results of float32 and bfloat16 go through float16 on CUDA, and end at 65504.
outlier-columns: Which columns hold outliers, and that they take no part in the absmax of a row.
weight-gradient-scale: bitsandbytes' CUDA backward of the int8 product quantizes the gradient by rows and scales it back by
    columns, and hands a transposed view to a kernel that reads memory in order: the weight's gradient is off by a factor.
backward-3d: The backward of the int8 product with a float weight transposes all dimensions: 3-D inputs raise.
evaluation-repacks: On a CPU with AVX512-BF16 a Linear4bit repacks its weight in the first evaluation, computes in bfloat16
    whatever the dtype, loses the input's gradient afterwards, and saves scales that are rounded and transposed.
bias-correction: A bias correction of the wrong step or beta, or none: the first steps are too short or too long.
resume: A step that depends on more than its arguments, or takes a later one for the first.
adam-decay-order: CUDA multiplies by 1 - lr wd after the step, so that the step itself is decayed: p = 1, g = 1, lr = 0.1, wd =
    0.5 gives 0.855, everywhere else 0.85.
coupled-decay: Decay left out of the gradient, or multiplied into the parameter instead.
lion-decay: The Triton kernels decay Lion by way of the gradient, and Adagrad not: two branches test the wrong number.
raw-gradient: CUDA's 8-bit RMSprop and Adagrad store the scaled and decayed gradient and step by the raw one.
zero-state-drift: States coded by the table of 65,536 bins, which has none for zero: a weight that has no gradient gets a momentum
    of 2e-5 of its block's largest, and drifts.
update-norm: What LAMB and LARS bound differs between backends: without bias correction on CPU (LAMB), without decay on CUDA and
    in the torch kernels (LARS).
clip-lost: The operator for 8-bit states has no max_unorm: LAMB8bit is Adam8bit, LARS8bit is SGD8bit.
bad-gradient: An infinite gradient becomes the scale of its block: 255 other elements lose their state.
second-average-scale: AdEMAMix keeps two averages in one tensor; where the number of elements is no multiple of 256, the scale of
    the second one's first block was written over that of the first one's last.
checkpoint-bytes: Files that other versions must read: one byte more, and they do not.
""")
"""Every flag by its name; in brackets stands the number of the report in bitsandbytes' tracker."""

RULE_OF_RESULT = {
    ("int8_backward", "grad_weight"): "IB-2",
    ("evaluate_then_train", "grad_x"): "LE-2",
    ("evaluate_then_train", "packed"): "LE-3",
    ("evaluate_then_train", "absmax"): "LE-3",
}
"""The rule of a result, by operation and name, that has one of its own. Other results have the first rule of their case."""


def rules_of(operation: str) -> list[Rule]:
    """The rules of an operation, in order.

    >>> [rule.id for rule in rules_of("int8_matmul")]
    ['IM-1', 'IM-2']
    """
    return [rule for rule in RULES.values() if rule.operation == operation]
