"""Branches that the optimizer holds: the model is plain, and any update rule follows the multi-branch network.

A block's branches enter the network through ``W = sum_k s_k A_k w_k`` alone, so the gradient G of the plain kernel has
all of theirs (`Block.branch_gradients`). A step derives them, lets the rule update kernels and scales as it would those
of the multi-branch network, and writes W. Nothing is asked of the rule: it may couple entries, layers, or all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from repopt.csla import Block
from repopt.errors import UserError
from repopt.optim.base import (
    OTHER_SCALES,
    Implementation,
    NamedParams,
    check_implementation,
    choose_implementation,
    give_up_compiling,
    named_in,
    replacement,
)
from repopt.optim.compiled import CompiledFunction, CompileError, in_layout_of
from repopt.optim.norm import clip_factor, plain_norm
from repopt.optim.sgd import RepSGD
from repopt.optim.shards import is_sharded
from repopt.optim.update import GRAD_SCALER_KEYS, step_unless
from repopt.optim.watch import GradientWatch, warn_of_kernels


@dataclass(eq=False)
class HeldBranches:
    """The branches of one plain kernel.

    Attributes:
        block: their declaration.
        kernels: w_k by the names of the declaration.
        scales: s_k, (O,) each, by name.
        searched: whether the scales are trained, as in a hyper-search; else they are constants.
    """

    block: Block
    kernels: dict[str, Tensor]
    scales: dict[str, Tensor]
    searched: bool

    def values(self, name: str) -> Tensor:
        """Return the kernel or scale of a declared name."""
        return (self.kernels | self.scales)[name]

    def trained(self) -> dict[str, Tensor]:
        """Return what the rule updates, by name: of one branch after the other the kernel, then the scale."""
        found: dict[str, Tensor] = {}
        for kernel, scale in self.block.names():
            found[kernel] = self.kernels[kernel]
            if self.searched and scale is not None:
                found[scale] = self.scales[scale]
        return found

    def undecayed(self) -> set[str]:
        """Return the names of what is not decayed: scales, and in a search the kernels whose declaration says so."""
        return {*self.scales, *self.block.undecayed(searched=self.searched)}

    def find(self, entry: str) -> tuple[Tensor | None, str]:
        """Return the kernel or scale that an entry of the plain kernel's state belongs to, and the rule's name for it.

        The name is empty where the entry is the kernel or scale itself; the tensor is None where there is none.
        """
        own, _, key = entry.partition("/")
        return (self.kernels | self.scales).get(own), key

    def merged(self) -> Tensor:
        """Return the plain kernel, (O, I, *k)."""
        return self.block.merge(self.kernels, self.scales)

    def gradients(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return the gradients of what is trained, by name, from that of the plain kernel."""
        like = next(iter(self.kernels.values()))
        found = self.block.branch_gradients(
            gradient.to(like.dtype), self.kernels, self.scales, with_scales=self.searched
        )
        return {name: _with_strides_of(self.values(name), value) for name, value in found.items()}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Set the gradients of what is trained, by name; None where there is none."""
        for name, tensor in self.trained().items():
            tensor.grad = gradients.get(name)


class BranchOptimizer(torch.optim.Optimizer):
    """Any update rule on the multi-branch network that a plain model stands for.

    Its groups are the model's own parameters, whose hyper-parameters (and schedulers' changes of them) hold for the
    branches, too: kernels are decayed as the plain kernel is, scales are not.

    Args:
        params: named parameters, as ``model.named_parameters()`` or groups of them (`repopt.param_groups`) give them.
        rule: ``rule(groups, **settings)`` is an optimizer: a class of torch.optim, or what is called like one.
        branches: by the names of the plain kernels; the other parameters are updated by the rule as they are. A group
            that is added later brings its own under the key "branches".
        max_norm: bound of the 2-norm over all gradients of the multi-branch network, to which they are clipped in every
            step; None = no clipping.
        order: names of all parameters, in the order in which the norm adds them up; None = that of the groups. In the
            model's order it is rounded as `torch.nn.utils.clip_grad_norm_` rounds that of the multi-branch network.
        implementation: how branches are merged and their gradients derived; as that of a `RepOptimizer`.
        settings: hyper-parameters of the rule.

    Attributes:
        branches: as given.
        norm: of the multi-branch network's gradients in the last step, before they were clipped; None without
            ``max_norm``. Nothing waits for the device.
        watch: as that of a `RepOptimizer`.

    Raises:
        UserError: parameters without names, or branches of names or shapes that are not among them.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # by which GradScaler knows it
    _inner: torch.optim.Optimizer

    def __init__(
        self,
        params: NamedParams,
        rule: Callable[..., torch.optim.Optimizer],
        branches: Mapping[str, HeldBranches],
        *,
        max_norm: float | None = None,
        order: Sequence[str] | None = None,
        implementation: Implementation = "auto",
        **settings: Any,
    ) -> None:
        self.branches: dict[str, HeldBranches] = {}
        self.max_norm = max_norm
        self.norm: Tensor | None = None
        self._rule, self._settings = rule, settings
        self._params: dict[str, Tensor] = {}  # of the model
        self._order = order
        self.implementation = check_implementation(implementation)
        self._compiled: dict[Callable[..., Any], CompiledFunction] = {}
        self._unclaimed: dict[str, HeldBranches] | None = dict(branches)
        super().__init__(params, {})
        _refuse_unclaimed(self._unclaimed)
        self._unclaimed = None
        self.watch = self._new_watch()
        self.defaults = self._inner.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does; "branches" are those of the group's kernels."""
        group = dict(param_group)
        own = group.pop("branches", None)
        later = self._unclaimed is None
        branches = (self._unclaimed or {}) if own is None else dict(own)
        super().add_param_group(group)
        group = self.param_groups[-1]
        if "param_names" not in group:
            self.param_groups.pop()
            raise UserError("a BranchOptimizer takes named parameters: model.named_parameters() or repopt.param_groups")
        found = {
            name: (param, branches.pop(name))
            for name, param in zip(group["param_names"], group["params"], strict=True)
            if name in branches
        }
        if own is not None:
            _refuse_unclaimed(branches)
        _refuse_sharded({name: param for name, (param, _) in found.items()})
        if later and own is None and self.branches:
            warn_of_kernels(group["params"], "branches")
        for name, (param, held) in found.items():
            if param.shape != held.block.target.shape:
                raise UserError(
                    f"the branches of {name!r} add up to {held.block.target.shape}, not {tuple(param.shape)}"
                )
            self.branches[name] = held
        self._params |= zip(group["param_names"], group["params"], strict=True)
        decayed, rest = self._inner_groups(group)
        if len(self.param_groups) == 1:
            self._inner = self._rule([decayed], **self._settings)
        else:
            self._inner.add_param_group(decayed)
        self._inner.add_param_group(rest)
        group.update(_hyper(self._inner.param_groups[-2]))
        if later:
            self.watch = self._new_watch()

    def _new_watch(self) -> GradientWatch:
        return GradientWatch({self._params[name]: name for name in self.branches})

    def _inner_groups(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the rule's two groups for one of ours: what has its weight decay, and what is not decayed."""
        decayed: list[Tensor] = []
        rest: list[Tensor] = []
        for name, param in zip(group["param_names"], group["params"], strict=True):
            held = self.branches.get(name)
            if held is None:
                decayed.append(param)
                continue
            without = held.undecayed()
            for own, tensor in held.trained().items():
                (rest if own in without else decayed).append(tensor)
        return _hyper(group) | {"params": decayed}, _hyper(group) | {"params": rest, "weight_decay": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of the multi-branch network, and write the plain kernels that it has then.

        A `torch.amp.GradScaler` (or a training loop) says by the attributes ``found_inf`` and ``grad_scale``, as to
        torch's fused optimizers, whether it is skipped. Where the rule knows them too, nothing waits for the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = (getattr(self, name, None) for name in GRAD_SCALER_KEYS)
        self._follow_replacements()
        self.watch.check(self)
        self._derive_gradients()
        gradients = {param: param.grad for param in self._trained() if param.grad is not None}
        if grad_scale is not None:
            scale_gradients([*gradients], 1 / grad_scale)
        if self.max_norm is not None:
            self.norm = plain_norm(gradients)
            scale_gradients([*gradients], clip_factor(self.norm, self.max_norm))
        self._step_rule(found_inf)
        for param, gradient in gradients.items():  # those of the model are as they were
            param.grad = gradient
        self._write_kernels([name for name in self.branches if self._params[name].grad is not None])
        for held in self.branches.values():
            held.set_gradients({})
        return loss

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Return the 2-norm over all gradients of the multi-branch network as they are now, a scalar tensor."""
        self._derive_gradients()
        norm = plain_norm(self._trained())
        for held in self.branches.values():
            held.set_gradients({})
        return norm

    def _follow_replacements(self) -> None:
        """Find the model's parameters again where others have been put into the groups in their places.

        Raises:
            UserError: neither names nor shapes tell which they are, or kernels with branches are sharded.
        """
        named = named_in(self.param_groups)
        if all(named.get(name) is param for name, param in self._params.items()):
            return
        new = {old: replacement(name, old, named, self._inner.state) for name, old in self._params.items()}
        _refuse_sharded({name: named[name] for name in self.branches})
        self._params = {name: new[old] for name, old in self._params.items()}
        for group in self._inner.param_groups:
            group["params"] = [new.get(param, param) for param in group["params"]]
        self.watch = self._new_watch()

    def _derive_gradients(self) -> None:
        """Give the branches their gradients, where the plain kernel has one."""
        names = [name for name in self.branches if self._params[name].grad is not None]
        params = [self._params[name] for name in names]
        plain = [in_layout_of(param, param.grad) for param in params if param.grad is not None]
        found = dict(zip(names, self._run(_derive, names, plain), strict=True))
        for name, held in self.branches.items():
            held.set_gradients(found.get(name, {}))

    def _write_kernels(self, names: Sequence[str]) -> None:
        self._run(_merge, names, [self._params[name] for name in names])

    def _run(self, function: Callable[..., Any], names: Sequence[str], tensors: list[Tensor]) -> Any:
        """Run a function of the branches of these kernels and of tensors of theirs, compiled where that pays."""
        held = [self.branches[name] for name in names]
        kernels = (self._params[name] for name in self.branches)
        self.implementation = choose_implementation(self.implementation, kernels)
        if self.implementation == "compiled" and held:
            if function not in self._compiled:
                options = _one_kernel_for_many() if tensors[0].device.type == "cuda" else {}
                self._compiled[function] = CompiledFunction(function, options)
            kinds = [(t.device, t.dtype, t.stride(), h.searched) for h, t in zip(held, tensors, strict=True)]
            try:
                return self._compiled[function]((*names, *kinds), held, tensors)
            except CompileError as error:
                self.implementation = give_up_compiling(self, error)
        return function(1, held, tensors)

    def _trained(self) -> Iterator[Tensor]:
        """Yield what the rule updates, in the order of the multi-branch network's parameters."""
        ordered = [name for name in self._order or () if name in self._params]
        for name in dict.fromkeys([*ordered, *self._params]):
            if name in self.branches:
                yield from self.branches[name].trained().values()
            else:
                yield self._params[name]

    def _step_rule(self, found_inf: Tensor | None) -> None:
        for group, (decayed, rest) in self._grouped():
            decayed.update(_hyper(group))
            rest.update(_hyper(group) | {"weight_decay": rest["weight_decay"]})
        step_unless(self._inner, found_inf)

    def _grouped(self) -> Iterator[tuple[dict[str, Any], tuple[dict[str, Any], ...]]]:
        """Yield every group with the two that the rule has for it."""
        return zip(self.param_groups, zip(*[iter(self._inner.param_groups)] * 2, strict=True), strict=True)

    @torch.no_grad()
    def write_kernels(self) -> None:
        """Write the plain kernels, W = sum_k s_k A_k w_k, where branches have been changed from outside."""
        self._write_kernels([*self.branches])

    def freeze_scales(self) -> None:
        """End the search: the scales are constants from now on, and all kernels go on with their state, decayed."""
        scales = {scale for held in self.branches.values() for scale in held.scales.values()}
        for held in self.branches.values():
            held.searched = False
        undecayed = {held.values(name) for held in self.branches.values() for name in held.undecayed()}  # and scales
        for _, (decayed, rest) in self._grouped():
            decayed["params"] += [param for param in rest["params"] if param not in undecayed]
            rest["params"] = [param for param in rest["params"] if param in undecayed - scales]
        for scale in scales:
            self._inner.state.pop(scale, None)

    @property
    def searching(self) -> bool:
        """Return whether scales are trained."""
        return any(held.searched for held in self.branches.values())

    def collapsed(self, *, implementation: Implementation = "auto") -> RepSGD:
        """Return the RepSGD that goes on from here, for which nothing of the branches is held but their multipliers.

        Kernels and momenta are merged by the same sum. With constant scales SGD is linear, so the path is the same.
        It clips as this does.

        Raises:
            UserError: the scales are still searched, or the rule is not SGD.
        """
        if not isinstance(self._inner, torch.optim.SGD):
            raise UserError(
                f"only SGD's branches can be merged with their state, not those of {type(self._inner).__name__}: under "
                "rules that normalise gradients, the state of the sum is not the sum of the states"
            )
        if self.searching:
            raise UserError("scales are searched still: freeze_scales() makes constants of them")
        mults = {
            name: held.block.grad_mult({own: s.detach().double() for own, s in held.scales.items()}, degree=1).to_like(
                self._params[name]
            )
            for name, held in self.branches.items()
        }
        taken = ("lr", "momentum", "weight_decay", "nesterov", "initial_lr", "lr_scale")
        groups = [
            {key: group[key] for key in taken if key in group}
            | {"dampening": float(group["dampening"])}  # torch's default is the integer 0
            | {"params": list(zip(group["param_names"], group["params"], strict=True))}
            for group in self.param_groups
        ]
        plain = RepSGD(groups, grad_mults=mults, implementation=implementation)
        for name, param in ((n, p) for group in groups for n, p in group["params"]):
            buffers = self._momenta(name, param)
            if buffers is not None:
                plain.state[param]["momentum_buffer"] = buffers
        return plain.clip_to(self.max_norm)

    def _momenta(self, name: str, param: Tensor) -> Tensor | None:
        held = self.branches.get(name)
        if held is None:
            return self._inner.state.get(param, {}).get("momentum_buffer")
        momenta = {
            own: self._inner.state.get(kernel, {}).get("momentum_buffer") for own, kernel in held.kernels.items()
        }
        if any(momentum is None for momentum in momenta.values()):
            return None
        return held.block.merge(momenta, held.scales).detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the groups, and by parameter the rule's state; a plain kernel's holds its branches and theirs."""
        return self.pack(self._inner.state, [decayed for _, (decayed, _) in self._grouped()])

    def pack(self, of_rule: Mapping[Tensor, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a state dict of what a rule keeps of the multi-branch network's parameters, and in their groups."""
        self.state.clear()
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                held = self.branches.get(name)
                state = dict(of_rule.get(param, {})) if held is None else {}
                for own, tensor in () if held is None else (held.kernels | held.scales).items():
                    state[own] = tensor.detach()
                    state |= {f"{own}/{key}": value for key, value in of_rule.get(tensor, {}).items()}
                if state:
                    self.state[param] = state
        content = super().state_dict()
        self.state.clear()
        for saved, own_group, of_rules in zip(content["param_groups"], self.param_groups, groups, strict=True):
            saved["rule"] = {key: value for key, value in _hyper(of_rules).items() if key not in own_group}
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, and write the plain kernels.

        Raises:
            UserError: the state is of other parameters or branches.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        own_of_rule = [group.pop("rule", {}) for group in groups]
        super().load_state_dict({"state": {}, "param_groups": groups})
        names = [name for group in self.param_groups for name in group["param_names"]]
        states = {
            name: state_dict["state"].get(index, {})
            for name, index in zip(names, (i for group in groups for i in group["params"]), strict=True)
        }
        of_rule: dict[Tensor, dict[str, Any]] = {}
        for name, param in self._params.items():
            held = self.branches.get(name)
            if held is None:
                of_rule[param] = states[name]
                continue
            for own, tensor in (held.kernels | held.scales).items():
                if own not in states[name] or states[name][own].shape != tensor.shape:
                    raise UserError(
                        f"the optimizer's state lacks the branch {own!r} of {name!r}, or it has another shape"
                    )
                if (
                    own in held.scales
                    and not held.searched
                    and not torch.allclose(tensor, states[name][own].to(tensor), rtol=1e-5, atol=0)
                ):
                    raise UserError(OTHER_SCALES)
                tensor.copy_(states[name][own])
                prefix = f"{own}/"
                of_rule[tensor] = {
                    key.removeprefix(prefix): value for key, value in states[name].items() if key.startswith(prefix)
                }
        inner = self._inner.state_dict() | {"state": {}}
        for number, group in enumerate(inner["param_groups"]):
            group.update(copy.deepcopy(own_of_rule[number // 2]))
        for saved, group in zip(inner["param_groups"], self._inner.param_groups, strict=True):
            indices = zip(saved["params"], group["params"], strict=True)
            inner["state"] |= {index: of_rule[param] for index, param in indices if of_rule[param]}
        self._inner.load_state_dict(inner)
        self.write_kernels()

    def __getstate__(self) -> dict[str, Any]:
        public = ("branches", "implementation", "max_norm", "norm")
        private = ("_rule", "_settings", "_params", "_order", "_inner", "_unclaimed")
        kept = {name: getattr(self, name) for name in (*public, *private)}
        return super().__getstate__() | kept | {"_compiled": {}}  # made again when it is needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.watch = self._new_watch()


def _with_strides_of(param: Tensor, gradient: Tensor) -> Tensor:
    """Return a gradient with its parameter's strides, as torch's fused optimizers want it."""
    gradient = in_layout_of(param, gradient)
    return gradient if gradient.stride() == param.stride() else gradient.as_strided(param.shape, param.stride())


def _derive(program: int, held: Sequence[HeldBranches], gradients: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    assert program > 0  # see `CompiledFunction`
    return [branches.gradients(gradient) for branches, gradient in zip(held, gradients, strict=True)]


def _merge(program: int, held: Sequence[HeldBranches], kernels: Sequence[Tensor]) -> None:
    assert program > 0
    for branches, kernel in zip(held, kernels, strict=True):
        kernel.copy_(branches.merged())


def _one_kernel_for_many() -> dict[str, Any]:
    """Return the options of torch.compile by which the branches of many kernels share a launch."""
    options: dict[str, Any] = {"combo_kernels": True}
    if "combo_kernel_max_num_nodes" in torch._inductor.list_options():  # not in every torch
        options["combo_kernel_max_num_nodes"] = 64
    return options


def scale_gradients(params: Sequence[Tensor], factor: Tensor) -> None:
    """Give parameters new gradients: theirs times a number, which may be on another device."""
    on_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        on_device.setdefault(param.device, []).append(param)
    for device, members in on_device.items():
        scaled = torch._foreach_mul([param.grad for param in members if param.grad is not None], factor.to(device))
        for param, gradient in zip(members, scaled, strict=True):
            param.grad = gradient


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _refuse_sharded(kernels: Mapping[str, Tensor]) -> None:
    for name, kernel in kernels.items():
        if is_sharded(kernel):
            raise UserError(
                f"{name!r} is spread over processes, and a BranchOptimizer holds whole branches: train with DDP, or by "
                "constant scales, whose RepOptimizers take FSDP2's parameters"
            )


def _refuse_unclaimed(branches: Mapping[str, HeldBranches]) -> None:
    if branches:
        raise UserError(f"there are branches for {next(iter(branches))!r}, but no parameter of that name")
