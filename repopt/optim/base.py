"""What all RepOptimizers share: multipliers, state, and the choice of how a step is computed."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from repopt.csla import GradMult
from repopt.errors import UserError, unknown
from repopt.optim.bundles import Bundles
from repopt.optim.compiled import CompiledUpdate, CompileError, in_layout_of
from repopt.optim.shards import local, local_gradient, local_mult
from repopt.optim.update import FROM_SCALER, Hyper, Place, Rule, State, Task, check_degree, eager_update

logger = logging.getLogger("repopt")

NamedParams = Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Implementation = Literal["auto", "compiled", "eager"]

COMPILE_FROM = 2**22  # multiplied entries; with fewer, compiling takes longer than it saves in a short training


class _Known(NamedTuple):
    """A parameter's place, and by what is seen that it still is there: its memory, and that of its state."""

    at: tuple[Any, ...]
    place: Place


class _Counted(NamedTuple):
    """A group's step numbers as they were last counted, by identity and version, and for each the first equal one."""

    now: list[tuple[int, int]]
    leaders: list[Tensor]


class RepOptimizer(torch.optim.Optimizer):
    """An elementwise update rule whose gradients are re-parameterized by constants (Rule of Iteration).

    A subclass is a rule: it states its degree of homogeneity, the state it keeps, and its direction. What it states is
    checked: a rule that is not elementwise, or of another degree, is refused.

    Args:
        params: named parameters, as ``model.named_parameters()`` or groups of them (`repopt.param_groups`) give them.
        defaults: the hyper-parameters of the groups that do not set their own.
        grad_mults: by parameter name, of the rule's degree; the other parameters are updated plainly. A group that is
            added later brings its own under the key "grad_mults".
        implementation: "compiled" is one function for the whole step, made by torch.compile; "eager" takes one
            parameter after the other; "auto" is compiled from 4 M multiplied entries on. Where compiling fails, a
            warning says so, and steps are eager. A parameter's first step, in which its state is made, is eager.

    Raises:
        UserError: negative hyper-parameters, parameters without names, multipliers for names or shapes that are not
            among the parameters or of another degree, or a rule that breaks the equivalence.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True  # by which GradScaler knows it

    degree: ClassVar[int]
    counts_steps: ClassVar[bool] = False
    at_first: ClassVar[Hyper] = {}  # constants that differ in a parameter's first step

    def __init__(
        self,
        params: NamedParams,
        defaults: dict[str, Any],
        grad_mults: Mapping[str, GradMult],
        implementation: Implementation,
    ) -> None:
        for name, value in defaults.items():
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if any(isinstance(number, (int, float, Tensor)) and not number >= 0 for number in numbers):
                raise UserError(f"{name} of an optimizer is not negative: {value}")
        if implementation not in get_args(Implementation):
            raise unknown("implementation", implementation, get_args(Implementation))
        self.implementation = implementation
        self._rule = Rule(self.direction, self.degree)
        self._constants = tuple(name for name in defaults if name != "lr")
        self._mults: dict[Tensor, tuple[str, GradMult]] = {}
        self._forget()
        self._unclaimed = dict(grad_mults)
        super().__init__(params, defaults)
        refuse_unclaimed(self._unclaimed)

    @abstractmethod
    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the tensors that the rule keeps, shaped like the parameter and zero at first."""

    @staticmethod
    @abstractmethod
    def direction(gradient: Tensor, state: State, hyper: Hyper) -> Tensor:
        """What is subtracted, times the learning rate. Updates `state` in place and leaves `gradient` alone."""

    @staticmethod
    def corrections(step: Any, group: dict[str, Any]) -> dict[str, Any]:
        """What `direction` reads that depends on the number of the step, from 1 on: a number, or a tensor of one."""
        return {}

    @property
    def grad_mults(self) -> dict[str, GradMult]:
        """The multipliers by parameter name."""
        return dict(self._mults.values())

    def multiplier_bytes(self) -> int:
        """Memory that the multipliers take, with the copies and layouts made of them, in bytes."""
        mults = [mult for _, mult in self._mults.values()]
        mults += [known.place.mult for known in self._places.values() if known.place.mult is not None]
        tensors = [tensor for mult in mults for tensor in mult.tensors()]
        tensors += self._compiled_update.tensors()
        return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; "grad_mults" are the multipliers of the group's parameters."""
        group = dict(param_group)
        own = group.pop("grad_mults", None)
        mults = self._unclaimed if own is None else dict(own)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            self.check_group(group)
            if any(param.is_complex() for param in group["params"]):
                raise UserError("a RepOptimizer takes real parameters, not complex ones")
            hyper = group | self.corrections(1.0, group)
            check_degree(type(self).__name__, self._rule, self.state_names(group), hyper)
            found = {}
            if mults:
                found = {param: (name, mults.pop(name)) for name, param in _named(group) if name in mults}
            if own is not None:
                refuse_unclaimed(mults)
            for param, (name, mult) in found.items():
                self._check(name, param, mult)
        except UserError:
            self.param_groups.pop()
            raise
        self._mults |= found

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuse hyper-parameters of a group, given or loaded, that break the equivalence or are not followed here."""
        if group.get("maximize"):
            raise UserError("a RepOptimizer minimizes: maximize=True is not followed")

    def _check(self, name: str, param: Tensor, mult: GradMult) -> None:
        if param.shape != mult.shape:
            raise UserError(f"the Grad Mult of {name!r} is for {tuple(mult.shape)}, not {tuple(param.shape)}")
        if mult.degree != self.degree:
            raise UserError(
                f"the Grad Mult of {name!r} is for update rules of degree {mult.degree}, and {type(self).__name__} has "
                f"degree {self.degree}: repopt.grad_mults(model, scales, degree={self.degree})"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; a state of the plain rule fits.

        Raises:
            UserError: the state names other parameters, or the same in another order; or it is of a rule that is not
            followed here (it maximizes, or adds the decay to a gradient that is normalised).
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            self.check_group(saved)
            for own, other in zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False):
                if own != other:
                    raise UserError(f"the optimizer's state is of other parameters: it has {other!r} where {own!r} is")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, as `torch.optim.Optimizer.step`.

        A `torch.amp.GradScaler` (or a training loop) says by the attributes ``found_inf`` and ``grad_scale``, as
        to torch's fused optimizers, whether it is skipped; on a GPU nothing waits for the answer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        said = {name: value for name in FROM_SCALER if (value := getattr(self, name, None)) is not None}
        if "found_inf" in said:
            said["found_inf"] = said["found_inf"] > 0
            if _on_host(said["found_inf"]) and said.pop("found_inf"):
                return loss
        first, tasks = [], []
        for group in self.param_groups:
            constants = {name: _hashable(group[name]) for name in self._constants}
            names = self.state_names(group)
            params = [param for param in group["params"] if param.grad is not None]
            places = [self._place(param, names) for param in params]
            scalars_of = self._scalars(params, group, said)
            for param, (is_first, place), scalars in zip(params, places, scalars_of, strict=True):
                if place.param.numel():  # a process may have nothing of a small parameter
                    task = Task(place, local_gradient(param), constants, scalars)
                    (first if is_first else tasks).append(task)
        eager_update(self._rule, [task._replace(constants={**task.constants, **self.at_first}) for task in first])
        tasks = self._bundles.gather(tasks)
        if tasks and self._compiles():
            tasks = self._compiled(tasks)
        eager_update(self._rule, tasks)
        self._bundles.scatter()
        return loss

    def _place(self, param: Tensor, names: tuple[str, ...]) -> tuple[bool, Place]:
        """Where a parameter's update happens, and whether it is its first; the state that is missing is made."""
        if param.grad.is_sparse:
            raise UserError("a RepOptimizer takes dense gradients, not sparse ones")
        state, here = self.state[param], local(param)
        known = self._places.get(param)
        if known is not None and known.at == _memory(here, names, state):
            return False, known.place
        missing = [name for name in names if state.get(name) is None]
        for name in names:
            state[name] = torch.zeros_like(param) if name in missing else in_layout_of(param, state[name])
        mult = None
        if param in self._mults:
            name, mult = self._mults[param]
            mult = local_mult(name, param, mult).to_like(here)
        place = Place(here, mult, {name: local(state[name]) for name in names})
        self._places[param] = _Known(_memory(here, names, state), place)
        return bool(missing), place

    def _scalars(self, params: list[Tensor], group: dict[str, Any], said: dict[str, Tensor]) -> list[Hyper]:
        """What changes from step to step, for each parameter; counts their steps.

        Parameters that have taken equally many steps share one object.
        """
        common = {"lr": group["lr"], **said}
        if not self.counts_steps or not params:
            return [common] * len(params)
        skips = said.get("found_inf")
        on_device = group.get("capturable", False) or skips is not None  # only the device knows whether a step counts
        steps = [self._step_number(param, on_device) for param in params]
        if on_device:
            leaders = self._leaders(id(group), steps)
            # A list, for with a single tensor the host would wait for its value.
            torch._foreach_add_(steps, 1 if skips is None else [(~skips).float()] * len(steps))
            keys = [id(leader) for leader in leaders]
            numbers = {key: leader.double() for key, leader in dict(zip(keys, leaders, strict=True)).items()}
        else:
            torch._foreach_add_(steps, 1)
            keys = [step.item() for step in steps]
            numbers = dict(zip(keys, keys, strict=True))
        shared = {key: {**common, **self.corrections(number, group)} for key, number in numbers.items()}
        return [shared[key] for key in keys]

    def _step_number(self, param: Tensor, on_device: bool) -> Tensor:
        """How many steps a parameter has taken, as torch.optim keeps it: float32, on its device or the CPU."""
        state, device = self.state[param], param.device if on_device else torch.device("cpu")
        step = state.get("step")
        if not isinstance(step, Tensor) or step.device != device:
            step = state["step"] = torch.as_tensor(step or 0.0, dtype=torch.float32, device=device)
        return step

    def _leaders(self, group: int, steps: list[Tensor]) -> list[Tensor]:
        """For each step number the first on its device that equals it.

        The host waits for their values once, and again where parameters or numbers are others than in the group's last
        step: what is equal and counted together stays equal.
        """
        now = [(id(step), step._version) for step in steps]
        known = self._counted.get(group)
        if known is None or known.now != now:
            first: dict[tuple[torch.device, float], Tensor] = {}
            known = _Counted(now, [first.setdefault((step.device, step.item()), step) for step in steps])
        # The count that follows makes another version of each.
        self._counted[group] = known._replace(now=[(key, version + 1) for key, version in now])
        return known.leaders

    def _compiles(self) -> bool:
        if self.implementation == "auto":
            entries = sum(param.numel() for param in self._mults)
            self.implementation = "compiled" if entries >= COMPILE_FROM else "eager"
        return self.implementation == "compiled"

    def _compiled(self, tasks: list[Task]) -> list[Task]:
        """Do the tasks by the compiled implementation; what is left to do eagerly."""
        try:
            left = self._compiled_update(tasks)
        except CompileError as error:
            logger.warning(f"{type(self).__name__}: not compiled any more, so steps are eager and slower: {error}")
            self.implementation = "eager"
            return tasks
        if left and not self._warned:
            self._warned = True
            logger.warning(
                f"{type(self).__name__}: parameters are neither contiguous nor channels_last, so their steps are "
                f"eager and slower: {len(left)}, the first of the shape {tuple(left[0].place.param.shape)}"
            )
        return left

    def _forget(self) -> None:
        """Drop what is derived and made again when it is needed."""
        self._places: dict[Tensor, _Known] = {}
        self._counted: dict[int, _Counted] = {}
        self._bundles = Bundles()
        self._compiled_update = CompiledUpdate(self._rule)
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "_mults": self._mults,
            "_rule": self._rule,
            "_constants": self._constants,
            "_unclaimed": {},
            "implementation": self.implementation,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state of the plain rule may lack some
            for name in self._constants:
                group.setdefault(name, self.defaults[name])
        self._forget()


def _memory(param: Tensor, names: tuple[str, ...], state: dict[str, Any]) -> tuple[Any, ...]:
    """Where and how a parameter and its state lie in memory."""
    tensors = [param, *(local(state[name]) for name in names if state.get(name) is not None)]
    return names, *((tensor.data_ptr(), tensor.stride(), tensor.dtype) for tensor in tensors)


def _hashable(value: Any) -> Any:
    """Return a constant as what is the same can be compiled once: betas may come as a list, from a file say."""
    return tuple(value) if isinstance(value, list) else value


def _on_host(answer: Tensor) -> bool:
    return answer.device.type == "cpu"


def _named(group: dict[str, Any]) -> Iterable[tuple[str, Tensor]]:
    if "param_names" not in group:
        raise UserError("a RepOptimizer takes named parameters: model.named_parameters() or repopt.param_groups")
    return zip(group["param_names"], group["params"], strict=True)


def refuse_unclaimed(mults: Mapping[str, GradMult]) -> None:
    """UserError where multipliers are left over that no parameter has taken."""
    if mults:
        raise UserError(f"there is a Grad Mult for {next(iter(mults))!r}, but no parameter of that name")
