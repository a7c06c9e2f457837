"""Records sums over the activations of a model, at every call site."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from lightning_noisy._torch_internals import strip_wrappers, without_overrides
from lightning_noisy.monitoring.call_watch import CallPlaces, FunctionCalls, RunEagerly, is_in_place
from lightning_noisy.monitoring.calls import Hook, clipped, full_precision, is_repeated, local, unit_dim_at
from lightning_noisy.monitoring.classes import ClassWatch
from lightning_noisy.monitoring.measure import Measured, Sums
from lightning_noisy.monitoring.recurrent import gate_names, gates
from lightning_noisy.monitoring.statistics import DEFAULT, SiteStatistics, wanted_parts
from lightning_noisy.monitoring.sums import Pooled, SiteSums
from lightning_noisy.monitoring.tensorboard import EDGES, histogram
from lightning_noisy.nn.recurrent import NoisyRecurrent
from lightning_noisy.nn.recurrent_cells import NoisyCell
from lightning_noisy.nn.registry import function_name
from lightning_noisy.replacement.recognition import FUNCTIONS, METHODS
from lightning_noisy.replacement.sites import ActivationSite, activation_sites

__all__ = ["ActivationRecorder"]

_Place = tuple[int, str]  # the id of an owner, and a key within it


class ActivationRecorder:
    """Measures each call of a model's activations, between :meth:`attach` and :meth:`detach`.

    In between, modules that are activations have forward hooks, calls of functions such as ``F.relu(x)`` are seen by a
    ``TorchFunctionMode`` and told apart by where they are in the code, and what is compiled runs eagerly. Else the
    model is as it was. Recording changes no values, gradients or running statistics of the model, and no random
    state. What activation checkpointing computes again isn't counted. An activation that can't be measured, such as one
    that isn't elementwise, is left out with a warning.

    Args:
        model: any module.
        sites: those of its call sites to record, with different names; by default all.
        statistics: what to record, of :data:`~lightning_noisy.monitoring.statistics.STATISTICS`.
        saturation_threshold: share of the function's largest slope below which an element is saturated, in (0, 1).
        histograms: count the pre-activations of each site by :data:`~lightning_noisy.monitoring.tensorboard.EDGES`.
        classes: gets the outputs of hidden sites.
        shards: by how many ranks the layers are split (tensor parallel), which each have units of their own.
        shard: which of them this rank is.

    Attributes:
        sites: what is recorded.
        unseen: the names of the sites that can't be seen, each with the reason.
        sums: since the last ``reset()``.
        histograms: the counts, shape (sites, bins), or None.
        called: the numbers of the sites that were called so far, in the order of their first calls.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> recorder = ActivationRecorder(model)
    >>> with recorder:
    ...     _ = model(torch.randn(8, 3))
    >>> sorted(tag for tag in recorder.compute() if tag.endswith("/1"))
    ['dead_units/1', 'r_score/1', 'rho/1', 'rho_prime/1', 'saturation/1', 'sparsity/1']
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[ActivationSite] | None = None,
        *,
        statistics: Sequence[str] = DEFAULT,
        saturation_threshold: float = 0.05,
        histograms: bool = False,
        classes: ClassWatch | None = None,
        shards: int = 1,
        shard: int = 0,
    ) -> None:
        self.sites: list[ActivationSite] = []
        self.unseen: dict[str, str] = {}
        self._threshold, self._wanted = saturation_threshold, wanted_parts(statistics)
        self._model, self._classes = model, classes
        self._places: dict[_Place, list[int]] = {}  # the numbers of the sites at each: one for each layer before it
        self._modules: dict[_Place, nn.Module] = {}
        self._of_module: dict[nn.Module, list[_Place]] = {}
        self._gates: dict[nn.Module, dict[str, int]] = {}  # of recurrent layers, by their names the sites
        self._attributes: dict[int, list[tuple[Any, _Place]]] = {}  # by owner: functions that torch's code calls
        self._calls = CallPlaces()
        self._measured: dict[Any, Measured] = {}
        self._unit_dims: list[int | None] = []
        here = set(model.modules())
        for site in activation_sites(model) if sites is None else sites:
            self._add(site, here)
        self._passes = [numbers for numbers in self._places.values() if len(numbers) > 1]
        device = next((each.device for each in model.parameters()), torch.device("cpu"))
        self.sums = SiteSums(len(self.sites), device=device, levels="level" in self._wanted, shards=shards, shard=shard)
        self._edges = EDGES.to(device)
        shape = len(self.sites), len(EDGES) - 1
        self.histograms = torch.zeros(shape, dtype=torch.long, device=device) if histograms else None
        self.called: dict[int, None] = {}
        self._was_called = np.zeros(len(self.sites), dtype=bool)  # on any rank
        self._statistics = SiteStatistics(self.sites, statistics)
        # While it is attached:
        self._handles: list[RemovableHandle] = []
        self._is_attached = False
        self._failed: set[int] = set()
        self._current: dict[int, int] = {}  # by the first site of a place, which of its sites the next call has
        self._turns: dict[tuple[nn.Module, _Place], int] = {}
        self._pending: dict[nn.Module, Callable[[Any], None] | None] = {}

    def _add(self, site: ActivationSite, here: set[nn.Module]) -> None:
        """Take in a site, unless it can't be seen."""
        if site.kind == "recurrent":
            self._add_recurrent(site)
            return
        owner = self._model.get_submodule(site.owner)
        place = id(owner), site.place
        number = len(self.sites)
        self.sites.append(replace(site, name=strip_wrappers(site.name)))  # the same name whatever is compiled
        self._unit_dims.append(unit_dim_at(self._model, site))
        if site.module is not None and site.module in here:
            if self._modules.setdefault(place, site.module) is not site.module:  # each pass has a module of its own
                place = id(owner), site.key
                self._modules[place] = site.module
            places = self._of_module.setdefault(site.module, [])
            if place not in places:
                places.append(place)
        elif site.call is None:
            self._attributes.setdefault(id(owner), []).append((owner.__dict__.get(site.key), place))
        if site.call is not None:
            self._calls.add(owner, site.call, is_module=site.module is not None and site.module in here)
        self._places.setdefault(place, []).append(number)

    def _add_recurrent(self, site: ActivationSite) -> None:
        """Take in the gates of a recurrent layer, as far as they can be computed again."""
        module = site.module
        assert module is not None
        if module in self._gates:
            return
        self._gates[module] = {}
        prefix = strip_wrappers(site.name)
        if isinstance(module, (NoisyRecurrent, NoisyCell)):
            for name, gate in module.gate_modules().items():
                number = self._gates[module][name] = len(self.sites)
                function = function_name(gate) or type(gate).__name__
                self.sites.append(replace(site, name=f"{prefix}.{name}".lstrip("."), function=function, module=gate))
                self._unit_dims.append(-1)
                if isinstance(module, NoisyCell):  # which calls them
                    place = id(module), name
                    self._places[place], self._modules[place] = [number], gate
                    self._of_module.setdefault(gate, []).append(place)
            return
        for name, function in gate_names(module).items():
            self._gates[module][name] = len(self.sites)
            self.sites.append(replace(site, name=f"{prefix}.{name}".lstrip("."), function=function, module=None))
            self._unit_dims.append(-1)
        if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
            self.unseen[site.name] = "of its layers behind a dropout the inputs aren't known"

    def attach(self) -> None:
        """Start recording; no effect if already attached."""
        if self._is_attached:
            return
        self._is_attached = True
        self._turns, self._pending, self._current = {}, {}, {}
        for module in self._of_module:
            if type(module).__module__ != nn.ReLU.__module__ or getattr(module, "inplace", False):
                self._handles.append(module.register_forward_pre_hook(Hook(self._before_module), with_kwargs=True))
                self._handles.append(module.register_forward_hook(Hook(self._after_module)))
            else:  # its input is still there after the call
                self._handles.append(module.register_forward_hook(Hook(self._around_module), with_kwargs=True))
        for module in self._gates:
            if isinstance(module, NoisyRecurrent):
                module.observers = (*module.observers, Hook(partial(self._observe, module)))
            elif not isinstance(module, NoisyCell):
                self._handles.append(module.register_forward_hook(Hook(self._after_recurrent), with_kwargs=True))
        for numbers in self._passes:
            for number in numbers:
                layer = self.sites[number].seen.layer
                follow = Hook(partial(self._follow, numbers[0], number))
                if layer is None:
                    self._handles.append(self._model.register_forward_pre_hook(follow))
                else:
                    self._handles.append(self._model.get_submodule(layer).register_forward_hook(follow))
        RunEagerly.start()
        if len(self._modules) < len(self._places):  # there are calls of functions
            FunctionCalls.start(self._before_call)

    def detach(self) -> None:
        """Stop recording, and leave the model as it was; no effect if not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._pending.clear()
        for module in self._gates:
            if isinstance(module, NoisyRecurrent):
                module.observers = tuple(
                    each for each in module.observers if not (isinstance(each, Hook) and each.calls(self))
                )
        if self._is_attached:
            self._is_attached = False
            RunEagerly.stop()
            FunctionCalls.stop(self._before_call)

    def __enter__(self) -> ActivationRecorder:
        self.attach()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Start anew."""
        self.sums.reset()
        if self.histograms is not None:
            self.histograms.zero_()

    @property
    def scored(self) -> int:
        """How many sites the ANAct score sums over."""
        return self._statistics.scored

    def pooled(
        self, reduce: Callable[[Tensor], Tensor] | None = None, extra: Mapping[str, Tensor] | None = None
    ) -> Pooled:
        """The sums of all ranks, with others beside them; see :meth:`SiteSums.pooled`."""
        beside = {**self._statistics.state(self.sums.table), **(extra or {})}
        if self.histograms is not None:
            beside["histograms"] = self.histograms
        return self.sums.pooled(reduce, beside)

    def compute(self, pooled: Pooled | None = None) -> dict[str, float]:
        """The statistics of the sites that were called so far, ``<statistic>/<site>``; NaN where undefined.

        Args:
            pooled: the sums of all ranks; by default those of this process.
        """
        pooled = self.pooled() if pooled is None else pooled
        self._was_called |= pooled.columns["count"] > 0
        return self._statistics.values(pooled, self._was_called)

    def _follow(self, place: int, number: int, *_: Any) -> None:
        self._current[place] = number

    def _before_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook: measure the input of a module."""
        if is_repeated():
            return
        places = self._of_module[module]
        place = places[0] if len(places) == 1 else self._place_of_shared(module, places, inspect.currentframe())
        values = [*args, *kwargs.values()]
        self._pending[module] = self._start(self._site_at(place), values, partial(_itself, module))

    def _place_of_shared(self, module: nn.Module, places: list[_Place], frame: FrameType | None) -> _Place:
        """Which of its places calls a module."""
        start = frame
        while frame is not None:  # up to the module that calls it
            names = frame.f_code.co_varnames if frame.f_code.co_argcount else ()
            owner = id(frame.f_locals.get(names[0])) if names else 0
            if theirs := [place for place in places if place[0] == owner]:
                places = theirs
                break
            frame = frame.f_back
        if len(places) == 1:
            return places[0]
        function = self.sites[self._places[places[0]][0]].function
        found = self._calls.find(start, function, is_module=True)
        if found in places:
            return found
        turn = self._turns[module, places[0]] = self._turns.get((module, places[0]), -1) + 1
        return places[turn % len(places)]  # a container calls one after the other

    def _after_module(self, module: nn.Module, _: Any, output: Any) -> None:
        """Hook: measure the output of a module."""
        finish = self._pending.pop(module, None)
        if finish is not None:
            finish(output)

    def _around_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: measure the input and the output of a module."""
        self._before_module(module, args, kwargs)
        self._after_module(module, args, output)

    def _observe(self, layer: nn.Module, name: str, gate: nn.Module, h: Tensor, y: Tensor) -> None:
        """Measure a gate of a recurrent layer, all steps of a call."""
        if not is_repeated():
            finish = self._start(self._gates[layer][name], [h], partial(_itself, gate))
            if finish is not None:
                finish(y)

    def _after_recurrent(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Hook: measure the gates of a recurrent layer."""
        numbers = self._gates[module]
        if is_repeated() or next(iter(numbers.values())) in self._failed:
            return
        try:
            with without_overrides(), torch.no_grad():
                for name, h in gates(module, (*args, *kwargs.values()), output):
                    function = getattr(F, self.sites[numbers[name]].function)
                    finish = self._start(numbers[name], [h], partial(_itself, function))
                    if finish is not None:
                        finish(function(h))
        except Exception as error:
            self._leave_out(next(iter(numbers.values())), error)

    def _before_call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], caller: FrameType | None
    ) -> Callable[[Any], None] | None:
        """Measure the input of a function that is called."""
        if is_repeated():
            return None
        name = (FUNCTIONS.get(function) or METHODS[function.__name__])[0]
        place = self._calls.find(caller, name, is_module=False)
        if place is None and self._attributes:
            place = self._held(function, caller)
        if place is None or place in self._modules or place not in self._places:
            return None
        rest = {name: value for name, value in kwargs.items() if name not in ("input", "inplace")}
        options = tuple(value for value in args[1:] if value is not True or not is_in_place(function, args, kwargs))

        def elementwise() -> tuple[Any, Callable[[Tensor], Tensor]]:
            plain = getattr(F, name)
            if not options and not rest:
                return name, plain
            return (name, options, tuple(rest.items())), lambda x: plain(x, *options, **rest)

        return self._start(self._site_at(place), [args[0] if args else kwargs["input"]], elementwise)

    def _held(self, function: Callable[..., Any], frame: FrameType | None) -> _Place | None:
        """The place of a function that a module of torch holds as an attribute, and calls in its own code."""
        while frame is not None:
            names = frame.f_code.co_varnames
            owner = frame.f_locals.get("self") if names and names[0] == "self" else None
            if isinstance(owner, nn.Module):
                held = self._attributes.get(id(owner), [])
                return next((place for each, place in held if each is function), None)
            frame = frame.f_back
        return None

    def _site_at(self, place: _Place) -> int:
        numbers = self._places[place]
        return self._current.get(numbers[0], numbers[0])

    def _start(
        self, number: int, values: list[Any], function: Callable[[], tuple[Any, Callable[[Tensor], Tensor]]]
    ) -> Callable[[Any], None] | None:
        """Measure an input; returns what measures the output."""
        if number in self._failed:
            return None
        try:
            with torch.no_grad(), without_overrides():
                if len(values) != 1:
                    raise ValueError(f"it has {len(values)} inputs")
                h = local(values[0])
                if h.numel() == 0:
                    return None
                unit_dim = clipped(self._unit_dims[number], h.dim())
                key, elementwise = function()
                measured = self._measured.get(key)
                if measured is None:
                    measured = Measured(elementwise, threshold=self._threshold, wanted=self._wanted)
                    if len(self._measured) < 10_000:  # options may differ in every call
                        self._measured[key] = measured
                with full_precision(h):
                    sums = measured.before(h, unit_dim)
                    if self.histograms is not None:
                        self.histograms[number] += histogram(h, self._edges)
                return partial(self._finish, number, measured, sums, h.shape, unit_dim)
        except Exception as error:  # a user's module may raise anything; recording must not end the training
            self._leave_out(number, error)
            return None

    @torch.no_grad()
    def _finish(
        self, number: int, measured: Measured, sums: Sums, shape: torch.Size, unit_dim: int, output: Any
    ) -> None:
        """Measure an output, and add the call."""
        try:
            with without_overrides():
                y = local(output)
                if y.shape != shape:
                    raise ValueError(f"its output has the shape {tuple(y.shape)}, its input {tuple(shape)}")
                with full_precision(y):
                    measured.after(y, sums, unit_dim)
                self.sums.add(number, sums, sums.alive, sums.levels)
                if self._classes is not None and self.sites[number].role in ("hidden", "residual"):
                    self._classes.add(number, y, unit_dim)
            self.called[number] = None
            if "gradients" in self._wanted and output.requires_grad:
                output.register_hook(partial(self._add_gradient, number))
        except Exception as error:
            self._leave_out(number, error)

    @torch.no_grad()
    def _add_gradient(self, number: int, gradient: Tensor) -> None:
        own = local(gradient).double()
        self.sums.add(number, {"graded": float(own.numel()), "gradients": own.square().sum()})

    def _leave_out(self, number: int, error: Exception) -> None:
        self._failed.add(number)
        name = self.sites[number].name
        warnings.warn(f"The activation {name!r} can't be measured, and is left out: {error}", stacklevel=2)


def _itself(function: Callable[[Tensor], Tensor]) -> tuple[Any, Callable[[Tensor], Tensor]]:
    return function, function
