"""Codes are no numbers: writes by value are refused, and what moves bytes goes on working."""

import copy
import inspect
import io
import itertools
import operator
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import BF16, F32, argument, linear4, linear4_layers, linear8, linear8_layers, raw, raw_weight, unquantized
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bnbref
from bnbref import int8
from bnbref.functional import dequantize_4bit
from bnbref.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit, bytewise


@pytest.fixture(autouse=True)
def _eager():
    with bnbref.eager():
        yield


LAYERS = {
    "nf4": lambda: linear4(quant_type="nf4", compress_statistics=False),
    "fp4 nested in bf16": lambda: linear4(compress_statistics=True, quant_storage=BF16),
    "int8": linear8,
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def ones(p):
    return torch.ones(p.shape, dtype=F32)


def setitem(p):
    p[0] = 1


def iadd(p):
    p += ones(p)


def assign(p):
    p.data = ones(p)


WRITES = {
    "add_": lambda p: p.add_(ones(p)),
    "iadd": iadd,
    "mul_": lambda p: p.mul_(0.5),
    "lerp_": lambda p: p.lerp_(ones(p), 0.5),
    "copy_": lambda p: p.copy_(ones(p)),
    "detach": lambda p: p.detach().copy_(ones(p)),
    "detach, zero_": lambda p: p.detach().zero_(),
    "operator": lambda p: torch.ops.aten.add_.Tensor(p.detach(), 1),
    "setitem": setitem,
    "data": assign,
    "normal_": lambda p: p.normal_(),
    "fill_": lambda p: p.fill_(1),
    "init": lambda p: nn.init.normal_(p),
    "init.zeros_": lambda p: nn.init.zeros_(p),
    "clamp_": lambda p: torch.clamp_(p, 0, 1),
    "out": lambda p: torch.add(ones(p), 1, out=p),
    "foreach": lambda p: torch._foreach_mul_([p], 0.5),
    "foreach lerp": lambda p: torch._foreach_lerp_([ones(p), p.detach()][1:], [ones(p)], 0.5),
    "foreach copy": lambda p: torch._foreach_copy_([p], [ones(p)]),
    "inplace": lambda p: nn.functional.hardtanh(p, 1, 2, inplace=True),
    "module_load": lambda p: p.module_load(ones(p)),
    "embedding": lambda p: nn.functional.embedding(torch.tensor([0]), p, max_norm=1e-3),
}


@each_layer
@pytest.mark.parametrize("how", WRITES)
def test_a_write_by_value_is_refused_and_changes_nothing(make, how):
    layer = make()
    before = raw_weight(layer)
    refusal = (
        r"takes the codes of a quantized \w+ for numbers|are codes in torch\.\w+, got|int8 codes are assigned with"
    )
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match=refusal):
        WRITES[how](layer.weight)
    assert raw_weight(layer) == before


@pytest.mark.parametrize("width", [2, 64])
@pytest.mark.parametrize("make", [linear4, linear8])
@given(operation=st.sampled_from([torch.add, torch.subtract, torch.mul, torch.multiply, operator.add]), swapped=st.booleans(),
       other=st.sampled_from([3, torch.tensor([3], dtype=torch.int8), torch.tensor([3], dtype=torch.uint8)]))  # fmt: skip
def test_arithmetic_whose_result_would_look_like_codes_is_refused(make, width, operation, swapped, other):
    layer = make(32, width)
    if torch.result_type(layer.weight.data, other) == layer.weight.dtype:
        pair = (other, layer.weight) if swapped and isinstance(other, torch.Tensor) else (layer.weight, other)
        with pytest.raises(ValueError, match="takes the codes of a quantized"):
            operation(*pair)
        with pytest.raises(ValueError, match="takes the codes of a quantized"):
            torch.mul(input=layer.weight, other=other)
    scaled = layer.weight * torch.full((1,), 0.5)
    assert torch.equal(scaled, layer.weight.data * 0.5)
    assert not hasattr(scaled, "quant_state")


