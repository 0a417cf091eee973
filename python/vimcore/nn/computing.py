# SPDX-License-Identifier: Apache-2.0
"""A network that computes by the core: the parameters of a call, in the core's order, and the call itself."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from .._core import Config, Draws, Saved
from ..autograd.checks import is_followed, refuse_tracing, refuse_wrapped, tracing_refusal
from ..autograd.draws import NONE, draw
from ..autograd.network import Core, NetworkFunction, Request
from ..positions import rope_tables
from ..utils.arguments import boolean
from ..utils.compiling import constant_result
from .constant import ConstantWeights
from .following import Plan, follow, plan_of
from .inputs import checked_images
from .layerwise import layerwise
from .parameters import Rope, equip
from .sharing import SharedNetwork
from .structure import Made, Places, does_more

Computing = TypeVar("Computing", bound="ComputingNetwork")


class ComputingNetwork(SharedNetwork):
    """What `VisionMamba` is to the core: a configuration, and tensors found anew at every call."""

    rope: Rope
    _made: Made  # the submodules as they were built
    dynamic_img_size = False  # of networks that an earlier version pickled

    def __init__(self, config: Config, memory: str, dynamic_img_size: bool) -> None:
        super().__init__()
        self._config = config
        Saved.chunk(str(memory))  # names a wrong one
        self.memory = memory
        self.dynamic_img_size = boolean("[VisionMamba] dynamic_img_size", dynamic_img_size)
        self._core: Core | None = None
        self._places: Places | None = None
        self._constant: tuple[ConstantWeights, ...] = ()  # entered, the last one holds

    # ---- a call --------------------------------------------------------------------------------------------

    def _call(
        self, kind: str, images: Tensor, layers: tuple[int, ...] = (), position: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One pass of the network: "logits", normalised "tokens", or the residual stream after `layers`.

        Args:
            position: of a random class token in training, where it was drawn before.
        """
        if is_followed():
            refuse_tracing("VisionMamba")
            plan = self._plan(kind, layers)
            run = layerwise if plan.calls_modules else follow
            return run(self, plan, kind, images, layers, position)
        entered = self._constant
        if entered and not (entered[-1].computed and torch.is_grad_enabled()):
            core, params, constant = entered[-1].core, entered[-1].params, entered[-1].weights
        else:
            core, places, constant = *self._bound_places(), None
            if places.called:
                return layerwise(self, self._plan(kind, layers), kind, images, layers, position)
            params = self._tensors(core, places)
        images = checked_images(images, params[0], self._config, self.dynamic_img_size)
        self._config_for(images)  # says which size is out of range
        differentiated = False
        if torch.is_grad_enabled():
            part = core.taking_part(kind, layers)
            differentiated = images.requires_grad or any(p.requires_grad for p, t in zip(params, part) if t)
        request = Request(kind, layers, self._draws(kind, images, position), self.memory)
        if differentiated:
            return NetworkFunction.apply(core, request, constant, images, *params)
        return core.run(request, images, params, None, constant)

    def _draws(self, kind: str, images: Tensor, position: Tensor | None) -> Draws:
        """The random draws of one forward in training; a position of the class token may be given."""
        if not self.training:
            return NONE
        drawn = position is None and kind == "logits" and self._head_is_fused()
        return draw(
            self._config_for(images), images, None if drawn else -1 if position is None else int(position)
        )

    def _head_is_fused(self) -> bool:
        """Whether the core computes the head as well."""
        head = getattr(self, "head", None)
        if head is None:
            raise RuntimeError(
                "[VisionMamba] head: expected a module, got none; for a network without a head: "
                "reset_classifier(0)"
            )
        if does_more(head):
            return False
        return type(head) is nn.Identity or (
            type(head) is nn.Linear
            and head.in_features == self._config.readout_width
            and head.bias is not None
        )

    def train(self: Computing, mode: bool = True) -> Computing:
        if not mode and self._core is not None:
            self._core.network.release()  # what training keeps from step to step
        return super().train(mode)

    # ---- what is known of the network ----------------------------------------------------------------------

    def _known(self) -> Plan | Config:
        """What is known of the network: for a compiler in plain values."""
        return self._plan("tokens", ()) if torch.compiler.is_compiling() else self._config

    @constant_result
    def _plan(self, kind: str, layers: tuple[int, ...]) -> Plan:
        core, places = self._bound_places()
        plan: Plan | None = places.plans.get((kind, layers))
        if plan is None:
            plan = plan_of(core.config, self._head_is_fused(), bool(places.called), kind, layers)
            places.plans[kind, layers] = plan
        return plan

    @constant_result
    def _plan_at(self, height: int, width: int) -> Plan:
        """The same for images of another size."""
        core, places = self._bound_places()
        at = core.at(height, width)
        return plan_of(at, self._head_is_fused(), bool(places.called), "tokens", ())

    @constant_result
    def _rotations(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        return rope_tables(self._network().at(height, width).to_dict())

    def _config_for(self, images: Any) -> Config:
        """The configuration with the size of these images, where any is allowed."""
        ndim = 5 if self._config.frames else 4
        if not self.dynamic_img_size or not isinstance(images, Tensor) or images.ndim != ndim:
            return self._config
        return self._network().at(*images.shape[-2:])

    # ---- parameters in the core's order --------------------------------------------------------------------

    def _network(self) -> Core:
        classes = self.num_classes if self._head_is_fused() else 0
        core = self._core
        if core is None or core.config.num_classes != classes:
            core = Core(self._config.replace(num_classes=classes))
            self._core, self._places = core, None
        return core

    def _weights(self) -> tuple[Core, list[Tensor]]:
        """The core's network, and its parameters in its order.

        Raises:
            RuntimeError: something hangs on a submodule that who reads weights alone would pass over.
            TypeError: a parameter is no plain tensor.
        """
        core, places = self._bound_places()
        if places.called:
            raise RuntimeError(places.called[0])
        return core, self._tensors(core, places)

    def _bound_places(self) -> tuple[Core, Places]:
        core = self._network()
        places = self._places  # other threads may set it meanwhile
        if places is None or not places.hold(self):
            self._places = None
            places = Places(self, core.names, self._made)
            if faults := self._rotation_faults():
                raise RuntimeError(
                    f"[VisionMamba] {'; '.join(faults)}; the core computes its own rotations and would "
                    "ignore these: build the network with their rope_grid, or put the constructor's back"
                )
            self._places = places
        return core, places

    def _tensors(self, core: Core, places: Places) -> list[Tensor]:
        params = places.tensors(self)
        refuse_wrapped("VisionMamba", core.names, params)
        return params

    def _rotation_faults(self) -> list[str]:
        if not self._config.rope:
            return []
        tables = {f"rope.{key}": table for key, table in self.rope.named_buffers()}
        refuse_wrapped("VisionMamba", list(tables), list(tables.values()))
        if is_followed() and not {Tensor} >= set(map(type, tables.values())):
            return []  # a tracer's, which hold nothing
        return self.rope.faults(self.config)

    # ---- copies --------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_core": None, "_places": None, "_constant": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        equip(self, self._config, self._made)  # what an earlier version pickled lacks it

    def _replicate_for_data_parallel(self: Computing) -> Computing:
        replica = super()._replicate_for_data_parallel()
        replica._core = replica._places = None  # those of the original
        replica._constant = ()
        return replica

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for."""
        raise RuntimeError(tracing_refusal("VisionMamba", "torch.jit.script"))
