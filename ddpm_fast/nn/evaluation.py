"""Evaluation mode without changing the flags of a module that others use."""

__all__ = ["in_evaluation"]

import copy
import functools
import types
from typing import Any

import torch
from torch import nn


def in_evaluation(model: nn.Module) -> nn.Module:
    """The model if all of it is in evaluation mode; otherwise a copy in evaluation mode that shares its tensors.

    `model.eval()` would change flags of a module that another thread may be training. The copy has modules of its own
    and the same parameter and buffer dictionaries, so that it follows writes and replacements of weights. It is meant
    to be used for one sampling run.

    Attributes of modules that refer to other modules (in lists, dicts, bound methods and partial functions) refer to
    the copies. References hidden in closures are not found. A module compiled by `torch.compile` is such a closure, so
    that its original is used; one of TorchScript is copied with its tensors.
    """
    if not any(module.training for module in model.modules()):
        return model
    return _Copier().module(model)


class _Copier:
    def __init__(self) -> None:
        self._copies: dict[int, nn.Module] = {}

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self._copies:
            return self._copies[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            clone = copy.deepcopy(module).eval()
            self._copies[id(module)] = clone
            return clone
        if "_orig_mod" in module._modules:
            clone = self.module(module._modules["_orig_mod"])
            self._copies[id(module)] = clone
            return clone
        # As nn.DataParallel makes its replicas.
        clone = module.__new__(type(module))
        self._copies[id(module)] = clone
        clone.__dict__ = module.__dict__.copy()
        clone.__dict__["training"] = False
        clone.__dict__["_modules"] = {
            name: None if child is None else self.module(child) for name, child in module._modules.items()
        }
        for name, value in module.__dict__.items():
            if name not in _SHARED:
                clone.__dict__[name] = self.value(value)
        return clone

    def value(self, value: Any) -> Any:
        """An attribute, with the modules in it replaced by their copies."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) is functools.partial:
            # functools.update_wrapper leaves attributes on a partial function, as accelerate's hooks do.
            clone = functools.partial(self.value(value.func), *map(self.value, value.args))
            clone.keywords.update({name: self.value(v) for name, v in value.keywords.items()})
            return clone
        if type(value) in (list, tuple, set, frozenset):
            changed = [self.value(v) for v in value]
            same = all(new is old for new, old in zip(changed, value, strict=True))
            return value if same else type(value)(changed)
        if type(value) is dict:
            changed = {name: self.value(v) for name, v in value.items()}
            return value if all(changed[name] is value[name] for name in value) else changed
        return value


# What a copy shares with its module, or has already.
_SHARED = {"training", "_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"}