@pytest.mark.parametrize("make", [lambda: linear4(32, 2), linear8])
def test_a_batch_norm_is_not_fused_into_codes(make):
    """It multiplied them by scales that it had cast to their dtype, and kept the scales of before."""
    with pytest.raises(ValueError, match="takes the codes of a quantized"):
        nn.utils.fuse_linear_bn_eval(make().eval(), nn.BatchNorm1d(32).eval())


SIZES = {
    "l1": lambda p: p.abs().sum(),
    "l1 by torch": lambda p: torch.abs(p).sum(),
    "abs": abs,
    "l2": lambda p: p.pow(2).sum(),
    "operator": lambda p: p**2,
    "float_power": lambda p: torch.float_power(p, 2),
    "square": lambda p: p.square().mean(),
    "norm": lambda p: p.norm(),
    "vector_norm": torch.linalg.vector_norm,
    "linalg.norm": torch.linalg.norm,
    "matrix_norm": lambda p: torch.linalg.matrix_norm(p[:, None] if p.dim() < 2 else p),
    "foreach": lambda p: torch._foreach_norm([p]),
    "dist": lambda p: torch.dist(p, p.data),
    "total norm": lambda p: nn.utils.get_total_norm([p]),
}


@each_layer
@pytest.mark.parametrize("how", SIZES)
def test_codes_have_no_size(make, how):
    """A penalty over all parameters of a model was made of bytes; of those in a float dtype it was often NaN."""
    layer = make()
    for weight in (layer.weight, layer.weight.detach()):
        with pytest.raises(ValueError, match="takes the codes of a quantized"):
            SIZES[how](weight)
    SIZES[how](layer.bias)


def overridable():
    """Every function of this torch that asks a subclass of Tensor what to do, and how many arguments it needs."""
    for function, dummy in torch.overrides.get_testing_overrides().items():
        parameters = inspect.signature(dummy).parameters.values()
        required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        yield function, max(1, len(required))


REFUSED = "takes the codes of a quantized"


@each_layer
def test_a_function_of_torch_leaves_codes_what_they_are_or_is_refused(make):
    """Of all that torch has: it raises our error before it computes, or the list names it. The list names what torch 2.11 to 2.15
    have; what a later one brings is refused."""
    layer = make()
    weight, before, untried = layer.weight, raw_weight(layer), bytewise.ALLOWED | {"__get__", "__set__"}
    for function, count in overridable():
        name = bytewise.name_of(function)
        if name in untried or not bytewise.is_torchs(function):
            continue
        with pytest.raises(ValueError, match=REFUSED):
            torch.overrides.handle_torch_function(function, (weight,), *[weight] * count)
    assert raw_weight(layer) == before


def test_what_the_list_allows_is_no_arithmetic():
    """Numbers in place of codes: a result is of the same size, or made of the same numbers, or an answer about them."""
    numbers = torch.tensor([[3, 5], [11, 7]], dtype=torch.uint8)
    known = set(numbers.flatten().tolist())
    arguments = {
        "repeat": (1, 2), "tile": ((1, 2),), "permute": (1, 0), "expand": (1, 2, 2), "expand_as": (numbers,), "roll": (1,),
        "flip": (0,),
        "transpose": (0, 1), "swapaxes": (0, 1), "swapdims": (0, 1), "movedim": (0, 1), "moveaxis": (0, 1), "unsqueeze": (0,),
        "broadcast_to": ((1, 2, 2),), "narrow": (0, 0, 1), "narrow_copy": (0, 0, 1), "select": (0, 0),
        "take": (torch.tensor([3]),),
        "index_select": (0, torch.tensor([1])), "gather": (0, torch.tensor([[1, 0]])), "take_along_dim": (torch.tensor([[1]]), 1),
        "masked_select": (numbers > 4,), "as_strided": ((2,), (1,)), "unfold": (0, 1, 1), "chunk": (2,), "split": (1,),
        "view": (-1,),
        "split_with_sizes": ([1, 1],), "tensor_split": (2,), "view_as": (numbers,), "reshape": (-1,), "reshape_as": (numbers,),
        "unflatten": (0, (2, 1)), "__getitem__": (0,), "hsplit": (2,), "vsplit": (2,), "unsafe_chunk": (2,), "unsafe_split": (1,),
        "unsafe_split_with_sizes": ([1, 1],),
    }  # fmt: skip
    for name in sorted(bytewise.MOVES | bytewise.CUTS):
        method = getattr(torch.Tensor, name, None)
        if callable(method) and name not in ("pin_memory", "dsplit"):
            result = method(numbers, *arguments.get(name, ()))
            for piece in result if isinstance(result, tuple) else (result,):
                assert (piece.dtype, set(piece.flatten().tolist()) - known) == (numbers.dtype, set()), name


