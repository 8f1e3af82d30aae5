"""The lookup is `table[codes & 15]`, whatever compiles it: every code, length, vector width, dtype and way of being called."""

import subprocess
import sys

import pytest
import torch
from torch import library

from bnbref.kernels import lookup16
from bnbref.kernels.floats import widen

TABLE = tuple(
    torch.tensor(
        [
            -1.0,
            -0.6961928,
            -0.52507305,
            -0.3949175,
            -0.28444138,
            -0.18477343,
            -0.09105004,
            0.0,
            0.0795803,
            0.1609302,
            0.2461123,
            0.33791524,
            0.44070983,
            0.562617,
            0.72295684,
            1.0,
        ]
    ).tolist()
)
WIDTHS = (None, 512, 256, 1)
DTYPES = (torch.bfloat16, torch.float16)
# subnormal, smallest normal, ties, overflow to inf in float16, inf and NaN
SCALES = (
    0.0,
    1e-45,
    1e-40,
    2.0**-126,
    6e-8,
    6.1e-5,
    0.3333,
    1.0,
    3.0,
    65504.0,
    65520.0,
    3.4e38,
    float("inf"),
    float("nan"),
)


def codes(*shape: int) -> torch.Tensor:
    """All 16 codes in turn, under random high bits, the sign among them."""
    noise = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    low = torch.arange(noise.numel()).reshape(shape) & 15
    return ((noise & ~15) | low).to(torch.int32)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; a NaN equals a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(kind) == b.view(kind)) | (a.isnan() & b.isnan())).all())


