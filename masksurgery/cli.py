"""The command line: `masksurgery demo`, `inspect`, `convert`, `finetune`, `evaluate`, `predict`, `pack` and others."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from masksurgery.cli_bench import bench
from masksurgery.cli_evaluate import demo, evaluate
from masksurgery.cli_export import export
from masksurgery.cli_finetune import finetune
from masksurgery.cli_pack import pack
from masksurgery.options import (
    After,
    Directory,
    Exclude,
    Heads,
    ImgSize,
    InChans,
    Include,
    Model,
    ModelKwargs,
    MultipleOf,
    N,
    NumClasses,
    OneLineErrors,
    Scale,
    Task,
    Tie,
    TrainMode,
    Trust,
    Where,
    check_files,
    check_output,
    check_settings,
    parse_object,
    place_of,
)
from masksurgery.types import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from masksurgery.factory import Recipe
    from masksurgery.model import ConvertedModel

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave too little of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)


def main() -> None:
    """The console entry point."""
    app(prog_name="masksurgery")


def _version(asked: bool) -> None:
    if asked:
        from masksurgery import __version__

        typer.echo(f"masksurgery {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained model into an ensemble that knows how sure it is."""
    if context.invoked_subcommand is None and (text := context.get_help()):  # empty where rich has printed it
        typer.echo(text)


def _convert(name: str, settings: dict[str, Any], **arguments: Any) -> tuple[nn.Module, ConvertedModel, Recipe]:
    """The base model by name, and what becomes of it."""
    import masksurgery
    from masksurgery.factory import create_base
    from masksurgery.tables import quiet_hub, step

    with quiet_hub(), step(f"Building {name}", live=not arguments["pretrained"]):  # a download has a bar of its own
        base, recipe, inputs = create_base(name, **arguments)
    with step(f"Converting {name}"):
        return base, masksurgery.convert(base, example_inputs=inputs, **settings), recipe


# --- the commands ----------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    n: N = 4,
    scale: Scale = 2.0,
    where: Where = "all",
    after: After = None,
    include: Include = None,
    exclude: Exclude = None,
    tie: Tie = None,
    multiple_of: MultipleOf = 1,
    heads: Heads = False,
    task: Task = "classification",
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    img_size: ImgSize = None,
    model_kwargs: ModelKwargs = None,
) -> None:
    """Show what would be masked, what not and why, and what it costs. Needs no weights and writes nothing."""
    cheaper = {"tie": tie, "multiple_of": multiple_of, "heads": heads}
    settings = check_settings(n, scale, where, after, include, exclude, task, **cheaper)
    kwargs = parse_object(model_kwargs)
    from masksurgery.macs import conversion_macs
    from masksurgery.tables import inspection, out, step

    base, converted, _ = _convert(
        model, settings, pretrained=False, num_classes=num_classes, in_chans=in_chans, img_size=img_size,
        model_kwargs=kwargs,
    )  # fmt: skip
    with step("Counting multiply-adds"):
        macs = conversion_macs(base, converted)
    if as_json:
        record = {"model": model, "where": where, "task": task, **converted.surgery.to_dict(), "macs": macs.to_dict()}
        typer.echo(json.dumps(record, indent=2))
    else:
        out().print(inspection(model, converted.surgery, macs))