def test_operators_and_functions_of_others_take_what_they_are_given():
    """A graph of torch.export decodes codes by operators; a function that is not torch's knows what it was given."""
    weight = linear8().weight
    assert type(torch.ops.aten.sum.default(weight)) is torch.Tensor

    def theirs(codes):
        if torch.overrides.has_torch_function((codes,)):
            return torch.overrides.handle_torch_function(theirs, (codes,), codes)
        return type(codes)

    theirs.__module__ = "theirs"
    assert theirs(weight) is Int8Params
    theirs.__module__ = "torch.of_tomorrow"
    with pytest.raises(ValueError, match="theirs takes the codes of a quantized Int8Params for numbers"):
        theirs(weight)


STRANGERS = {
    "mean": lambda p: p.mean(),
    "std": torch.std,
    "sum": lambda p: p.sum(),
    "max": lambda p: p.max(),
    "histogram": lambda p: torch.histc(p, 8),
    "quantile": lambda p: torch.quantile(p, 0.5),
    "normalize": nn.functional.normalize,
    "cosine": lambda p: nn.functional.cosine_similarity(p, p),
    "inner": lambda p: torch.inner(p, p),
    "dot": lambda p: torch.dot(p.flatten(), p.flatten()),
    "svd": torch.linalg.svd,
    "svd of floats": lambda p: torch.linalg.svd(p.detach().float()),
    "low rank": lambda p: torch.svd_lowrank(p),
    "norm of floats": lambda p: p.detach().float().norm(),
    "transposed": lambda p: torch.ones(2, p.shape[1]) @ p.T,
    "soup": lambda p: (p.detach() + p.detach()) / 2,
    "soup of floats": lambda p: sum([0.5 * p.detach().float(), 0.5 * p.detach().float()]),
    "soup by stacking": lambda p: torch.stack([p.detach(), p.detach()]).float().mean(0),
    "soup by means": lambda p: torch.lerp(p, p.detach(), 0.5),
    "difference": lambda p: (p - p.detach()).abs().max(),
    "ema": lambda p: torch.zeros(p.shape).mul_(0.9).add_(p.detach(), alpha=0.1),
    "ema by lerp": lambda p: torch.zeros(p.shape, dtype=p.dtype).lerp_(p.detach(), 0.1),
    "ema by foreach": lambda p: torch._foreach_lerp_([torch.zeros(p.shape, dtype=p.dtype)], [p.detach()], 0.1),
    "a float copy": lambda p: torch.zeros(p.shape, dtype=torch.float64).copy_(p),
    "decay": lambda p: p.mul_(1 - 1e-3),
    "decay by a new weight": lambda p: p - 1e-3 * p,
    "scaled": lambda p: (p * 0.5).sum(),
    "allclose": lambda p: torch.allclose(p, p.detach()),
    "isclose": lambda p: torch.isclose(p, p.detach()),
    "sparsity": lambda p: (p == 0).sum(),
    "magnitudes": lambda p: p > 1e-3,
    "threshold": lambda p: torch.where(p > 1, p, 0),
    "nonzero": torch.count_nonzero,
    "one vector": lambda p: nn.utils.parameters_to_vector([p, nn.Parameter(torch.ones(3))]),
    "one vector of one dtype": lambda p: nn.utils.parameters_to_vector([p, nn.Parameter(p.data.clone(), requires_grad=False)]),
    "rows": lambda p: nn.functional.embedding(torch.tensor([0]), p),
    "clip": lambda p: nn.utils.clip_grads_with_norm_([p], 1, p.norm()),
    "einsum": lambda p: torch.einsum("ij,ij->i", p, p),
    "lora": lambda p: p.detach() + torch.ones(p.shape),
}  # fmt: skip


