"""A machine that has an H100, as far as Inductor and Triton can tell: they write their kernels for it, and nobody runs them.

What they ask of torch.cuda and of Triton's driver is answered from a table; tensors on the GPU are fake ones. Inductor is
stopped where it would load the kernels that it wrote. Importing this changes the whole process: it belongs into one of its own.

A CPU build of torch will do, with the triton of its version, and g++.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.runtime.triton_helpers
import torch._inductor.utils
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton
import triton
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget

from bnbref.kernels import Kernel

TARGET = GPUTarget("cuda", 90, 32)
CUDA = torch.device("cuda", 0)

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=85 * 10**9, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10, shared_memory_per_multiprocessor=228 * 2**10,
    gcnArchName="", is_integrated=0, is_multi_gpu_board=0, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


def answer(value: Any) -> Callable[..., Any]:
    """A function of anything that returns this."""
    return lambda *args, **kwargs: value


# ---- what is asked --------------------------------------------------------------------------------------------------


ANSWERS = {
    "current_device": 0, "device_count": 1, "exchange_device": 0, "get_compute_capability": 90, "get_device_properties": H100,
    "get_raw_stream": 0, "is_available": True, "is_bf16_supported": True, "is_current_stream_capturing": False,
    "is_triton_capable": True, "maybe_exchange_device": 0,
    "memory_allocated": 0, "raise_if_triton_unavailable": None, "set_device": None, "synchronize": None,
}  # fmt: skip
"""Of Dynamo's interface to a device."""

DRIVER = SimpleNamespace(
    get_active_torch_device=answer(CUDA), get_current_device=answer(0), get_current_stream=answer(0),
    get_current_target=answer(TARGET), get_device_capability=answer((9, 0)), get_device_interface=answer(torch.cuda),
    is_active=answer(True), map_python_to_cpp_type=lambda name: name, set_current_device=answer(None),
    utils=SimpleNamespace(get_device_properties=answer(
        {"max_shared_mem": 227 * 2**10, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32})),
)  # fmt: skip
"""Of Triton's driver."""

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
"""In C++, what makes the device the current one: shapes of indexing and factories on a GPU are computed inside of it."""


def _load_guard() -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        source, library = Path(directory) / "guard.cpp", Path(directory) / "guard.so"
        source.write_text(GUARD)
        where = ["-I", root / "include", source, "-L", root / "lib", "-lc10", "-o", library]
        subprocess.run(["g++", "-shared", "-fPIC", "-std=c++20", *map(str, where)], check=True)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class _OnCPU(TorchDispatchMode):
    """Constants that Inductor folds would be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _set(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


@functools.cache
def install() -> None:
    """Answer from the tables, in this process, from now on."""
    _load_guard()
    interface = device_interface.CudaInterface
    _set(interface, **{name: staticmethod(answer(value)) for name, value in ANSWERS.items()})
    _set(interface.Worker, **{name: staticmethod(answer(value)) for name, value in ANSWERS.items()})
    device_interface.get_registered_device_interfaces()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)
    asked = {name: answer(value) for name, value in ANSWERS.items() if hasattr(torch.cuda, name)}
    _set(
        torch.cuda, **asked, _lazy_init=answer(None), get_device_capability=answer((9, 0)), is_initialized=answer(False)
    )
    _set(torch.cuda, _exchange_device=answer(0), _maybe_exchange_device=answer(0))
    _set(torch.cuda, get_rng_state=answer(torch.zeros(16, dtype=torch.uint8)), set_rng_state=answer(None))
    _set(torch._C, **dict.fromkeys(("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice"), answer(0)))
    torch.accelerator.is_available = answer(False)  # Dynamo would look for its streams
    torch.version.cuda = torch.version.cuda or "13.0"
    fake_tensor.init_gpu_context = answer(None)
    triton.runtime.driver.set_active(DRIVER)
    torch._inductor.runtime.triton_helpers.set_driver_to_gpu = answer(None)
    _set(torch.utils._triton, has_triton=answer(True))
    _set(torch._inductor.utils, has_triton=answer(True), get_gpu_type=answer("cuda"))
    _set(torch._inductor.config, fx_graph_cache=False, compile_threads=1)
    torch._inductor.fx_passes.fuse_attention._sfdp_init = answer(None)  # its patterns are made of tensors on the device

    fold = joint_graph.UniformValueConstantFolder._deduce_value

    def fold_on_cpu(self: Any, node: Any) -> Any:
        with _OnCPU():
            return fold(self, node)

    joint_graph.UniformValueConstantFolder._deduce_value = fold_on_cpu


# ---- kernels --------------------------------------------------------------------------------------------------------


Call = Callable[[Sequence[Any]], Any]
_mode = functools.cache(lambda: fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))


def on_gpu(tensors: Sequence[Tensor | None], sizes: Sequence[Sequence[int]] | None = None) -> list[Tensor | None]:
    """Fake tensors on the GPU with these dtypes, shapes and strides, or contiguous of other sizes."""

    def fake(i: int, t: Tensor) -> Tensor:
        if sizes is not None:
            return torch.empty(tuple(sizes[i]), dtype=t.dtype, device=CUDA)
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA)

    with _mode():
        return [None if t is None else fake(i, t) for i, t in enumerate(tensors)]


def generate(
    kernel: Kernel[..., Any], fakes: list[Any], tables: list[Any], constants: Any, load: Callable[[str], Call]
) -> Any:
    """Call a kernel by its own door on fake tensors of the GPU, its tables too.

    What Inductor writes is given to `load` in place of a GPU.

    `load(source)` returns what is called with the inputs of the generated code.
    """

    def to_module(self: GraphLowering) -> Any:
        written, _ = self.codegen()
        run = load(getattr(written, "value", written))

        def call(inputs: list[Any]) -> Any:
            with _disable_current_modes():
                return run(inputs)

        return SimpleNamespace(call=call, __file__=None, runner=None)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", to_module),
        mock.patch.object(type(kernel), "tables", return_value=tuple(tables)),
        # All fake tensors are at address 0, as if each were in the memory of the others.
        mock.patch.object(type(kernel.parameters), "apart", lambda self, args: list(args)),
        _mode(),
    ):
        return kernel._through_dynamo("cuda", fakes, constants, writes=bool(kernel.parameters.written(fakes)))[0]
