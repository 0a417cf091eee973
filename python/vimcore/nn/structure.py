# SPDX-License-Identifier: Apache-2.0
"""Where the parameters of a network live.

Submodules of `VisionMamba` hold weights and are not called. What a user hangs on them (hooks, adapters,
further parameters, other kinds of modules) would be passed over without a word: here it becomes an error.
Parametrizations (torch.nn.utils.parametrize) are followed: they run when a parameter is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

Made = dict[str, tuple[type, tuple[Any, ...]]]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_settings = attrgetter(*_CONVOLUTION)


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks that run when the module is called, by kind."""
    return [getattr(module, kind) for kind in _HOOKS]


def does_more(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says, or in another way."""
    return "forward" in vars(module) or _compiled(module) or any(hooks_of(module))


def written(tensor: Tensor | None) -> int:
    """How often torch saw a tensor written to; it does not count for those made in inference mode."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _compiled(module: nn.Module) -> bool:
    return vars(module).get("_compiled_call_impl") is not None


def made(model: nn.Module) -> Made:
    """Type and, of convolutions, settings of every submodule, as the network was built."""
    return {path: _kind(module) for path, module in model.named_modules() if path}


def _kind(module: nn.Module) -> tuple[type, tuple[Any, ...]]:
    settings = _settings(module) if isinstance(module, _CONVOLUTIONS) else ()
    return parametrize.type_before_parametrizations(module), settings


class Places:
    """The parameters `names` of a network, looked up once.

    Args:
        model: the network; not kept.
        names: state-dict keys, in the order in which `tensors` gives them.
        made: what the submodules were when the network was built.

    Raises:
        RuntimeError: something hangs on a submodule that a call of the network would pass over.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], made: Made) -> None:
        self._slots: list[tuple[nn.Module | None, dict[str, Any], str]] = []  # owner None: the network itself
        holders: dict[str, nn.Module] = {"": model}
        children: dict[str, list[str]] = {"": []}
        leaves: dict[str, set[str]] = {}
        for name in names:
            *path, leaf = name.split(".")
            parent = ""
            for part in path:
                here = f"{parent}.{part}" if parent else part
                if here not in holders:
                    module = holders[parent]._modules.get(part)
                    if module is None:
                        if parent:
                            _check_kind(parent, holders[parent], made.get(parent))
                        raise _refusal(here, f"expected {_called(made[here][0])}, got none")
                    holders[here], children[here] = module, []
                    children[parent].append(part)
                parent = here
            leaves.setdefault(parent, set()).add(leaf)
            owner = holders[parent]
            self._slots.append((owner if parent else None, owner._parameters, leaf))
        if missing := [
            leaf for leaf in leaves.get("", ()) if not isinstance(getattr(model, leaf, None), Tensor)
        ]:
            raise _refusal(missing[0], "expected a parameter, got none")
        self._links = [(model._modules, part, holders[part]) for part in children[""]]
        self._hooks: list[dict[int, Any]] = []
        # attributes of a submodule, its parameters, their number
        self._held: list[tuple[dict[str, Any], dict[str, Any], int]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []  # parameters that are None: no bias
        self._modules: list[tuple[dict[str, Any], list[Any]]] = []
        self._tables: list[tuple[dict[str, Any], str, Any, int]] = []  # rotations, and how often written to
        self._root = model._parameters
        if "rope" in made:  # holds no parameters, but turns the tokens
            rope = model._modules.get("rope")
            if rope is None:
                raise _refusal("rope", f"expected {_called(made['rope'][0])}, got none")
            holders["rope"], children["rope"] = rope, []
            self._links.append((model._modules, "rope", rope))
            self._tables = [(rope._buffers, key, t, written(t)) for key, t in rope._buffers.items()]
        self._holders = [module for at, module in holders.items() if at]
        self._kinds = list(map(type, self._holders))
        self._convolutions = [module for module in self._holders if isinstance(module, _CONVOLUTIONS)]
        self._settings = list(map(_settings, self._convolutions))
        for at, module in holders.items():
            if at:
                _check(at, module, made.get(at), children[at], leaves.get(at, set()))
                self._hooks += hooks_of(module)
                held = module._parameters
                self._held.append((vars(module), held, len(held)))
                self._absent += [(held, key) for key, p in held.items() if p is None]
                if module._modules:
                    self._modules.append((module._modules, list(module._modules.values())))

    def hold(self, model: nn.Module) -> bool:
        """Whether nothing was replaced or added since."""
        return (
            model._parameters is self._root
            and not any(self._hooks)
            and all(links.get(part) is module for links, part, module in self._links)
            and all(list(links.values()) == modules for links, modules in self._modules)
            and all(
                own["_parameters"] is p
                and len(p) == n
                and "forward" not in own
                and own.get("_compiled_call_impl") is None
                for own, p, n in self._held
            )
            and list(map(type, self._holders)) == self._kinds
            and list(map(_settings, self._convolutions)) == self._settings
            and all(own.get(key) is t and written(t) == count for own, key, t, count in self._tables)
            and all(held[key] is None for held, key in self._absent)
        )

    def tensors(self, model: nn.Module) -> list[Any]:
        """The parameters, in the order of the names; None for what is gone."""
        # a parametrised weight, or one that a wrapper set, is not in _parameters but an attribute still
        return [
            d[leaf] if leaf in d else getattr(owner or model, leaf, None) for owner, d, leaf in self._slots
        ]


def _called(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("torch.nn.modules.")


def _refusal(path: str, what: str, remedy: str = "") -> RuntimeError:
    remedy = remedy or (
        "put the module back, or express the change by torch.nn.utils.parametrize, which is followed"
    )
    return RuntimeError(
        f"[VisionMamba] {path}: {what}; submodules hold weights and are not called, so it would be ignored: "
        f"{remedy}"
    )


def _check_kind(path: str, module: nn.Module, built: tuple[type, tuple[Any, ...]] | None) -> None:
    kind = _kind(module)
    if built is not None and kind != built and path != "head":
        if kind[0] is built[0]:
            pairs = zip(_CONVOLUTION, built[1], kind[1])
            raise _refusal(path, "; ".join(f"{s} expected {a}, got {b}" for s, a, b in pairs if a != b))
        raise _refusal(path, f"expected {_called(built[0])}, got {_called(kind[0])}", _remedy(kind[0]))


def _check(
    path: str,
    module: nn.Module,
    built: tuple[type, tuple[Any, ...]] | None,
    children: list[str],
    leaves: set[str],
) -> None:
    _check_kind(path, module, built)
    for hook in (hook for hooks in hooks_of(module) for hook in hooks.values()):
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        raise _refusal(
            path,
            f"has the hook {name}",
            "remove it and take forward_intermediates or forward_features for activations; prune.remove "
            "makes pruning permanent, torch.nn.utils.parametrizations replaces weight_norm and spectral_norm",
        )
    if "forward" in vars(module):
        raise _refusal(path, "has a forward of its own (set on the object)")
    if _compiled(module):
        raise _refusal(path, "is compiled", "compile the network as a whole, if at all (model.compile())")
    if further := [key for key, p in module._parameters.items() if p is not None and key not in leaves]:
        raise _refusal(path, f"has parameters that the network does not know: {', '.join(further)}")
    known = [*children, "parametrizations"] if parametrize.is_parametrized(module) else children
    if further := [key for key, m in module._modules.items() if m is not None and key not in known]:
        raise _refusal(path, f"has modules that the network does not know: {', '.join(further)}")
    if missing := sorted(leaf for leaf in leaves if not isinstance(getattr(module, leaf, None), Tensor)):
        raise _refusal(path, f"is without {', '.join(missing)}")


def _remedy(kind: type) -> str:
    if kind.__name__.startswith("FSDP") or "fsdp" in kind.__module__:
        return "shard the network as a whole (fully_shard(model)), not its layers"
    if kind.__name__ == "OptimizedModule":
        return "compile the network as a whole, if at all (torch.compile(model))"
    if kind.__name__ == "CheckpointWrapper":
        return "the option memory says how much backward recomputes"
    if kind.__module__.startswith("peft"):
        return "merge the adapters into the weights (merge_and_unload)"
    if "quant" in kind.__module__:
        return "the network computes in float32 or, on CUDA, 16 bits: quantize nothing in it"
    return ""