@each_layer
@pytest.mark.parametrize("how", STRANGERS)
def test_what_strangers_do_with_parameters_is_refused(make, how):
    """Measures, averages, distances, factors of weights, in the words of training loops."""
    layer = make()
    before = raw_weight(layer)
    with torch.no_grad(), pytest.raises(ValueError, match=REFUSED):
        STRANGERS[how](layer.weight)
    assert raw_weight(layer) == before


@each_layer
def test_codes_are_read_moved_and_decoded_by_hand(make):
    """What other libraries do with them."""
    layer, codes = make(), make().weight.detach()
    plain = layer.weight.data
    for same in (
        codes.clone(),
        codes.contiguous(),
        codes.cpu(),
        codes.to(codes.dtype),
        torch.cat([*codes.chunk(2)]),
        torch.vstack([*codes.chunk(2)]),
        codes.T.T,
    ):
        assert (type(same), raw(same)) == (type(codes), raw(plain))
    assert torch.equal(layer.weight, codes)  # as bytes: as bf16, some are NaN
    assert torch.equal(codes, plain)
    assert not torch.equal(codes, torch.zeros_like(codes))
    assert type(torch.cat([codes.flatten(), plain.flatten()])) is torch.Tensor  # as the flat parameter of FSDP1
    grown = torch.empty(codes.shape, dtype=codes.dtype).copy_(codes)
    assert (type(grown), raw(grown)) == (torch.Tensor, raw(plain))
    padded = nn.functional.pad(codes.flatten(), (0, 3))  # as torch.distributed.tensor does with the last shard
    assert raw(padded[:-3]) == raw(plain.flatten())
    bits = codes.view(torch.uint8)
    assert torch.equal(bits & 15, plain.view(torch.uint8) & 15)
    assert torch.equal(torch.stack([bits // 16, bits % 16]), torch.stack([bits >> 4, bits & 15]))
    assert torch.equal(torch.arange(256)[bits.long()], plain.view(torch.uint8).long())
    if isinstance(layer, Linear8bitLt):
        scales = layer.weight.SCB[:, None] / 127
        assert torch.equal(codes.float() * scales, plain.float() * scales)
        assert type(codes / 127 * layer.weight.SCB[:, None]) is torch.Tensor


@each_layer
def test_floats_made_of_codes_are_not_assigned_as_codes(make):
    layer = make()
    before = raw_weight(layer)
    for dtype in (torch.float16, F32):
        with pytest.raises((TypeError, ValueError), match=r"for numbers|are codes in|are assigned with their scales"):
            layer.weight.data = layer.weight.detach().to(dtype)
    assert raw_weight(layer) == before


LOSSES = {
    "l2": lambda p: p.pow(2).sum(),
    "norm": lambda p: torch.linalg.vector_norm(p),
    "linear": lambda p: nn.functional.linear(torch.ones(1, 64), p),
    "detached": lambda p: p.detach().float().square().sum(),
    "data": lambda p: p.data.sum(),
    "transposed": lambda p: 2 * p.T,
    "chunked": lambda p: p.chunk(2)[0].sum(),
    "unbound": lambda p: p.unbind()[0].sum(),
}


@pytest.mark.parametrize("make", [LAYERS["fp4 nested in bf16"], linear8])
@pytest.mark.parametrize("how", LOSSES)
def test_a_compiled_loss_does_not_take_codes_for_numbers(make, how):
    """Dynamo leaves the function to Python, which raises."""
    with pytest.raises(ValueError, match=REFUSED):
        torch.compile(lambda p: LOSSES[how](p), backend="eager")(make().weight)


@pytest.mark.parametrize("how", ["l2", "linear"])
def test_the_error_of_a_whole_graph_names_what_is_refused(how):
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REFUSED):
        torch.compile(lambda p: LOSSES[how](p), backend="eager", fullgraph=True)(linear8().weight)


@each_layer
def test_a_graph_reads_and_moves_codes(make):
    weight = make().weight

    def read(p):
        return p.view(torch.uint8).clone().flatten(), p.data.reshape(-1), torch.cat(p.chunk(2)), p.shape[0] + p.numel()

    *codes, count = torch.compile(read, backend="eager", fullgraph=True)(weight)
    *wanted, wanted_count = read(weight)
    assert ([*map(raw, codes)], count) == ([*map(raw, wanted)], wanted_count)
    first, last = torch.compile(lambda p: (p.shape[0], p.chunk(2)[1]), backend="eager")(weight)
    assert (first, raw(last)) == (weight.shape[0], raw(weight.chunk(2)[1]))


@pytest.mark.parametrize("how", sorted(WRITES))
def test_a_weight_that_is_not_quantized_yet_is_written(how):
    for weight in (Params4bit(torch.zeros(4, 64)), Int8Params(torch.zeros(4, 64), has_fp16_weights=True)):
        before = weight.detach().clone()
        with torch.no_grad():
            WRITES[how](weight)
        assert how in ("mul_", "foreach", "detach, zero_", "init.zeros_", "clamp_", "embedding") or not torch.equal(
            weight, before
        )


@each_layer
def test_codes_are_copied_into_codes(make):
    layer, other = make(), make()
    with torch.no_grad():
        layer.weight.copy_(other.weight)
        layer.weight.copy_(other.weight.data)
        layer.weight.detach().copy_(other.weight.detach())
        torch._foreach_copy_([layer.weight], [other.weight.data])
    assert raw_weight(layer) == raw_weight(other)
    if isinstance(layer, Linear4bit):
        layer.weight.data = other.weight.data
    assert raw_weight(layer) == raw_weight(other)


@each_layer
@pytest.mark.parametrize("averaged", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
                                      {"avg_fn": lambda a, b, n: 0.5 * a + 0.5 * b}], ids=["swa", "ema", "avg_fn"])  # fmt: skip
def test_the_average_of_codes_is_refused(make, averaged):
    model = nn.Sequential(make(), nn.Linear(32, 2))
    average = AveragedModel(model, **averaged)
    before = raw_weight(average.module[0])
    average.update_parameters(model)  # the first time it copies codes into codes
    with pytest.raises(ValueError, match="takes the codes of a quantized"):
        average.update_parameters(model)
    assert raw_weight(average.module[0]) == before


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


class Same(nn.Module):
    def forward(self, x):
        return x

    def right_inverse(self, x):
        return x


MACHINERY = {
    "apply": lambda layer: nn.Sequential(layer).apply(_init),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune randomly": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "unsafe parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", Double(), unsafe=True
    ),
    "parametrization with inverse": lambda layer: parametrize.register_parametrization(layer, "weight", Same()),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
}