def same_rounded(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    """Equal bits of 16-bit floats, in integers of any size; a NaN equals a NaN."""
    return got.dtype == want.dtype and same(*(x.to(torch.int16).view(dtype) for x in (got, want)))


def compiled(f, width=None, **options):
    torch._dynamo.reset()
    options |= {} if width is None else {"cpp.simdlen": width}
    return torch.compile(f, fullgraph=True, options=options or None, dynamic=False)


def test_the_definition_is_the_definition():
    q = codes(1000)
    want = torch.tensor([TABLE[int(c) & 15] for c in q])
    assert same(lookup16.gather16(q, TABLE), want)
    assert same(lookup16.tree16(q, TABLE), want)
    assert same(lookup16.lookup16(q, TABLE), want)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_lookup_compiled(width, dtype):
    f = compiled(lambda q: lookup16.lookup16(q, TABLE), width)
    for length in (0, 1, 16, 37) if dtype == torch.int32 else (37,):  # test_every_length_with_one_kernel has the others
        torch._dynamo.reset()
        q = codes(length).to(dtype)
        assert same(f(q), lookup16.gather16(q, TABLE)), length


@pytest.mark.parametrize("width", WIDTHS)
def test_every_length_with_one_kernel(width):
    f = compiled(lambda q: lookup16.lookup16(q, TABLE), width)
    for length in range(2, 71):
        q = codes(length)
        torch._dynamo.mark_dynamic(q, 0)
        assert same(f(q), lookup16.gather16(q, TABLE)), length


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_compiled(width, dtype):
    """One scale for a vector (the table is scaled), one for each element, and one code for many scales."""
    scale = torch.tensor(SCALES)

    def f(q, s):
        column, each = s[:, None], s[:, None] + torch.zeros_like(q, dtype=torch.float32)
        found = [lookup16.scaled16_bits(q, a, TABLE, dtype) for a in (column, each)]
        found.append(lookup16.scaled16_bits(q[:, :1].contiguous(), each, TABLE, dtype))
        return [*found, lookup16.scaled16_bits(q, column, TABLE, dtype).to(torch.int16)]

    for lanes in (32, 37, 5):
        torch._dynamo.reset()
        q = codes(len(scale), lanes)
        for i, (got, want) in enumerate(zip(compiled(f, width)(q, scale), f(q, scale), strict=True)):
            assert same_rounded(got, want, dtype), (i, lanes)
            assert got.dtype == torch.int16 or bool((got >> 16 == 0).all()), (i, lanes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_is_two_roundings(dtype):
    """Against float64: the product of two float32 is exact there, so one rounding to float32 and one to T are the formula."""
    q, scale = codes(64, 16), torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) * 10
    want = (torch.tensor(TABLE).double()[(q & 15).long()] * scale.double()).float().to(dtype)
    assert torch.equal(lookup16.scaled16_bits(q, scale, TABLE, dtype).to(torch.int16), want.view(torch.int16))


def test_the_bits_of_every_float16_and_bfloat16_widen():
    pattern = torch.arange(65536, dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        want = pattern.to(torch.int16).view(dtype).float()
        for f in (widen, compiled(widen)):
            assert same(f(pattern, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_operations_give_the_same_bits(dtype, monkeypatch):
    """Where no lowering is to be had."""
    monkeypatch.setattr(lookup16, "lowering", lambda: f"{lookup16._PLAIN}: by the test")
    q, scale = codes(len(SCALES) - 1, 33), torch.tensor(SCALES[:-1])[:, None]

    def f(q, s):
        return (lookup16.lookup16(q, TABLE), lookup16.scaled16_bits(q, s, TABLE, dtype))

    (values, bits), (want, want_bits) = compiled(f)(q, scale), f(q, scale)
    assert same(values, want)
    assert same_rounded(bits, want_bits, dtype)
    assert lookup16.lowering() == "plain tensor operations: by the test"


def test_unexpected_internals_are_said(monkeypatch):
    from torch._inductor import lowering as lowerings

    monkeypatch.setattr(lookup16, "lowering", lookup16.lowering.__wrapped__)
    monkeypatch.delattr(lowerings, "make_pointwise")
    assert not lookup16.enable()
    assert lookup16.lowering().startswith("plain tensor operations")
    assert "make_pointwise" in lookup16.lowering()


@pytest.mark.parametrize("backend", ["aot_eager", "eager", "inductor"])
def test_inside_the_users_compile(backend):
    torch._dynamo.reset()
    q, scale = codes(3, 32), torch.tensor([[0.5], [2.0], [3.0]])

    def f(q, s):
        return lookup16.lookup16(q, TABLE) + lookup16.scaled16_bits(q >> 4, s, TABLE, torch.bfloat16)

    assert same(torch.compile(f, backend=backend, fullgraph=True)(q, scale), f(q, scale))


def test_the_lowering_is_in_the_code():
    from torch._inductor.utils import run_and_get_code

    if lookup16.lowering() != "vpermps":
        pytest.skip(lookup16.lowering())
    _, (code, *_) = run_and_get_code(compiled(lambda q: lookup16.lookup16(q, TABLE)), codes(64, 64))
    assert "_mm512_permutexvar_ps" in code
    _, (code, *_) = run_and_get_code(compiled(lambda q: lookup16.lookup16(q, TABLE), 256), codes(64, 64))
    assert "_mm256_permutevar8x32_ps" in code


def test_another_version_of_the_lowering_is_compiled_anew(tmp_path, monkeypatch):
    """Inductor's cache on disk is shared by all versions of bnbref that ever ran on a machine."""
    from torch._dynamo.utils import counters

    if not lookup16.enable():
        pytest.skip(lookup16.lowering())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def compilations():
        torch._dynamo.reset()
        counters.clear()
        torch.compile(lambda q: lookup16.lookup16(q, TABLE), fullgraph=True)(codes(64, 64))
        return counters["inductor"]["fxgraph_cache_miss"]

    with torch._inductor.config.patch(fx_graph_cache=True), torch._functorch.config.patch(enable_autograd_cache=False):
        assert (compilations(), compilations()) == (1, 0)
        monkeypatch.setattr(lookup16, "_TEXT", "of another version")
        assert (compilations(), compilations()) == (1, 0)


def test_the_default_dtype_does_not_matter():
    q, scale = codes(2, 64), torch.tensor([[0.3], [7.0]])

    def f(q, s):
        return (
            lookup16.lookup16(q, TABLE),
            lookup16.tree16(q, TABLE),
            lookup16.scaled16_bits(q, s, TABLE, torch.float16),
        )

    want = f(q, scale)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for got in (f(q, scale), compiled(f)(q, scale)):
            assert all(map(same, got, want))
    finally:
        torch.set_default_dtype(torch.float32)


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, scale = torch.empty(3, 5, dtype=torch.int32), torch.empty(3, 1)
        assert lookup16.lookup16(q, TABLE).shape == (3, 5)
        assert lookup16.scaled16_bits(q, scale, TABLE, torch.bfloat16).dtype == torch.int32
        assert torch.ops.bnbref.scaled16(q, scale, TABLE, torch.bfloat16, 512).dtype == torch.int32


def test_an_exported_program_does_not_need_bnbref():
    class Decode(torch.nn.Module):
        def forward(self, q, s):
            return lookup16.lookup16(q, TABLE), lookup16.scaled16_bits(q, s, TABLE, torch.bfloat16)

    q, scale = codes(4, 32), torch.tensor([[0.5], [2.0], [3.0], [4.0]])
    for strict in (False, True):
        program = torch.export.export(Decode(), (q, scale), strict=strict)
        assert "bnbref" not in str(program.graph)
        assert all(map(same, program.module()(q, scale), Decode()(q, scale)))


def test_operators_are_sound():
    q, scale = codes(4, 16), torch.rand(4, 1)
    library.opcheck(torch.ops.bnbref.lut16.default, (q, list(TABLE), 512))
    for dtype in DTYPES:
        library.opcheck(torch.ops.bnbref.scaled16.default, (q, scale, list(TABLE), dtype, 512))


def test_importing_is_light():
    code = "import sys, bnbref.kernels.lookup16; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="table"):
        lookup16.lookup16(codes(4), TABLE[:15])
    with pytest.raises(ValueError, match="dtype"):
        lookup16.scaled16_bits(codes(4), torch.ones(4), TABLE, torch.float32)
    with pytest.raises(TypeError, match="scale"):
        lookup16.scaled16_bits(codes(4), torch.ones(4, dtype=torch.float16), TABLE, torch.float16)
