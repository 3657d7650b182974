"""What must be the same after an examination as before it, kept and put back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
)
KEPT_ELSEWHERE = {*HOOKS, "_parameters", "_buffers", "_modules"}
CONFIGS = ("config", "generation_config")


def modules_of(roots: Sequence[nn.Module | None]) -> list[nn.Module]:
    """Return every module below the roots, each once."""
    found: dict[int, nn.Module] = {}
    for root in roots:
        for module in () if root is None else root.modules():
            found.setdefault(id(module), module)
    return list(found.values())


@contextmanager
def left_as_found(roots: Sequence[nn.Module | None]) -> Iterator[None]:
    """Put back on exit, also after an exception, whatever an examination may move in the modules below `roots`.

    That is: plain attributes (training flags and patched methods among them), hooks, buffers, requires_grad, gradients,
    configuration fields, and the random states of Python, NumPy and torch. Parameters are not copied: `tensors_sha256`
    tells whether they moved.
    """
    modules = modules_of(roots)
    kept = [_kept(module) for module in modules]
    randomness = _random_state()
    try:
        yield
    finally:
        for module, state in zip(modules, kept, strict=True):
            _put_back(module, state)
        _put_random_state_back(randomness)


def tensors_sha256(root: nn.Module) -> str:
    """Return a hash of every bit of every parameter and buffer below a module, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*root.named_parameters(), *root.named_buffers()], key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{list(data.shape)}:{data.dtype};".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_sha256(roots: Sequence[nn.Module | None]) -> str:
    """Return a hash of all that an examination must leave as it was, parameters included."""
    digest = hashlib.sha256()
    for root in roots:
        digest.update(b"" if root is None else tensors_sha256(root).encode())
    for module in modules_of(roots):
        hooks = [sorted(map(str, getattr(module, name, {}))) for name in HOOKS]
        grads = [(name, p.requires_grad, p.grad is None) for name, p in module.named_parameters(recurse=False)]
        configs = [repr(getattr(module, name, None)) for name in CONFIGS]
        attributes = sorted(name for name in vars(module) if not name.startswith("_"))
        digest.update(repr((module.training, hooks, grads, configs, attributes)).encode())
    python, numpy, cpu, cuda = _random_state()
    digest.update(repr((python, numpy[1].tobytes(), numpy[2:], cpu.tolist(), [c.tolist() for c in cuda])).encode())
    return digest.hexdigest()


def _kept(module: nn.Module) -> dict[str, Any]:
    attributes = vars(module)
    return {
        "attributes": {name: value for name, value in attributes.items() if name not in KEPT_ELSEWHERE},
        "hooks": {name: list(attributes[name].items()) for name in HOOKS if name in attributes},
        "grads": [(p, p.requires_grad, p.grad) for p in module.parameters(recurse=False)],
        "buffers": [(b, b.detach().clone()) for b in module.buffers(recurse=False)],
        "buffer_slots": dict(module._buffers),
        "configs": {name: dict(vars(attributes[name])) for name in CONFIGS if _has_fields(attributes.get(name))},
    }


def _put_back(module: nn.Module, state: dict[str, Any]) -> None:
    attributes = vars(module)
    for name in [name for name in attributes if name not in KEPT_ELSEWHERE and name not in state["attributes"]]:
        del attributes[name]  # such as a method that was patched in, or kept aside by its owner
    attributes.update(state["attributes"])
    for name, items in state["hooks"].items():
        if list(attributes[name].items()) != items:
            attributes[name].clear()
            attributes[name].update(items)
    for parameter, requires_grad, grad in state["grads"]:
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad_(requires_grad)
        parameter.grad = grad
    module._buffers.update(state["buffer_slots"])
    with torch.no_grad():
        for buffer, values in state["buffers"]:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
    for name, fields in state["configs"].items():
        now = vars(attributes[name])
        for key in [key for key in now if key not in fields]:
            del now[key]
        now.update(fields)


def _has_fields(config: Any) -> bool:
    return hasattr(config, "__dict__")


def _random_state() -> tuple[Any, Any, Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _put_random_state_back(state: tuple[Any, Any, Tensor, list[Tensor]]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