@each_layer
@pytest.mark.parametrize("how", MACHINERY)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_what_would_rewrite_a_weight_is_refused_by_name(make, how):
    layer = make()
    kind, weight, before = type(layer), layer.weight, raw_weight(layer)
    with pytest.raises(
        (TypeError, ValueError), match=r"takes the codes of a quantized|cannot be (pruned|parametrized)"
    ):
        MACHINERY[how](layer)
    assert (type(layer), sorted(layer._parameters), raw_weight(layer)) == (kind, ["bias", "weight"], before)
    assert layer.weight is weight


@each_layer
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_a_spectral_norm_fails_and_leaves_the_layer_whole(make, norm):
    """Codes in uint8 and int8 end in torch's own error: it fills a tensor of their dtype with normal numbers."""
    layer = make()
    weight, before = layer.weight, raw_weight(layer)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        norm(layer)
    assert raw_weight(layer) == before
    assert layer.weight is weight


@each_layer
def test_requires_grad_of_a_module_sets_what_can_be_trained(make):
    model = nn.Sequential(make(), nn.Linear(32, 2)).requires_grad_(False)
    with pytest.warns(UserWarning, match="a quantized weight stays frozen"):
        model.requires_grad_()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.bias", "1.weight", "1.bias"}
    assert unquantized(model[0]).requires_grad_().weight.requires_grad


