"""Operations as torch.library has them: flat for the dispatcher, with the tuples of the contract for Python.

What `torch.library.custom_op` and `register_autograd` do, at half their cost a call, and without a flat list of the
arguments: the schema follows from the annotations of the Python function.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("ser_fast", "FRAGMENT")


class Operator(Generic[P, R]):
    """torch.ops.ser_fast.NAME, called like the Python function that implements it on every device.

    Args:
        function: takes NamedTuples of tensors and plain values, tensors, and plain values, and returns new tensors. Its
            name, without underscores in front, is the operator's. It runs without autocast and is never traced.
        fake: like function, but returns empty tensors, from shapes alone.
    """

    def __init__(self, function: Callable[P, R], fake: Callable[P, R]) -> None:
        name = self._name = function.__name__.lstrip("_")
        run, shape = cast(Callable[..., R], function), cast(Callable[..., R], fake)
        signature = inspect.signature(function)
        self._arguments = [parameter.annotation for parameter in signature.parameters.values()]
        schema = torch.library.infer_schema(_with_signature(self._parameters(signature), signature), mutates_args=())
        _library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
        self._op = getattr(torch.ops.ser_fast, name).default
        _library.impl(name, self._implementation(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"ser_fast::{name}", lambda *flat: shape(*self._structured(flat)), lib=_library)
        self._linear = False
        self._function = self._autograd_function(name, None, None)
        _library.impl(name, self._autograd_kernel, "Autograd")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._op(*_flat(args))

    def differentiable(
        self,
        save: Callable[..., None],
        gradient: Callable[..., tuple[Tensor | None, ...]],
        *,
        linear: bool = False,
    ) -> None:
        """Make the operator differentiable.

        Args:
            save: (ctx, output, *arguments), as setup_context of torch.library.register_autograd.
            gradient: (ctx, *gradients of the outputs) to the gradients of the first flat arguments; the others have
                none. The first output's gradient is a tensor, the only one: other outputs are for the backward pass.
            linear: the operator is linear in its first argument, and so is its own derivative in forward mode; others
                refuse that mode.
        """
        self._linear = linear
        self._function = self._autograd_function(self._name, save, gradient)

    def _parameters(self, signature: inspect.Signature) -> list[inspect.Parameter]:
        """One for each field of each tuple, and for each other argument."""
        flat: list[inspect.Parameter] = []
        for name, parameter in signature.parameters.items():
            fields = _fields(parameter.annotation)
            for field, annotation in (fields or {name: parameter.annotation}).items():
                flat.append(inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation))
        return flat

    def _structured(self, flat: tuple[Any, ...]) -> list[Any]:
        """The arguments of the Python function, from those of the operator."""
        arguments, at = [], 0
        for kind in self._arguments:
            count = len(_fields(kind))
            arguments.append(kind(*flat[at : at + count]) if count else flat[at])
            at += count or 1
        return arguments

    def _implementation(self, function: Callable[..., R]) -> Callable[..., R]:
        def run(*flat: Any) -> R:
            device = flat[0].device.type
            if torch.is_autocast_enabled(device):  # which would round the products of the oracle to half precision
                with torch.autocast(device, enabled=False):
                    return function(*self._structured(flat))
            return function(*self._structured(flat))

        untraced: list[Callable[..., R]] = []

        def kernel(*flat: Any) -> R:
            """`run`, kept from torch.compile where a compiled frame reaches it in eager mode; _dynamo loads slowly."""
            if "torch._dynamo" not in sys.modules:
                return run(*flat)
            if not untraced:
                untraced.append(torch.compiler.disable(run))
            return untraced[0](*flat)

        return kernel

    def _autograd_kernel(self, *flat: Any) -> Any:
        if forward_ad._current_level >= 0:  # forward-mode differentiation is going on: torch.func.jvp, dual_level
            tangents = [forward_ad.unpack_dual(x).tangent if isinstance(x, Tensor) else None for x in flat]
            if any(tangent is not None for tangent in tangents):
                return self._forward_mode(flat, tangents)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in flat):
            return self._function.apply(*flat)
        with torch._C._AutoDispatchBelowAutograd():
            return self._op(*flat)

    def _forward_mode(self, flat: tuple[Any, ...], tangents: list[Tensor | None]) -> Any:
        first, *others = tangents
        if not self._linear or first is None or any(tangent is not None for tangent in others):
            raise RuntimeError(f"{self._name} has no derivative in forward mode (jvp): take it in reverse mode (vjp)")
        rest = flat[1:]
        return forward_ad.make_dual(self._op(forward_ad.unpack_dual(flat[0]).primal, *rest), self._op(first, *rest))

    def _autograd_function(
        self, name: str, save: Callable[..., None] | None, gradient: Callable[..., tuple[Tensor | None, ...]] | None
    ) -> Any:
        def forward(ctx: Any, *flat: Any) -> Any:
            ctx.set_materialize_grads(False)  # outputs that are not differentiable may be large
            ctx.count = len(flat)
            with torch._C._AutoDispatchBelowAutograd():
                output = self._op(*flat)
            if save is not None:
                save(ctx, output, *self._structured(flat))
            return output

        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            if gradient is None:
                raise RuntimeError(f"{name} has no derivative: what it computes can be differentiated once")
            found = () if gradients[0] is None else gradient(ctx, *gradients)
            return (*found, *(None,) * (ctx.count - len(found)))

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"{name}_autograd", (torch.autograd.Function,), methods)


def differentiable_once(name: str, gradient: Tensor) -> Tensor:
    """`gradient`, whose own derivative raises: kernels made it, and to autograd it would be a constant.

    It comes from an output of the operator, so that autograd finds the way from it to the inputs, and raises on it.
    """
    if not gradient.requires_grad:
        return gradient
    refuse = torch._C._functions.DelayedError(f"{name} has no second derivative: it can be differentiated once", 1)
    return refuse(gradient)


def save_arguments(ctx: Any, arguments: tuple[Any, ...], *more: Tensor) -> None:
    """Keep a NamedTuple of arguments, and tensors, for `saved_arguments` in the backward pass."""
    ctx.arguments = type(arguments), [None if isinstance(value, Tensor) else value for value in arguments]
    ctx.save_for_backward(*(value for value in arguments if isinstance(value, Tensor)), *more)


def saved_arguments(ctx: Any) -> tuple[Any, ...]:
    """The NamedTuple and the tensors that `save_arguments` kept."""
    kind, values = ctx.arguments
    tensors = iter(ctx.saved_tensors)
    arguments = kind(*(next(tensors) if value is None else value for value in values))
    return arguments, *tensors


def _fields(kind: Any) -> dict[str, Any]:
    """The annotations of a NamedTuple by field; none of another type."""
    return kind.__annotations__ if hasattr(kind, "_fields") else {}


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments:
        if hasattr(argument, "_fields"):
            flat.extend(argument)
        else:
            flat.append(argument)
    return flat


def _with_signature(parameters: list[inspect.Parameter], signature: inspect.Signature) -> Callable[..., Any]:
    def flat() -> None: ...

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat
