# SPDX-License-Identifier: Apache-2.0
"""Where the parameters of a network live, and what users hang on its modules.

The network is one call of the core, in which submodules only hold weights. Hooks on them, adapters and other
modules in their place make it run layer by layer, by calling its modules. What that could not follow either
(a layer less, a parameter that nobody reads) is an error here. Parametrizations (torch.nn.utils.parametrize)
need none of this: they run when a parameter is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

Made = dict[str, tuple[type, tuple[Any, ...]]]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_settings = attrgetter(*_CONVOLUTION)


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks that run when the module is called, by kind."""
    return [getattr(module, kind) for kind in _HOOKS]


_EVERYWHERE = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def hooked_everywhere() -> bool:
    """Whether hooks run at the calls of all modules (module trackers, FLOP counters)."""
    return any(_EVERYWHERE)


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


def as_built(module: nn.Module, built: Made) -> bool:
    """Whether calling the modules in this one would do no more than their parameters say."""
    return not hooked_everywhere() and all(
        path in built and _kind(part) == built[path] and not does_more(part)
        for path, part in module.named_modules()
        if path and "parametrizations" not in path.split(".")
    )


def _kind(module: nn.Module) -> tuple[type, tuple[Any, ...]]:
    settings = _settings(module) if isinstance(module, _CONVOLUTIONS) else ()
    return parametrize.type_before_parametrizations(module), settings


class Places:
    """The parameters `names` of a network, looked up once.

    Args:
        model: the network; not kept.
        names: state-dict keys, in the order in which `tensors` gives them.
        made: what the submodules were when the network was built.

    Attributes:
        plans: what calls keep here, as it holds as long as this does.
        called: why the network has to call its modules; empty where one call of the core does.

    Raises:
        RuntimeError: something hangs on a submodule that calls of modules would pass over as well.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], made: Made) -> None:
        self.plans: dict[Any, Any] = {}
        self.called: list[str] = []
        if hooked_everywhere():
            self.called.append(_reason("all modules", "have hooks (register_module_forward_hook, ...)"))
        if others := _others(model, made):
            self.called += others.values()
        self._slots: list[tuple[nn.Module | None, dict[str, Any], str]] = []  # owner None: the network itself
        holders: dict[str, nn.Module] = {"": model}
        children: dict[str, list[str]] = {"": []}
        leaves: dict[str, set[str]] = {}
        for name in names:
            *path, leaf = name.split(".")
            if any(".".join(path[:n]) in others for n in range(1, len(path) + 1)):
                continue  # of a module that is called, whatever is in it
            parent = ""
            for part in path:
                here = f"{parent}.{part}" if parent else part
                if here not in holders:
                    module = holders[parent]._modules.get(part)
                    if module is None:
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
        if "rope" in made and "rope" not in others:  # holds no parameters, but turns the tokens
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
                inside = [part for part in module._modules if f"{at}.{part}" in others]
                _check(at, module, made.get(at), [*children[at], *inside], leaves.get(at, set()))
                self.called += _reasons(at, module)
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
            and not self.called
            and not any(self._hooks)
            and not any(_EVERYWHERE)
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


def _others(model: nn.Module, made: Made) -> dict[str, str]:
    """Modules that stand in the place of the network's own, and what is called for; the outermost ones.

    Raises:
        RuntimeError: such a module cannot be followed.
    """
    found: dict[str, str] = {}
    for path, built in made.items():
        if path.split(".")[0] == "head" or any(path.startswith(f"{other}.") for other in found):
            continue
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue  # missing: said later
        kind = _kind(module)
        own = "forward" in vars(module)
        if kind[0] is not built[0]:
            _refuse_sharded(path, module)
            if path == "layers":
                raise _refusal(path, f"expected {_called(built[0])}, got {_called(kind[0])}")
            what = f"expected {_called(built[0])}, got {_called(kind[0])}"
            found[path] = _reason(path, what, _remedy(kind[0]))
        elif own:
            found[path] = _reason(path, "has a forward of its own (set on the object)")
    return found


def _reasons(path: str, module: nn.Module) -> list[str]:
    """What calling the module would run besides what it is."""
    found = []
    for hook in (hook for hooks in hooks_of(module) for hook in hooks.values()):
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        remedy = (
            "remove it; prune.remove makes pruning permanent, torch.nn.utils.parametrizations replaces "
            "weight_norm and spectral_norm"
        )
        if path != "layers":  # a list, which nobody calls
            found.append(_reason(path, f"has the hook {name}", remedy))
    if _compiled(module):
        found.append(_reason(path, "is compiled"))
    return found


def _reason(path: str, what: str, remedy: str = "") -> str:
    """For what reads the weights of a network without calling its modules."""
    remedy = remedy or "put the module back"
    return (
        f"[VisionMamba] {path}: {what}; calls of the network follow this layer by layer, but what reads its "
        f"weights alone (constant_weights, explain, health) would ignore it: {remedy}"
    )


def _refusal(path: str, what: str, remedy: str = "") -> RuntimeError:
    remedy = remedy or (
        "put the module back, or express the change by torch.nn.utils.parametrize, which is followed"
    )
    return RuntimeError(f"[VisionMamba] {path}: {what}, which would be ignored: {remedy}")


def _check(
    path: str,
    module: nn.Module,
    built: tuple[type, tuple[Any, ...]] | None,
    children: list[str],
    leaves: set[str],
) -> None:
    kind = _kind(module)
    if built is not None and kind != built and path != "head":
        pairs = zip(_CONVOLUTION, built[1], kind[1])
        raise _refusal(path, "; ".join(f"{s} expected {a}, got {b}" for s, a, b in pairs if a != b))
    if any(hooks_of(module)):  # they may make weights of other parameters (pruning)
        known = leaves | {f"{leaf}{end}" for leaf in leaves for end in ("_orig", "_g", "_v")}
    else:
        known = leaves
    if further := [key for key, p in module._parameters.items() if p is not None and key not in known]:
        raise _refusal(path, f"has parameters that the network does not know: {', '.join(further)}")
    parts = [*children, "parametrizations"] if parametrize.is_parametrized(module) else children
    if further := [key for key, m in module._modules.items() if m is not None and key not in parts]:
        raise _refusal(path, f"has modules that the network does not know: {', '.join(further)}")
    if missing := sorted(leaf for leaf in leaves if not isinstance(getattr(module, leaf, None), Tensor)):
        raise _refusal(path, f"is without {', '.join(missing)}")


def _refuse_sharded(path: str, module: nn.Module) -> None:
    kind = type(module)
    if kind.__name__.startswith("FSDP") or "fsdp" in kind.__module__:
        remedy = "shard the network as a whole (fully_shard(model)), not its layers"
        raise _refusal(path, f"expected a module with its weights, got {_called(kind)}", remedy)


def _remedy(kind: type) -> str:
    if kind.__module__.startswith("peft"):
        return "merge the adapters into the weights (merge_and_unload)"
    return ""
