"""What all RepOptimizers share: multipliers, state, and the choice of how a step is computed."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from typing_extensions import override

from repopt.csla import GradMap, Multiplier
from repopt.errors import UserError, unknown
from repopt.optim.compiled import CompiledUpdate, CompileError, in_layout_of
from repopt.optim.flat import FlatParams
from repopt.optim.norm import clip_factor, multi_branch_norm
from repopt.optim.shards import is_sharded, local, local_gradient, local_mult
from repopt.optim.update import GRAD_SCALER_KEYS, Hyper, ParamSlot, ParamUpdate, Rule, State, check_degree, eager_update
from repopt.optim.watch import GradientWatch, warn_of_kernels

logger = logging.getLogger("repopt")

NamedParams = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Implementation = Literal["auto", "compiled", "eager"]
Memory = tuple[Any, ...]

FINGERPRINT = "fingerprint of grad_mults"  # key of a saved group
OTHER_SCALES = (
    "the optimizer's state is of a training with other scales: go on with those that it began with, or begin anew "
    "without the state"
)
COMPILE_FROM = 2**22  # multiplied entries; with fewer, compiling takes longer than it saves in a short training


class RepOptimizer(torch.optim.Optimizer):
    """An elementwise update rule whose gradients are re-parameterized by constants (Rule of Iteration).

    A subclass is a rule: it states its degree of homogeneity, the state it keeps, and how it computes an update. What
    it states is checked: a rule that is not elementwise, or of another degree, is refused.

    Args:
        params: named parameters, as ``model.named_parameters()`` or groups of them (`repopt.param_groups`) give them.
        defaults: the hyper-parameters of the groups that do not set their own.
        grad_mults: by parameter name, of the rule's degree; the other parameters are updated plainly. A group that is
            added later brings its own under the key "grad_mults".
        implementation: "compiled" is one function for the whole step, made by torch.compile; "eager" takes one
            parameter after the other; "auto" is compiled from 4 M multiplied entries on. Where compiling fails, a
            warning says so, and steps are eager. A parameter's first step, in which its state is made, is eager.

    Attributes:
        max_norm: see `clip_to`; None without clipping. It may be changed at any time.
        norm: of the multi-branch network's gradients in the last step, before they were clipped; None without clipping.
        watch: warns of gradients that something else has changed before a step.

    Raises:
        UserError: negative hyper-parameters, parameters without names, multipliers for names or shapes that are not
            among the parameters or of another degree, or a rule that breaks the equivalence.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # by which GradScaler knows it

    degree: ClassVar[int]
    uses_step: ClassVar[bool] = False
    first_step_overrides: ClassVar[Hyper] = {}  # constants that differ in a parameter's first step
    _warned = False  # that some steps are not compiled

    def __init__(
        self,
        params: NamedParams,
        defaults: dict[str, Any],
        grad_mults: Mapping[str, Multiplier],
        implementation: Implementation,
    ) -> None:
        for name, value in defaults.items():
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if any(isinstance(number, (int, float, Tensor)) and not number >= 0 for number in numbers):
                raise UserError(f"{name} of an optimizer is not negative: {value}")
        self.implementation = check_implementation(implementation)
        self._rule = Rule(self.compute_update, self.degree)
        self._constants = tuple(name for name in defaults if name != "lr")
        self._mults: dict[Tensor, tuple[str, Multiplier]] = {}
        self._reset_caches()
        self._unmatched_mults: dict[str, Multiplier] | None = dict(grad_mults)
        self.max_norm: float | None = None
        self.norm: Tensor | None = None
        self._norm_mults: Mapping[str, Multiplier] | None = None  # of degree 1; None = the optimizer's own
        super().__init__(params, defaults)
        check_all_matched(self._unmatched_mults, named_in(self.param_groups))
        self._unmatched_mults = None
        self.watch = self._new_watch()

    @abstractmethod
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the tensors that the rule keeps, shaped like the parameter and zero at first."""

    @staticmethod
    @abstractmethod
    def compute_update(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """Return what is subtracted, times the learning rate; update `state` in place and leave `gradient` alone."""

    @staticmethod
    def corrections(step: Any, group: dict[str, Any]) -> dict[str, Any]:
        """Return what `compute_update` reads that depends on the number of the step, from 1 on, or a tensor of it."""
        return {}

    @property
    def grad_mults(self) -> dict[str, Multiplier]:
        """Return the multipliers by parameter name."""
        return dict(self._mults.values())

    def clip_to(self, max_norm: float | None, grad_mults: Mapping[str, Multiplier] | None = None) -> Self:
        """Clip in every step, after a closure and any unscaling, as `repopt.clip_grad_norm_` would before it.

        The gradients themselves stay as they are.

        Args:
            max_norm: bound of the 2-norm over all gradients of the multi-branch network; None = no clipping.
            grad_mults: of degree 1 (`repopt.grad_mults`); None = the optimizer's own, where it is of that degree.

        Returns:
            The optimizer.

        Raises:
            UserError: multipliers of another degree, or of other parameters.
        """
        if grad_mults is not None:
            check_norm_mults(grad_mults, named_in(self.param_groups))
        self.max_norm, self.norm, self._norm_mults = max_norm, None, grad_mults
        if max_norm is not None:
            self._mults_of_norm()
        return self

    def grad_norm(self) -> Tensor:
        """Return the 2-norm over all gradients of the multi-branch network as they are now, a scalar tensor.

        Raises:
            UserError: the multipliers of degree 1 are not known (`clip_to`).
        """
        return multi_branch_norm(params_in(self.param_groups), self._mults_of_norm())

    def _mults_of_norm(self) -> Mapping[str, Multiplier]:
        own = self.grad_mults
        mults = own if self._norm_mults is None else self._norm_mults
        check_norm_mults(mults, mults)
        if missing := own.keys() - mults.keys():
            raise UserError(f"the norm lacks the multiplier of {min(missing)!r}: give clip_to those of all kernels")
        return mults

    def multiplier_bytes(self) -> int:
        """Return the memory that the multipliers take, with the copies and layouts made of them, in bytes."""
        slots = [slot for _, slot in self._slots.values()]
        maps = [slot.grad_map for slot in slots if slot.grad_map is not None]
        mults = [*(mult for _, mult in self._mults.values()), *maps, *(self._norm_mults or {}).values()]
        mults += [slot.mult for slot in slots if slot.mult is not None]
        tensors = [tensor for mult in mults for tensor in mult.tensors()] + self._compiled_update.tensors()
        tensors += [grad_map.matrices for grad_map in maps if grad_map.matrices is not None]
        tensors += [slot.scratch for slot in slots if slot.scratch is not None]
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do; its "grad_mults" are the multipliers of the group's parameters."""
        group = dict(param_group)
        own = group.pop("grad_mults", None)
        later = self._unmatched_mults is None
        mults = (self._unmatched_mults or {}) if own is None else dict(own)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            if any(param.is_complex() for param in group["params"]):
                raise UserError("a RepOptimizer takes real parameters, not complex ones")
            hyper = group | self.corrections(1.0, group)
            check_degree(type(self).__name__, self._rule, self.state_names(group), hyper)
            if mults and "param_names" not in group:
                raise UserError(
                    "a RepOptimizer takes named parameters: model.named_parameters() or repopt.param_groups"
                )
            named = zip(group["param_names"], group["params"], strict=True) if mults else ()
            found = {param: (name, mults.pop(name)) for name, param in named if name in mults}
            if own is not None:
                check_all_matched(mults, group["param_names"])
            for param, (name, mult) in found.items():
                self._check_mult(name, param, mult)
        except UserError:
            self.param_groups.pop()
            raise
        if later and own is None and self._mults:
            warn_of_kernels(group["params"], "grad_mults")
        self._mults |= found
        if later:
            self.watch = self._new_watch()

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters of a group, given or loaded, that break the equivalence or are not followed here."""
        if group.get("maximize"):
            raise UserError("a RepOptimizer minimizes: maximize=True is not followed")

    def _check_mult(self, name: str, param: Tensor, mult: Multiplier) -> None:
        if param.shape != mult.shape:
            raise UserError(f"the Grad Mult of {name!r} is for {tuple(mult.shape)}, not {tuple(param.shape)}")
        if mult.degree != self.degree:
            raise UserError(
                f"the Grad Mult of {name!r} is for update rules of degree {mult.degree}, and {type(self).__name__} has "
                f"degree {self.degree}: repopt.grad_mults(model, scales, degree={self.degree})"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of the plain rule, whose groups say by a number which multipliers it was made with."""
        content = super().state_dict()
        for group, saved in zip(self.param_groups, content["param_groups"], strict=True):
            if mults := self._mults_of(group):
                saved[FINGERPRINT] = sum(map(fingerprint, mults))
        return content

    def _mults_of(self, group: dict[str, Any]) -> list[Multiplier]:
        return [self._mults[param][1] for param in group["params"] if param in self._mults]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `torch.optim.Optimizer.load_state_dict` does; one of the plain rule fits.

        Raises:
            UserError: the state names other parameters, or the same in another order; it was made with other
            multipliers; or it is of a rule that is not followed here (it maximizes, or adds the decay to a gradient
            that is normalised).
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group, saved in zip(self.param_groups, groups, strict=False):
            before, mults = saved.pop(FINGERPRINT, None), self._mults_of(group)
            if before is not None and mults and not math.isclose(before, sum(map(fingerprint, mults)), rel_tol=1e-5):
                raise UserError(OTHER_SCALES)
            self.check_group(saved)
            for own, other in zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False):
                if own != other:
                    raise UserError(f"the optimizer's state is of other parameters: it has {other!r} where {own!r} is")
        super().load_state_dict({**state_dict, "param_groups": groups})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step, as `torch.optim.Optimizer.step`.

        A `torch.amp.GradScaler` (or a training loop) says by the attributes ``found_inf`` and ``grad_scale``, as
        to torch's fused optimizers, whether it is skipped; on a GPU nothing waits for the answer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        amp_flags = {name: value for name in GRAD_SCALER_KEYS if (value := getattr(self, name, None)) is not None}
        self._follow_replacements()
        self.watch.check(self)
        if self.max_norm is not None:
            amp_flags["grad_scale"] = self._scale_to_clip(self.max_norm, amp_flags.get("grad_scale"))
        if "found_inf" in amp_flags:
            amp_flags["found_inf"] = amp_flags["found_inf"] > 0
            if _on_host(amp_flags["found_inf"]) and amp_flags.pop("found_inf"):
                return loss
        first: list[ParamUpdate] = []
        updates: list[ParamUpdate] = []
        for group in self.param_groups:
            constants = {name: group[name] for name in self._constants}  # hashed, and betas of a file may be a list
            constants = {name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
            names = self.state_names(group)
            params = [param for param in group["params"] if param.grad is not None]
            slots = [self._slot(param, names) for param in params]
            scalars_of = self._scalars(params, group, amp_flags)
            for param, (is_first, slot), scalars in zip(params, slots, scalars_of, strict=True):
                if slot.param.numel():  # a process may have nothing of a small parameter
                    own = {**constants, **self.first_step_overrides} if is_first else constants
                    gradient = local_gradient(param)
                    if slot.grad_map is not None:
                        gradient = slot.grad_map(gradient, slot.scratch)
                    (first if is_first else updates).append(ParamUpdate(slot, gradient, own, scalars))
        eager_update(self._rule, first)
        updates = self._flat_params.flatten(updates)
        if updates and self._compiles():
            updates = self._compiled(updates)
        eager_update(self._rule, updates)
        self._flat_params.unflatten()
        return loss

    def _scale_to_clip(self, max_norm: float, scale: Tensor | None) -> Tensor:
        """Return what the gradients are divided by, so that they are neither scaled by `scale` nor above `max_norm`."""
        norm = self.grad_norm()
        self.norm = norm if scale is None else norm / scale
        factor = clip_factor(self.norm, max_norm)
        return 1 / factor if scale is None else scale / factor

    def _follow_replacements(self) -> None:
        """Find the multipliers' parameters again where others have been put into the groups in their places.

        Raises:
            UserError: neither names nor shapes tell which they are: a step without a multiplier would be a plain one.
        """
        here = {param for group in self.param_groups for param in group["params"]}
        if self._mults.keys() <= here:
            return
        named, found = named_in(self.param_groups), {}
        for old, (name, mult) in self._mults.items():
            found[replacement(name, old, named, self.state)] = name, mult
        self._mults = found
        self._reset_caches()

    def _slot(self, param: Tensor, names: tuple[str, ...]) -> tuple[bool, ParamSlot]:
        """Return whether it is a parameter's first update, and its slot; the state that is missing is made."""
        if param.grad is not None and param.grad.is_sparse:
            raise UserError("a RepOptimizer takes dense gradients, not sparse ones")
        state, here = self.state[param], local(param)
        memory, slot = self._slots.get(param, (None, None))
        if slot is not None and memory == _memory(here, names, state):
            return False, slot
        missing = [name for name in names if state.get(name) is None]
        for name in names:
            state[name] = torch.zeros_like(param) if name in missing else in_layout_of(param, state[name])
        mult = None
        if param in self._mults:
            name, mult = self._mults[param]
            mult = local_mult(name, param, mult).to_like(here)
        of_state = {name: local(state[name]) for name in names}
        if isinstance(mult, GradMap):
            on_cpu = here.device.type == "cpu" and here.dtype == mult.coefficients.dtype
            slot = ParamSlot(here, None, of_state, mult, torch.empty(here.shape, dtype=here.dtype) if on_cpu else None)
        else:
            slot = ParamSlot(here, mult, of_state)
        self._slots[param] = _memory(here, names, state), slot
        return bool(missing), slot

    def _scalars(self, params: list[Tensor], group: dict[str, Any], amp_flags: dict[str, Tensor]) -> list[Hyper]:
        """Count the parameters' steps, and return for each what changes from step to step.

        Parameters that have taken equally many steps share one object.
        """
        common = {"lr": group["lr"], **amp_flags}
        if not self.uses_step or not params:
            return [common] * len(params)
        skips = amp_flags.get("found_inf")
        on_device = group.get("capturable", False) or skips is not None  # only the device knows whether a step counts
        steps = [self._step_number(param, on_device) for param in params]
        if on_device:
            leaders = self._leaders(id(group), steps)
            # A list, for with a single tensor the host would wait for its value.
            torch._foreach_add_(steps, 1 if skips is None else [(~skips).float()] * len(steps))
            doubles = {leader: leader.double() for leader in dict.fromkeys(leaders)}  # tensors are keys by identity
            shared = {leader: {**common, **self.corrections(step, group)} for leader, step in doubles.items()}
            return [shared[leader] for leader in leaders]
        torch._foreach_add_(steps, 1)
        numbers = [step.item() for step in steps]
        of_number = {number: {**common, **self.corrections(number, group)} for number in dict.fromkeys(numbers)}
        return [of_number[number] for number in numbers]

    def _step_number(self, param: Tensor, on_device: bool) -> Tensor:
        """Return how many steps a parameter has taken, as torch.optim keeps it: float32, on its device or the CPU."""
        state, device = self.state[param], param.device if on_device else torch.device("cpu")
        step = state.get("step")
        if not isinstance(step, Tensor) or step.device != device:
            step = state["step"] = torch.as_tensor(step or 0.0, dtype=torch.float32, device=device)
        return step

    def _leaders(self, group: int, steps: list[Tensor]) -> list[Tensor]:
        """Return for each step number the first on its device that equals it.

        The host waits for their values once, and again where parameters or numbers are others than in the group's last
        step: what is equal and counted together stays equal.
        """
        now = [(id(step), step._version) for step in steps]
        counted, leaders = self._counted.get(group, (None, []))
        if counted != now:
            first: dict[tuple[torch.device, float], Tensor] = {}
            leaders = [first.setdefault((step.device, step.item()), step) for step in steps]
        # The count that follows makes another version of each.
        self._counted[group] = [(key, version + 1) for key, version in now], leaders
        return leaders

    def _compiles(self) -> bool:
        self.implementation = choose_implementation(self.implementation, self._mults)
        return self.implementation == "compiled"

    def _compiled(self, updates: list[ParamUpdate]) -> list[ParamUpdate]:
        """Do the updates by the compiled implementation, and return what is left to do eagerly."""
        try:
            left = self._compiled_update(updates)
        except CompileError as error:
            self.implementation = give_up_compiling(self, error)
            return updates
        if left and not self._warned:
            self._warned = True
            logger.warning(
                f"{type(self).__name__}: parameters are neither contiguous nor channels_last, so their steps are "
                f"eager and slower: {len(left)}, the first of the shape {tuple(left[0].slot.param.shape)}"
            )
        return left

    def _reset_caches(self) -> None:
        """Drop what is derived and made again when it is needed."""
        self._slots: dict[Tensor, tuple[Memory, ParamSlot]] = {}
        self._counted: dict[int, tuple[list[tuple[int, int]], list[Tensor]]] = {}  # group -> identities, versions
        self._flat_params = FlatParams()
        self._compiled_update = CompiledUpdate(self._rule)
        self._warned = False
        self.watch = self._new_watch()

    def _new_watch(self) -> GradientWatch:
        return GradientWatch({param: name for param, (name, _) in self._mults.items()})

    def __getstate__(self) -> dict[str, Any]:
        clip = ("max_norm", "norm", "_norm_mults")
        kept = ("_mults", "_rule", "_constants", "_unmatched_mults", "implementation", *clip)
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of the plain rule may lack some
            for name in self._constants:
                group.setdefault(name, self.defaults[name])
        self._reset_caches()


def fingerprint(mult: Multiplier) -> float:
    """Return a number that tells multipliers apart, whatever device and precision they are on: a weighted sum."""
    flat = torch.cat([tensor.detach().double().cpu().flatten() for tensor in mult.tensors()])
    return float(flat @ (2 + torch.arange(1, len(flat) + 1, dtype=torch.float64).cos()))


def params_in(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters of an optimizer's groups with the names that they were given with, "" without one."""
    for group in groups:
        names, params = group.get("param_names", ()), group["params"]
        yield from zip(names if len(names) == len(params) else [""] * len(params), params, strict=True)


def named_in(groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the parameters of an optimizer's groups by name, as far as they have names."""
    return {name: param for name, param in params_in(groups) if name}


def replacement(name: str, old: Tensor, named: Mapping[str, Tensor], state: MutableMapping[Tensor, Any]) -> Tensor:
    """Return what an optimizer's groups hold in a parameter's place, which takes over its state.

    Raises:
        UserError: nothing of that name and shape.
    """
    new = named.get(name)
    if new is None or new.shape != old.shape:
        raise UserError(
            f"the optimizer's groups have lost {name!r}: what was put into its place is not of its name and shape (a "
            "flat partition of ZeRO or FSDP1, say). Shard with FSDP2's fully_shard, or train with DDP"
        )
    if new is not old and old in state and not is_sharded(new):
        state[new] = state.pop(old)
    return new


def check_implementation(name: Implementation) -> Implementation:
    """Return the name of an implementation; raise UserError where it is none."""
    if name not in get_args(Implementation):
        raise unknown("implementation", name, get_args(Implementation))
    return name


def choose_implementation(name: Implementation, kernels: Iterable[Tensor]) -> Implementation:
    """Return the implementation that "auto" means for these kernels, and any other as it is."""
    if name != "auto":
        return name
    return "compiled" if sum(kernel.numel() for kernel in kernels) >= COMPILE_FROM else "eager"


def give_up_compiling(optimizer: torch.optim.Optimizer, error: CompileError) -> Implementation:
    """Return the implementation that is left where compiling has failed, with a warning that says so."""
    logger.warning(f"{type(optimizer).__name__}: not compiled any more, so steps are eager and slower: {error}")
    return "eager"


def _memory(param: Tensor, names: tuple[str, ...], state: dict[str, Any]) -> Memory:
    """Return where and how a parameter and its state lie in memory."""
    tensors = [param, *(local(state[name]) for name in names if state.get(name) is not None)]
    return names, *((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in tensors)


def _on_host(answer: Tensor) -> bool:
    return answer.device.type == "cpu"


def check_norm_mults(mults: Mapping[str, Multiplier], names: Iterable[str]) -> None:
    """Raise UserError where multipliers are not those of the norm (degree 1), or not of these parameters."""
    if any(mult.degree != 1 for mult in mults.values()):
        raise UserError(
            "clipping takes the multipliers of degree 1, whatever the optimizer's degree: "
            "repopt.grad_mults(model, scales, degree=1)"
        )
    known = set(names)
    check_all_matched({name: mult for name, mult in mults.items() if name not in known}, known)


def check_all_matched(mults: Mapping[str, Multiplier], names: Iterable[str]) -> None:
    """Raise UserError where multipliers are left over that none of the named parameters has taken."""
    for name in mults:
        wrapped = next((other for other in names if other.endswith(f".{name}")), None)
        hint = f": {wrapped!r} is of a wrapper, so give the names of the model inside" if wrapped else ""
        raise UserError(f"there is a Grad Mult for {name!r}, but no parameter of that name{hint}")
