"""The commands `evaluate` and `demo`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from masksurgery.data import DataConfig
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.options import Task, Trust, check_files, is_main_process
from masksurgery.processes import require
from masksurgery.settings_options import pick, with_settings


def _output(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="FILE", dir_okay=False, help=what)


@with_settings(DataConfig, EvaluateConfig)
def evaluate(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR",
            show_default=False,
            help="Folders that convert, finetune or timm wrote, timm names, hf-hub:..., torchvision:...",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            show_default=False,
            help="As for finetune, with the same options: the part that finetune validates on is evaluated.",
        ),
    ],
    report: Annotated[
        Path | None, _output("--report", "Write a report with figures and images: one HTML file.")
    ] = None,
    json_file: Annotated[Path | None, _output("--json", "Write as JSON.")] = None,
    csv_file: Annotated[Path | None, _output("--csv", "Write as CSV.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All images, where there is no validation part.")] = False,
    task: Task = "classification",
    trust: Trust = False,
    **settings: Any,
) -> None:
    """Evaluate models side by side, and write a report.

    A fitted temperature and threshold are stored in the folders of converted models; predict then says "unsure" where
    it is. On several devices with `accelerate launch -m masksurgery evaluate ...`.
    """
    config = pick(EvaluateConfig, settings)
    data_config = pick(DataConfig, settings, data=data)
    check_files(report, json_file, csv_file)
    from masksurgery import evaluate as run
    from masksurgery.evaluation_tables import evaluation_tables
    from masksurgery.progress import Steps
    from masksurgery.report import write_report
    from masksurgery.tables import out

    if report is not None:
        _check_report()
    main = is_main_process()
    with Steps(main) as steps:
        found = run(
            directories,
            data_config,
            config=config,
            everything=everything,
            task=task,  # type: ignore[arg-type]
            trust=trust,
            observer=steps,
        )
    if not main:
        return
    out().print(evaluation_tables(found))
    for file, write in ((json_file, found.write_json), (csv_file, found.write_csv)):
        if file is not None:
            write(file)
    if report is not None:
        write_report(found, report)
        out().print(f"The report is in {report}.", soft_wrap=True)


def _check_report() -> None:
    """Raise a ConfigError unless a report can be written."""
    for package in ("jinja2", "matplotlib"):
        require(package, "evaluate", "A report")


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the images, the models and the report.")
    ] = Path("masksurgery-demo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="For everything that is drawn.")] = 0,
) -> None:
    """Do the whole job on handwritten digits.

    A small model is trained on the digits 0 to 7 and becomes an ensemble; what do both say of 8 and 9? Takes about two
    minutes on two cores, and no network.
    """
    from masksurgery.demo import Demo
    from masksurgery.evaluation_tables import evaluation_tables
    from masksurgery.progress import Steps
    from masksurgery.report import write_report
    from masksurgery.tables import out

    _check_report()
    with Steps() as steps:
        run = Demo(output, seed)
        found = run.run(say=steps.say, observer=steps)
    report = output / "report.html"
    write_report(found, report)
    found.write_json(output / "evaluation.json")
    out().print(evaluation_tables(found))
    out().print(f"\nThe report is in {report}.", soft_wrap=True)
    image = next(run.unseen.iterdir())
    out().print(f"Next: masksurgery predict {shlex.quote(str(run.ensemble))} {shlex.quote(str(image))}", soft_wrap=True)
