"""The usual way to run an ensemble of masks, to compare with: the inputs are repeated n times, and nothing later."""

from __future__ import annotations

from torch import fx

from masksurgery.layers import Members, Repeat, _Masksembles, repeat_targets
from masksurgery.model import ConvertedModel
from masksurgery.types import TraceError


def repeat_inputs(model: ConvertedModel) -> fx.GraphModule:
    """The graph of a converted model in eval, with repeats at its inputs alone.

    Every layer, mask and the head are the model's own modules; each of them sees all n*b rows.

    Args:
        model: In eval mode. It is not changed.
    Returns:
        A module that takes what the converted model takes, and predicts the same to rounding.
    Raises:
        TraceError: The model is in training mode.
    """
    if model.training:
        raise TraceError(f"{type(model).__name__} is in training mode, and has no head there. Call model.eval() first.")
    graph = fx.Graph()
    graph.output(graph.graph_copy(model.graph, {}))
    module = fx.GraphModule(model, graph, type(model).__name__).eval()
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        called = module.get_submodule(str(node.target))
        if isinstance(called, Members):
            _repeat_placeholders(graph, node, model)
        elif isinstance(called, Repeat):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif isinstance(called, _Masksembles):
            node.kwargs = {}  # without `expand`: its input has n*b rows already
    graph.lint()
    module.recompile()
    return module


def _repeat_placeholders(graph: fx.Graph, members: fx.Node, model: ConvertedModel) -> None:
    """Let all but the root node read repeated inputs."""
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        if node.target not in model.settings.unbatched:
            with graph.inserting_after(members):
                repeated = graph.call_function(repeat_targets, (node, model.surgery.n))
            node.replace_all_uses_with(repeated, lambda user, own=(members, repeated): user not in own)
