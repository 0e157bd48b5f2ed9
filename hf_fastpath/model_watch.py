"""What a model consists of, and whether anybody has changed that since: a captured graph knows nothing of hooks,
wrappers and weights that came later."""

from __future__ import annotations

import weakref
from typing import Any

from torch.nn.modules import module as torch_module

# transformers leaves hooks behind for hidden states and attention weights, which do nothing otherwise.
OUTPUT_HOOKS = "transformers.utils.output_capturing"


def is_hooked(module: Any) -> bool:
    """Whether anybody wants to see or change what goes into a module or comes out of it, hooks of all modules aside."""
    return bool(module._forward_pre_hooks) or _changes_forward(module)


def _changes_forward(module: Any) -> bool:
    """The same of all but what is called before."""
    if "forward" in module.__dict__:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(getattr(hook, "__module__", "") != OUTPUT_HOOKS for hook in hooks.values())


class ModelWatch:
    """A model as it is when this is made. It is asked before every generate(), so it looks at each module directly:
    ``named_modules()`` alone takes longer than all of this.

    It keeps no module alive.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        index = {id(module): i for i, module in enumerate(modules)}
        self._modules = [weakref.ref(module) for module in modules]
        self._kinds = [type(module) for module in modules]
        self._children = [
            [None if child is None else index[id(child)] for child in module._modules.values()] for module in modules
        ]
        self._root_hooks = tuple(model._forward_pre_hooks)
        self.note_addresses()

    def why_not(self, model: Any) -> str:
        """Which change keeps the model as it is now from being run as it was then; "" when none does."""
        modules = self._unchanged(model)
        if modules is None:
            return "modules were added, wrapped or replaced after patch_model()"
        hooked = model if self._root_is_hooked(model) else next(filter(is_hooked, modules[1:]), None)
        if hooked is None and not torch_module._has_any_global_hook():
            return ""
        name = next((name for name, module in model.named_modules() if module is hooked), "")
        return f"{name or 'the model'} has a forward hook"

    def _unchanged(self, model: Any) -> list[Any] | None:
        """All modules, when they are those of then."""
        modules: list[Any] = [module() for module in self._modules]
        if modules[0] is not model:
            return None
        for module, kind, children in zip(modules, self._kinds, self._children, strict=True):
            if type(module) is not kind or len(module._modules) != len(children):
                return None
            for child, index in zip(module._modules.values(), children, strict=True):
                if child is not (None if index is None else modules[index]):
                    return None
        return modules

    def _root_is_hooked(self, model: Any) -> bool:
        return tuple(model._forward_pre_hooks) != self._root_hooks or _changes_forward(model)

    @property
    def tensors_moved(self) -> bool:
        """Whether a parameter or buffer is elsewhere than when it was noted, or has come or gone."""
        return self._addresses != _addresses(self._modules)

    def note_addresses(self) -> None:
        """From now on :attr:`tensors_moved` is about where they are now."""
        self._addresses = _addresses(self._modules)


def _addresses(modules: list[weakref.ref[Any]]) -> list[int]:
    """Where the tensors of modules, all of them alive, are."""
    found = []
    for reference in modules:
        module: Any = reference()
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found.append(tensor.data_ptr())  # a comprehension of this depth is harder to read
    return found
