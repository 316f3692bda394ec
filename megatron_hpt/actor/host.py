"""Megatron-Core on a host without CUDA: gloo process groups and CPU tensors, with the package unedited.

Megatron-Core names its device in three ways that a torch without CUDA refuses:

1. ``device=torch.cuda.current_device()`` or ``device="cuda"`` in factory calls, and stream or synchronisation calls.
   Every loaded ``megatron.core`` module gets, in place of its global ``torch``, a facade that answers these on the CPU
   and forwards everything else. Nothing outside ``megatron.core`` sees it. (A TorchFunctionMode would not do: it is
   not seen inside ``autograd.Function.backward``, which runs on another thread.)
2. The CUDA generator's state (initialisation, recomputation): replaced by the CPU generator's.
3. ``tensor.cuda()`` and ``tensor.type() == "torch.cuda.FloatTensor"`` in the optimizers and in loading: answered while
   `as_accelerator` is held, around building, stepping and loading.

Written against megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint", "linspace"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like"),
)
# Imported by megatron.core inside functions: load them now, so that they get the facade too.
_LATE_IMPORTS = (
    *("distributed", "optimizer", "pipeline_parallel", "models.gpt", "transformer.moe.moe_layer"),
    *("transformer.cuda_graphs", "dist_checkpointing", "dist_checkpointing.strategies.torch"),
    *("dist_checkpointing.strategies.filesystem_async", "dist_checkpointing.strategies.async_utils"),
    *("dist_checkpointing.strategies.state_dict_saver", "dist_checkpointing.strategies.fully_parallel"),
    "dist_checkpointing.exchange_utils",
)


class _Stream:
    """A stream or event where work is done when the call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        """Do nothing: there is nothing to wait for."""

    wait_stream = wait_event = wait = record = synchronize = _nothing

    def record_event(self, *_: Any) -> _Stream:
        """Return an event that has already happened."""
        return self

    def query(self) -> bool:
        """Return whether work is complete, which it always is."""
        return True


class _HostCuda(types.ModuleType):
    """Stands in for ``torch.cuda`` inside megatron.core."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda: None)
        self.random = self
        self.Stream = self.Event = _Stream
        self.synchronize = self.empty_cache = lambda *_: None
        self.current_device = lambda: "cpu"
        self.current_stream = self.default_stream = lambda *_: _Stream()
        self.stream = lambda *_: contextlib.nullcontext()
        self.get_rng_state = lambda *_, **__: torch.get_rng_state()
        self.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        self.manual_seed = torch.manual_seed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _HostTorch(types.ModuleType):
    """Stands in for ``torch`` inside megatron.core."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _HostCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_host(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_host(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return the factory function, with tensors on the CPU where CUDA is asked for, and no pinned memory."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def install() -> None:
    """Present the host as the accelerator to every megatron.core module; called once, in a trainer process."""
    for name in _LATE_IMPORTS:
        importlib.import_module(f"megatron.core.{name}")
    facade = _HostTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module.__dict__.get("torch") is torch:
            module.torch = facade
    _track_host_generator(importlib.import_module("megatron.core.tensor_parallel.random"))
    # Megatron's own leaves a host tensor as it is, even where numpy is asked for.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _track_host_generator(rng: types.ModuleType) -> None:
    """Let Megatron's tracker of named generator states switch the CPU generator."""
    base = rng.CudaRNGStatesTracker

    class HostRNGStatesTracker(base):
        @contextlib.contextmanager
        def fork(self, name: str = rng._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    rng.CudaRNGStatesTracker = HostRNGStatesTracker
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda new_state, *_, **__: torch.set_rng_state(new_state)
    rng._CUDA_RNG_STATE_TRACKER = None
    rng._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


class as_accelerator(TorchFunctionMode):  # lower case: used like a function
    """A context in which ``t.cuda()`` returns ``t`` and ``t.type()`` answers as on CUDA; see `Platform.building`."""

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(out, str) and not out.startswith("torch.cuda."):
            return out.replace("torch.", "torch.cuda.", 1)
        return out