@app.command()
def convert(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder to write.")],
    n: N = 4,
    scale: Scale = 2.0,
    where: Where = "all",
    after: After = None,
    include: Include = None,
    exclude: Exclude = None,
    tie: Tie = None,
    multiple_of: MultipleOf = 1,
    heads: Heads = False,
    task: Task = "classification",
    train_mode: TrainMode = "split",
    no_rescale: Annotated[bool, typer.Option("--no-rescale", help="Do not divide by the kept share.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="For the masks.")] = 0,
    pretrained: Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Or random weights.")] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="FILE", exists=True, dir_okay=False, help=".safetensors or .pth"),
    ] = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    img_size: ImgSize = None,
    model_kwargs: ModelKwargs = None,
    verify: Annotated[bool, typer.Option("--verify", help="Prove the result in float64.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Convert a model into an ensemble, and save it in a folder."""
    more = {"tie": tie, "multiple_of": multiple_of, "heads": heads}
    more |= {"train_mode": train_mode, "rescale": not no_rescale, "seed": seed}
    settings = check_settings(n, scale, where, after, include, exclude, task, **more)
    kwargs = parse_object(model_kwargs)
    check_output(output, force)
    from masksurgery.checkpoint import save
    from masksurgery.images import readable
    from masksurgery.macs import conversion_macs
    from masksurgery.tables import out, step, summary

    base, converted, recipe = _convert(
        model, settings, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes, in_chans=in_chans,
        img_size=img_size, model_kwargs=kwargs,
    )  # fmt: skip
    converted.recipe = recipe.to_dict()
    proof = _verify(base, converted) if verify else None
    with step(f"Writing {output}"):
        macs = conversion_macs(base, converted)
        save(converted, output, force=force)
    out().print(summary(model, readable(output), converted.surgery, macs, proof))
    is_trained = num_classes is None and (pretrained or checkpoint is not None)
    out().print(_next_step(converted, output, is_trained), soft_wrap=True)  # a command stays in one line


def _verify(base: nn.Module, converted: ConvertedModel) -> str:
    """Compare double-precision copies on random inputs, and say what was found."""
    import copy

    import torch
    from torch.utils._pytree import tree_map

    import masksurgery
    from masksurgery.copying import copy_module
    from masksurgery.macs import sample_inputs
    from masksurgery.tables import step

    generator = torch.Generator().manual_seed(0)

    def randomise(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64)

    bound = sample_inputs(base, converted, 2)
    args, kwargs = tree_map(randomise, (list(bound.args), dict(bound.kwargs)))
    with step("Verifying every member in float64"):
        twin, model = copy_module(base).double(), copy.deepcopy(converted).double()
        found = masksurgery.verify(model, twin, *args, **kwargs)
    routes = ", ".join(f"{count} by {route}" for route, count in found.routes.items())
    return f"relative error {found.relative:.1e} in float64; masks checked {routes}"


def _next_step(model: ConvertedModel, directory: Path, is_trained: bool) -> str:
    """What to do with the folder; without masks inside the network a model that is trained can be used as it is."""
    from masksurgery.images import image_input, readable

    name = readable(directory)
    masked = model.settings.where == "all"
    why = "Masks inside the network change what it computes:\nfine-tune it before you use its predictions.\n"
    try:
        image_input(model)
    except ConfigError:
        return f"{why if masked else ''}Next, in Python: model = masksurgery.load({name!r})"
    trust = "--trust " if (model.recipe or {}).get("source") == "factory" else ""
    if masked or not is_trained:
        return f"{why if masked else ''}Next: masksurgery finetune {trust}{shlex.quote(name)} --data FOLDER -o tuned"
    return f"Next: masksurgery predict {trust}{shlex.quote(name)} photo.jpg"


app.command()(finetune)  # here, so that help lists the commands in the order of their use
app.command()(evaluate)


@app.command()
def predict(
    directory: Directory,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", show_default=False, help="Images or folders.")],
    topk: Annotated[int, typer.Option("--topk", min=1, help="Labels for each image.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write as JSON.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", dir_okay=False, help="Write as CSV.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Predict images, and say how sure each prediction is.

    For each label a mean and a standard deviation over the members, for each image the entropy and the mutual
    information in nats. Where the model has a threshold, an image that it is not sure enough of is "unsure"; what the
    answer would have been stands in brackets. Exit status 1 if an image could not be read.
    """
    from masksurgery.checkpoint import load
    from masksurgery.images import Broken, find_images
    from masksurgery.predict import predict_images, write_csv, write_json
    from masksurgery.tables import out, prediction_table, print_line, step, track

    check_files(json_file, csv_file)
    images = find_images(paths)
    with step(f"Loading {directory}"):
        model = load(place_of(directory), trust=trust)
    rows, broken = [], 0
    for result in track(predict_images(model, images, topk), len(images), "Predicting"):
        if isinstance(result, Broken):
            broken += 1
            print_line("error", result.reason)
        else:
            rows.append(result)
    if rows:
        out().print(prediction_table(rows))
    if json_file:
        write_json(rows, json_file)
    if csv_file:
        write_csv(rows, csv_file)
    if broken:
        raise typer.Exit(1)


app.command()(pack)
app.command()(bench)
app.command()(export)
