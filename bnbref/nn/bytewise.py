"""Which functions of torch leave codes what they are: they ask about a tensor, or move or read its bytes, by name.

Every other function of torch computes with the elements, or may: one that a later torch brings is taken for one that does. A
function that is not torch's, such as an operator of another library, knows what it was given.
"""

from collections.abc import Callable
from typing import Any

from bnbref.context import constant_of_graphs

ASKS = frozenset({
    "size", "dim", "ndimension", "stride", "numel", "nelement", "storage_offset", "data_ptr", "const_data_ptr", "_data_address",
    "element_size", "get_device", "dim_order", "is_complex", "is_floating_point", "is_signed", "is_conj", "is_neg",
    "is_inference", "is_contiguous", "is_coalesced", "is_distributed", "is_pinned", "is_same_size", "is_set_to", "is_shared",
    "_is_view", "_is_zerotensor", "storage", "untyped_storage", "_typed_storage", "storage_type", "result_type", "can_cast",
    "sparse_dim", "dense_dim", "has_names", "_has_compatible_shallow_copy_type", "_nested_tensor_size",
    "_nested_tensor_strides", "_nested_tensor_storage_offsets", "__len__", "__repr__", "__format__", "__hash__", "__dir__",
    "__get__", "__set__", "__delete__", "__reduce_ex__", "__deepcopy__", "__setstate__", "__array_wrap__", "__dlpack_device__",
    "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "record_stream", "requires_grad_",
    "detach_", "share_memory_", "rename_", "_clear_non_serializable_cached_data", "empty_like", "zeros_like", "ones_like",
    "full_like", "rand_like", "randn_like", "randint_like", "new", "new_empty", "new_empty_strided", "new_zeros", "new_ones",
    "new_full", "new_tensor"
})  # fmt: skip
"""Functions that read no element: questions, and what makes a tensor of the same size."""

READS = frozenset({
    "__array__", "__dlpack__", "numpy", "tolist", "item", "__int__", "__index__", "equal", "hash_tensor"
})  # fmt: skip
"""Functions that give the codes, or say whether they are the same, and no tensor."""

CUTS = frozenset({
    "chunk", "split", "split_with_sizes", "tensor_split", "narrow", "view", "reshape", "flatten", "__getitem__", "view_as",
    "reshape_as", "ravel", "unflatten", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "hsplit", "vsplit", "dsplit",
    "unbind", "select"
})  # fmt: skip
"""Functions that give the codes themselves, or pieces of them."""

CASTS = frozenset({
    "to", "type", "type_as", "_to_copy", "float", "double", "half", "bfloat16", "long", "int", "short", "char", "byte", "cpu",
    "cuda", "xpu", "mtia", "ipu"
})  # fmt: skip
"""Functions that move a tensor or make it one of another dtype."""

JOINS = frozenset({
    "cat", "concat", "concatenate", "hstack", "vstack", "dstack", "row_stack", "column_stack", "flatten_dense_tensors"
})  # fmt: skip
"""Functions that join tensors. Not `stack`: torch.func.stack_module_state calls it, and its result has no scales."""

MOVES = frozenset({
    "clone", "contiguous", "pin_memory", "detach", "alias", "resolve_conj", "resolve_neg", "conj", "squeeze", "unsqueeze",
    "transpose", "t", "adjoint", "movedim", "moveaxis", "swapaxes", "swapdims", "permute", "expand", "expand_as",
    "broadcast_to", "broadcast_tensors", "repeat", "tile", "narrow_copy", "index_select", "gather", "take", "take_along_dim",
    "masked_select", "as_strided", "unfold", "diagonal", "roll", "flip", "fliplr", "flipud", "rot90", "atleast_1d",
    "atleast_2d", "atleast_3d", "_unsafe_view", "_reshape_alias", "lift_fresh", "unflatten_dense_tensors", "__reversed__",
    "alias_copy", "detach_copy", "view_copy", "squeeze_copy", "unsqueeze_copy", "transpose_copy", "t_copy", "permute_copy",
    "expand_copy", "select_copy", "slice_copy", "split_copy", "split_with_sizes_copy", "unbind_copy", "unfold_copy",
    "diagonal_copy", "as_strided_copy", "_reshape_alias_copy", "T", "mT", "H", "mH", "real", "broadcast", "all_gather",
    "all_gather_coalesced", "all_gather_single", "all_to_all", "all_to_all_single", "send", "recv", "isend", "irecv", "pad",
    "constant_pad_nd"
})  # fmt: skip
"""Functions that move bytes, within a tensor, to another one, or to another process."""

OF_INTEGERS = frozenset({
    "eq", "ne", "not_equal", "__eq__", "__ne__", "isnan", "isinf", "isfinite", "isneginf", "isposinf", "unique",
    "unique_consecutive", "bincount", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "bitwise_left_shift",
    "bitwise_right_shift", "__and__", "__rand__", "__or__", "__ror__", "__xor__", "__rxor__", "__invert__", "__lshift__",
    "__rshift__", "floor_divide", "__floordiv__", "remainder", "__mod__"
})  # fmt: skip
"""Functions of integers, by which packed codes are taken apart, compared and counted. In a float dtype torch has no bits of them,
and codes that look like NaN are not equal to themselves."""

EQUALITIES = frozenset({"eq", "ne", "not_equal", "__eq__", "__ne__"})
"""Those of them that compare with another tensor of codes. A number is nothing to compare codes with."""

SCALINGS = frozenset({"mul", "multiply", "div", "divide", "true_divide", "__mul__", "__rmul__", "__truediv__"})
"""Functions by which integer codes become numbers: their products and quotients with scales, which are floats."""

COPIES = {"copy_": 1, "module_load": 1, "_foreach_copy_": 1, "__setitem__": 2}
"""Functions that write into their first argument what another one holds, and which argument that is."""

ALLOWED = ASKS | READS | CUTS | CASTS | JOINS | MOVES | OF_INTEGERS | SCALINGS | COPIES.keys()


@constant_of_graphs
def name_of(func: Callable[..., Any]) -> str:
    """The name of a function of torch, without that of an overload; of an attribute that is a view, its own.

    >>> import torch
    >>> name_of(torch.add), name_of(torch.ops.aten.add.Tensor), name_of(torch.Tensor.mT.__get__)
    ('add', 'add', 'mT')
    """
    name: str = getattr(func, "__name__", "")
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return attribute if name == "__get__" and attribute in MOVES else name.partition(".")[0]


@constant_of_graphs
def is_torchs(func: Callable[..., Any]) -> bool:
    """Whether a function is torch's own, and no operator of `torch.ops`: graphs consist of these, which decode what they hold.

    >>> import torch
    >>> is_torchs(torch.add), is_torchs(torch.ops.aten.add.Tensor), is_torchs(torch.ops.bnbref.linear_4bit)
    (True, False, False)
    """
    module = getattr(func, "__module__", None) or "torch"  # a method of Tensor has none
    if module.startswith("torch.distributed."):
        return "reduce" in func.__name__
    return module.partition(".")[0] == "torch" and not module.startswith("torch._ops.")