# ---- pieces ---------------------------------------------------------------------------------------------------------


def values(weight):
    if isinstance(weight, Int8Params):
        return int8.dequantize(weight.data, weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state).reshape(-1)


CUTS = {
    "chunk": lambda p, n: p.chunk(n),
    "torch.chunk": torch.chunk,
    "split": lambda p, n: p.split(-(-len(p) // n)),
    "torch.split": lambda p, n: torch.split(p, -(-len(p) // n)),
    "split sizes": lambda p, n: p.split([n, len(p) - n]),
    "tensor_split": torch.tensor_split,
    "slice": lambda p, n: [p[: len(p) // n], p[len(p) // n :]],
    "narrow": lambda p, n: [p.narrow(0, 0, len(p) // n), p.narrow(0, len(p) // n, len(p) - len(p) // n)],
    "view": lambda p, n: [p.view(p.shape)],
}


@given(make=st.sampled_from(sorted(LAYERS)), cut=st.sampled_from(sorted(CUTS)), n=st.integers(1, 9))
def test_a_piece_keeps_what_it_codes(make, cut, n):
    weight = LAYERS[make]().weight
    pieces = CUTS[cut](weight, n)
    assert raw(torch.cat([piece.data for piece in pieces])) == raw(weight.data)
    whole, start = values(weight).reshape(-1), 0
    for piece in filter(len, pieces):
        count = piece.nbytes * (1 if isinstance(weight, Int8Params) else 2)
        if isinstance(piece, type(weight)):
            assert raw(values(piece).reshape(-1)) == raw(whole[start : start + count])
        else:  # a part of a block, which has no scale of its own
            assert isinstance(weight, Params4bit)
            assert start % 64 or count % 64
        start += count


@each_layer
def test_an_argument_by_name_is_watched(make):
    weight = make().weight
    for moved in (torch.clone(input=weight), torch.cat(tensors=[weight, weight]), torch.t(input=weight)):
        with pytest.raises(ValueError, match="codes"):
            moved.norm()
    # Dynamo of torch 2.11 traces no function of a subclass whose arguments have names: an error of its own.
    with pytest.raises((ValueError, torch._dynamo.exc.InternalTorchDynamoError), match=r"codes|__objclass__"):
        torch.compile(lambda w: torch.cat(tensors=[w, w]).norm(), backend="eager")(weight)


# ---- detached -------------------------------------------------------------------------------------------------------


PUT = {
    "named_parameters": lambda layer: dict(layer.named_parameters()),
    "detached": lambda layer: {name: p.detach() for name, p in layer.named_parameters()},
    "state_dict": lambda layer: {k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")},
    "keep_vars": lambda layer: {k: v for k, v in layer.state_dict(keep_vars=True).items() if k in ("weight", "bias")},
}


PAIRS = [(linear4_layers(), linear4), (linear8_layers(), linear8)]


@given(pair=st.sampled_from(PAIRS), how=st.sampled_from(sorted(PUT)), data=st.data())
def test_a_layer_computes_with_the_scales_of_the_codes_that_are_put_into_it(pair, how, data):
    """`functional_call` with the parameters of another layer: with these it is that layer, and then it is itself again."""
    other = data.draw(pair[0])
    options = {"threshold": other.state.threshold} if isinstance(other, Linear8bitLt) else {}
    layer = pair[1](other.out_features, other.in_features, bias=other.bias is not None, seed=7, **options)
    x = argument(layer)
    before = layer(x)
    assert raw(functional_call(nn.Sequential(layer), {f"0.{k}": v for k, v in PUT[how](other).items()}, x)) == raw(
        other(x)
    )
    assert raw(layer(x)) == raw(before)


@pytest.mark.parametrize("make", [linear4, linear8])
def test_a_graph_takes_detached_codes_as_an_argument(make):
    """AOT autograd checks a graph when it is first called, in a mode that refuses operators with subclasses of Tensor."""
    layer, other = make(), make(seed=1)
    x = argument(layer)
    called = torch.compile(lambda codes, x: functional_call(layer, codes, x), backend="aot_eager", fullgraph=True)
    assert raw(called(PUT["detached"](other), x)) == raw(other(x))


def test_a_whole_state_dict_is_put_into_an_int8_layer_and_refused_for_four_bits():
    file = io.BytesIO()
    layer, other = linear8(), linear8(seed=1)
    x = argument(layer)
    torch.save(other.state_dict(), file)
    file.seek(0)
    for state in (other.state_dict(), torch.load(file)):
        before = layer(x)
        assert raw(functional_call(layer, state, x)) == raw(other(x))
        assert raw(layer(x)) == raw(before)
    layer = linear4()
    with pytest.raises(TypeError, match=r"give torch\.func\.functional_call dict\(module\.named_parameters\(\)\)"):
        functional_call(layer, layer.state_dict(), x)


@each_layer
def test_codes_are_not_copied_into_codes_of_other_scales(make):
    layer, scaled = make(), make()
    scaled.weight = scaled.weight.unquantized(torch.randn(32, 64)).to("cpu")
    before = raw_weight(layer)
    for source in (scaled.weight, scaled.weight.detach()):
        for copied in (
            lambda t, s=source: t.copy_(s),
            lambda t, s=source: t.detach().copy_(s),
            lambda t, s=source: torch._foreach_copy_([t], [s]),
        ):
            with torch.no_grad(), pytest.raises(ValueError, match="copies codes without their scales"):
                copied(layer.weight)
    assert raw_weight(layer) == before
    layer.weight.data = scaled.weight.detach()  # what was detached brings its scales along
    assert raw(values(layer.weight)) == raw(values(scaled.weight))


def test_data_of_another_size_is_refused():
    layer = linear4(quant_storage=BF16)
    with pytest.raises(TypeError, match=r"are codes in torch\.bfloat16, got torch\.bfloat16, 4096 bytes for 1024"):
        layer.weight.data = torch.randn(32, 64, dtype=BF16)
    codes = layer.weight.data
    for left in (codes.flatten()[:0], codes.flatten()[:100]):  # until it is needed again; FSDP1 keeps a part
        layer.weight.data = left
        layer.weight.data = codes
    assert raw_weight(layer) == raw_weight(linear4(quant_storage=BF16))
    whole = linear4()  # which no FSDP1 flattens
    with pytest.raises(TypeError, match=r"are codes in torch\.uint8, got torch\.uint8, 100 bytes for 1024"):
        whole.weight.data = whole.weight.data.flatten()[:100]
    layer = linear8()
    codes = layer.weight.data
    layer.weight.data = codes.clone()
    layer.weight.data = torch.empty(0, dtype=torch.int8)
    for other in (torch.randn(32, 64), codes[1:]):
        with pytest.raises(TypeError, match="int8 codes are assigned with their scales"):
            layer.weight.data = other
    layer.weight.data = codes
    assert raw_weight(layer) == raw_weight(linear8())


# ---- copies and files -----------------------------------------------------------------------------------------------


@each_layer
def test_detached_codes_are_saved_and_copied_as_plain_tensors(make):
    layer = make()
    codes, want = layer.weight.detach(), raw(layer.weight.data)
    file = io.BytesIO()
    torch.save({"weight": codes, **layer.state_dict()}, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=True)["weight"],
        copy.deepcopy(codes),
        pickle.loads(pickle.dumps(codes)),
    ):
        assert (type(other), raw(other)) == (torch.Tensor, want)


@each_layer
def test_a_parameter_made_of_codes_is_moved_as_accelerate_moves_it(make):
    """As the codes of experts are, which are loaded from a file: off to meta, and back from where they are kept."""
    set_module_tensor_to_device = pytest.importorskip("accelerate.utils").set_module_tensor_to_device
    module = nn.Module()
    weight = make().weight
    module.codes = nn.Parameter(weight.detach(), requires_grad=False)
    again = type(module.codes)(module.codes)
    assert all(getattr(again, name, None) is getattr(weight, name, None) for name in ("quant_state", "SCB"))
    kept = module.codes.detach().clone()
    for _ in range(2):
        for device, value in (("meta", None), ("cpu", kept)):
            set_module_tensor_to_device(module, "codes", device, value=value)
            assert isinstance(module.codes, nn.Parameter)
            assert not module.codes.requires_grad
    assert raw(module.codes) == raw(kept)
    with pytest.raises(ValueError, match="codes"):
        module.codes.norm()


@each_layer
@pytest.mark.parametrize("swap", [True, False])
def test_modules_move_and_load_with_swapped_parameters(make, swap):
    layer, before = make(), torch.__future__.get_swap_module_params_on_conversion()
    want = raw_weight(layer)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for move in (nn.Module.half, nn.Module.float, nn.Module.double, nn.Module.cpu):
            assert raw_weight(move(copy.deepcopy(layer))) == want
        fresh = unquantized(layer)
        fresh.load_state_dict(layer.state_dict(), assign=True)
        assert raw_weight(fresh) == want
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# ---- modules of torch that read weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor|The PyTorch API of nested tensors")
def test_an_encoder_does_not_take_its_fast_path(bits, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    for inner, name in itertools.product(model.layers, ("linear1", "linear2")):
        old = getattr(inner, name)
        make = Linear4bit if bits == 4 else lambda k, n: Linear8bitLt(k, n, has_fp16_weights=False)
        new = make(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(inner, name, new.to("cpu"))
    x = torch.randn(2, 5, 64)
    for mask in (None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])):
        want = model(x, src_key_padding_mask=mask)
        for guard in (torch.no_grad, torch.inference_mode):
            with guard():
                got = model(x, src_key_padding_mask=mask)
            n = x.shape[1] if mask is None else 3
            assert torch.allclose(got[:, :n], want[:, :n], rtol=1e-5, atol=1e-5)
    frozen = model.requires_grad_(False)
    assert torch.allclose(frozen(x), model(x))


@pytest.mark.parametrize("kind", [bnbref.nn.Linear4bit, bnbref.nn.Linear8bitLt])
def test_what_multiplies_by_a_weight_without_its_layer_is_refused(kind):
    layer = kind(64, 64, **({} if kind is bnbref.nn.Linear4bit else {"has_fp16_weights": False})).to("cpu")
    attention, x = nn.MultiheadAttention(64, 4), torch.ones(1, 2, 64)
    attention.out_proj = layer
    for product in (
        lambda: attention(x, x, x),
        lambda: nn.functional.linear(x, layer.weight),
        lambda: x @ layer.weight,
    ):
        with pytest.raises(ValueError, match=r"takes the codes of a quantized (Params4bit|Int8Params) for numbers"):
            product()


@each_layer
def test_copies_of_codes_are_of_the_same_layers(make):
    """Some were of another layer, which torch had copied before."""
    layers = [make() for _ in range(20)]
    for codes in ([layer.weight.detach() for layer in layers], [layer.state_dict()["weight"] for layer in layers]):
        copied = copy.deepcopy(codes)
        assert [raw(t) for t in copied] == [raw(t) for t in codes]
        assert len({t.data_ptr() for t in (*copied, *codes)}) == 40
