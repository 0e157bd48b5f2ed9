"""What a model consists of, and whether anybody has changed that since: a captured graph knows nothing of hooks,
wrappers and weights that came later."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains
from typing import Any

from torch.nn.modules import module as torch_module

# transformers leaves hooks behind for hidden states and attention weights, which do nothing otherwise.
OUTPUT_HOOKS = "transformers.utils.output_capturing"


_children, _parameters, _buffers = map(attrgetter, ("_modules", "_parameters", "_buffers"))
_hooks_before, _hooks_behind = map(attrgetter, ("_forward_pre_hooks", "_forward_hooks"))


def first_hooked(modules: Sequence[Any]) -> Any:
    """The first module of which anybody wants to see or change what goes in or comes out, hooks of all modules aside;
    None: there is none."""
    # Most often there is not even a hook to look at, which a loop of Python's takes ten times as long to find.
    own = map(contains, map(vars, modules), repeat("forward"))
    if not (any(map(_hooks_before, modules)) or any(map(_hooks_behind, modules)) or any(own)):
        return None
    return next((module for module in modules if module._forward_pre_hooks or _changes_forward(module)), None)


def identities(tables: Iterable[dict[str, Any]]) -> list[int]:
    """What tells the values of dictionaries from others, one after the other, as long as they live."""
    return list(map(id, chain.from_iterable(map(dict.values, tables))))


def _changes_forward(module: Any) -> bool:
    """The same of all but what is called before."""
    if "forward" in module.__dict__:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(getattr(hook, "__module__", "") != OUTPUT_HOOKS for hook in hooks.values())


class ModelWatch:
    """A model as it is when this is made. It is asked before every generate(), so nothing here is a loop of Python's
    over modules: ``named_modules()`` alone takes longer than all of it.

    It keeps no module alive.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        self._modules = [weakref.ref(module) for module in modules]
        self._facts = _facts(modules)
        self._root_hooks = tuple(model._forward_pre_hooks)
        self.note_addresses()

    def why_not(self, model: Any) -> str:
        """Which change keeps the model as it is now from being run as it was then; "" when none does."""
        modules = self._alive()
        # A module that lives has an identity of its own, and one that does not is of another class than then.
        if modules[0] is not model or self._facts[0] != list(map(type, modules)) or self._facts != _facts(modules):
            return "modules were added, wrapped or replaced after patch_model()"
        hooked = model if self._root_is_hooked(model) else first_hooked(modules[1:])
        if hooked is None and not torch_module._has_any_global_hook():
            return ""
        name = next((name for name, module in model.named_modules() if module is hooked), "")
        return f"{name or 'the model'} has a forward hook"

    def _alive(self) -> list[Any]:
        return [module() for module in self._modules]

    def _root_is_hooked(self, model: Any) -> bool:
        return tuple(model._forward_pre_hooks) != self._root_hooks or _changes_forward(model)

    @property
    def tensors_moved(self) -> bool:
        """Whether a parameter or buffer is elsewhere than when it was noted, or has come or gone. Only of modules that
        :meth:`why_not` has nothing against."""
        return self._addresses != _addresses(self._alive())

    def note_addresses(self) -> None:
        """From now on :attr:`tensors_moved` is about where they are now."""
        self._addresses = _addresses(self._alive())


def _facts(modules: Sequence[Any]) -> tuple[list[type], list[int], list[int]]:
    """Of which classes modules are, how many children each has, and all of these."""
    tables = list(map(_children, modules))
    return list(map(type, modules)), list(map(len, tables)), identities(tables)


def _addresses(modules: Sequence[Any]) -> list[int]:
    """Where the tensors of modules are."""
    tables = chain(map(_parameters, modules), map(_buffers, modules))
    return [tensor.data_ptr() for tensor in chain.from_iterable(map(dict.values, tables)) if tensor is not None]
