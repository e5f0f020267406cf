"""A device that is not the CPU, on machines without an accelerator.

Its tensors are CPU tensors in a wrapper. Operations refuse to mix them with tensors of the CPU where CUDA does. It is
the accelerator of its whole process, so tests start one of their own. Not covered: kernels, streams, pinned memory,
autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._device import DeviceContext
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_ATTENTION = _aten._scaled_dot_product_attention_math
_kept: list[torch.library.Library] = []
_lacks: list[torch.dtype] = []


class OtherTensor(Tensor):
    """A tensor of the other device; `raw` is on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OtherTensor:
        like: dict[str, Any] = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        wrapper = Tensor._make_wrapper_subclass(cls, raw.shape, device=torch.device(NAME, 0), **like)
        wrapper.raw = raw.detach()
        return wrapper

    def __repr__(self, **kwargs: Any) -> str:
        return f"OtherTensor({self.raw})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("only tensors of the CPU become numpy arrays")

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.__getitem__:
                # Torch itself makes tensors of lists, but not for wrappers.
                index = args[1] if isinstance(args[1], tuple) else (args[1],)
                return func(args[0], tuple(torch.tensor(at) if isinstance(at, list) else at for at in index))
            return (_attention if func is scaled_dot_product_attention else func)(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return func.decompose(*args, **kwargs or {})  # comes here whole in inference mode
        return _call(func, *args, **kwargs or {})


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return _ATTENTION(query, key, value, attn_mask, **kwargs)[0]


def _check(func: Any, args: Any, kwargs: Any) -> None:
    if func in _INDEXING and isinstance(args[0], OtherTensor):
        # Indices may be on the CPU.
        args = [args[0], *args[2:]]
    for value in pytree.tree_leaves((args, kwargs)):
        # Numbers in tensors may come from the CPU.
        if isinstance(value, Tensor) and not isinstance(value, OtherTensor) and value.dim() > 0:
            raise RuntimeError(f"{func}: a CPU tensor {tuple(value.shape)} meets tensors of the other device")


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if isinstance(leaf, OtherTensor)]
    if others and func not in _COPIES:
        _check(func, args, kwargs)
    device = kwargs.get("device")
    on_other = bool(others) if device is None else torch.device(device).type == NAME
    if on_other and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the CPU draws for the other device")
    if device is not None and on_other:
        kwargs["device"] = "cpu"
    kwargs.pop("pin_memory", None)
    raw_args, raw_kwargs = pytree.tree_map_only(OtherTensor, lambda leaf: leaf.raw, (args, kwargs))
    if func is _aten._copy_from.default:
        if raw_args[1].dtype in _lacks and not isinstance(args[1], OtherTensor):
            raise TypeError(f"{func}: the other device turns nothing into float64 on the way to the CPU")
        raw_args[1].copy_(raw_args[0])
        return args[1]
    # What is changed in place is returned as it came.
    given = {id(leaf): leaf for leaf in leaves} | {id(other.raw): other for other in others}
    result = func(*raw_args, **raw_kwargs)
    if (on_other or others) and any(
        leaf.dtype in _lacks for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)
    ):
        raise TypeError(f"{func}: the other device has no float64")
    return (
        pytree.tree_map_only(
            Tensor, lambda found: given.get(id(found)) if id(found) in given else OtherTensor(found), result
        )
        if on_other
        else result
    )


class _Module(_DummyBackendModule):
    """What is asked of a device; its random numbers are those of the CPU."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def install(*, float64: bool = True) -> None:
    """Make the device the accelerator of this process, one with or without float64."""
    if not float64:
        # Before anything else imports it.
        from intraslice import placement

        placement.with_float64 = lambda device: torch.device("cpu") if device.type == NAME else device
        _lacks.append(torch.float64)
    _setup_privateuseone_for_python_backend(NAME, _Module())
    _kept.append(torch.library.Library("_", "IMPL", "PrivateUse1"))
    _kept[0].fallback(_call)
    from_data = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        """Make a tensor of Python data, which torch cannot do for wrappers."""
        around = [mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        return from_data(data, *args, device="cpu", **kwargs).to(device or (around or ["cpu"])[-1])

    torch.tensor = tensor
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch.accelerator.synchronize = lambda device=None: None
    torch.accelerator.reset_peak_memory_stats = lambda device=None: None
    torch.accelerator.max_memory_allocated = lambda device=None: 1
    torch.accelerator.get_memory_info = lambda device=None: (1 << 34, 1 << 34)
