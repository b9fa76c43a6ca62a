"""From the name of an activation, as written in YAML, to the module."""

import importlib

from torch import nn

from lightning_altmin.nn.staircase import Heaviside, Sign

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "sign": Sign,
    "softplus": nn.Softplus,
    "step": Heaviside,
    "tanh": nn.Tanh,
}


def activation_class(activation: str | type[nn.Module]) -> type[nn.Module]:
    """Return the class an ``activation`` argument stands for.

    Args:
        activation: A short name (a key of ``ACTIVATIONS``), the class path of an ``nn.Module`` that can be built
            without arguments (``"torch.nn.ReLU6"``), or such a class itself.

    Raises:
        TypeError: If ``activation`` is neither a string nor a module class, or its class cannot be built without
            arguments.
        ValueError: If the name is unknown or the class path leads to no module class.
    """
    found = _named_class(activation) if isinstance(activation, str) else activation
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise TypeError(
            f"activation must be a name, a class path or a subclass of torch.nn.Module, got {activation!r}"
            + (f"; pass the class {type(found).__name__} itself" if isinstance(found, nn.Module) else "")
        )
    try:
        found()
    except TypeError as error:
        raise TypeError(
            f"activation {activation!r} cannot be built without arguments ({error}); subclass it with defaults"
        ) from error
    return found


def _named_class(name: str) -> object:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    module_name, dot, class_name = name.rpartition(".")
    if not dot:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation {name!r} is unknown; give one of {known}, or a class path such as torch.nn.ReLU6")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"activation {name!r} is not the path of a class that can be imported: {error}") from error
