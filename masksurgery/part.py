"""Part: a module with masks, in the place of one that a forward calls which torch.fx cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.example import Example
from masksurgery.graphs import TwoGraphs, make_empty
from masksurgery.inputs import placeholder_values
from masksurgery.opaque import Opaque
from masksurgery.types import LayoutError


class Part(TwoGraphs):
    """It is also an instance of the class of the module that it replaces, and has everything that module has."""

    _base_type: type[nn.Module]
    _form: Example

    def _bases(self) -> tuple[type, ...]:
        return (Part, self._base_type)

    def recompile(self) -> Any:
        """Generate `forward`, which takes what the replaced module's took: the code wants just the inputs."""
        code = super().recompile()
        run = type(self).forward

        def forward(self: Part, *args: Any, **kwargs: Any) -> Any:
            return run(self, **self._inputs(args, kwargs))

        type(self).forward = forward  # type: ignore[method-assign]
        return code

    def _inputs(self, args: Any, kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(self._base_type.forward).bind(self, *args, **kwargs)
        given = inspect.BoundArguments(bound.signature, dict(list(bound.arguments.items())[1:]))  # type: ignore[arg-type]
        values = placeholder_values(given, integers=True)
        expected = self._form.values[0]
        constants = [_constants(bound.arguments, values) for bound in (given, self._form.bound)]
        if values.keys() != expected.keys() or constants[0] != constants[1]:
            raise LayoutError(
                f"{self._base_type.__name__} was converted for inputs {sorted(expected)} and {constants[1]}, and is "
                f"called with {sorted(values)} and {constants[0]}. Convert with example_inputs that lead to this call."
            )
        return values


def _constants(arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The plain arguments that are no inputs, and not None."""
    plain = (bool, int, float, str)
    return {
        name: value
        for name, value in arguments.items()
        if name not in inputs and value is not None and all(isinstance(leaf, plain) for leaf in tree_leaves(value))
    }


def replace_by_part(
    root: nn.Module,
    module: nn.Module,
    graphs: tuple[fx.Graph, fx.Graph],
    modules: Mapping[str, nn.Module],
    form: Example,
) -> None:
    """Put a part in the place of a module, wherever it stands in `root`.

    Args:
        root: The module that holds it; changed.
        module: What to replace. The part shares its state.
        graphs: Of eval and of training, rewritten.
        modules: What the graphs call beside the children of the module.
        form: What one forward of it takes.
    """
    part: Part = make_empty((Part, type(module)), type(module).__name__)
    fresh = fx.GraphModule(nn.Module(), fx.Graph())
    part.__dict__.update({name: value for name, value in vars(fresh).items() if name not in ("_graph", "_code")})
    part.__dict__.update(vars(module))
    part._base_type, part._form = type(module), form
    for name, added in modules.items():
        part.add_module(name, added.train(module.training))
    part._set_graphs(*graphs)
    for owner in [*root.modules(), *(m.model for m in root.modules() if isinstance(m, Opaque))]:
        for name, child in owner._modules.items():
            if child is module:
                owner._modules[name] = part
