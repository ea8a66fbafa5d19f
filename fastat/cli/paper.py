"""The commands that show the paper's models and procedures: models, procs."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastat.cli.options import Json, table_console
from fastat.config.procedures import Preset


def models(json_: Json = False) -> None:
    """Show the models: parameters and operations a clip, beside the paper's Table 2.

    Example: `fastat models --json`
    """
    from fastat.config.paper import NUM_CLASSES, TABLE_2
    from fastat.models import MODELS
    from fastat.models.costs import model_costs

    costs = {name: model_costs(name) for name in MODELS}
    if json_:
        rows = [
            {"name": name, "paper": asdict(TABLE_2[name]), "costs": [asdict(x) for x in of_model]}
            for name, of_model in costs.items()
        ]
        print(json.dumps(rows))
        return
    table = Table(
        title='Models of "AudioTagging Done Right", Table 2',
        caption=f"{NUM_CLASSES} classes; GFLOP: 2 x MAC of a clip's forward pass; mAP: the paper's",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    table.add_column("feature")
    for head in ("parameters", "paper", "GFLOP", "ImageNet\nmAP", "scratch\nmAP"):
        table.add_column(head, justify="right")
    for name, of_model in costs.items():
        paper = TABLE_2[name]
        million = "-" if paper.million_params is None else f"{paper.million_params} M"
        for i, cost in enumerate(of_model):
            table.add_row(
                "" if i else name,
                f"{cost.num_mels} x {cost.num_frames}",
                f"{cost.params:,}",
                "" if i else million,
                f"{cost.gflop:.2f}",
                *(
                    f"{paper.mAP[proc]:.3f} {proc}" if proc in paper.mAP else "-"
                    for proc in cost.procedures
                ),
            )
    table_console().print(table)


def procs(
    preset: Annotated[
        Preset,
        typer.Option(help="authors: also what the runs behind the paper's numbers changed."),
    ] = "paper",
    json_: Json = False,
) -> None:
    """Show the four procedures of the paper's Table 1.

    Example: `fastat procs --json`
    """
    from fastat.config.procedures import AUTHORS, AUTHORS_OPTIONS, AUTHORS_RUNS, PROCEDURES

    if json_:
        document: dict[str, Any] = {name: asdict(p) for name, p in PROCEDURES.items()}
        if preset == "authors":
            document["authors"] = {
                "all": AUTHORS,
                "model_options": AUTHORS_OPTIONS,
                "runs": AUTHORS_RUNS,
            }
        print(json.dumps(document))
        return
    table = Table(title='Procedures of "AudioTagging Done Right", Table 1')
    table.add_column("")
    for name in PROCEDURES:
        table.add_column(name, justify="right")
    for key in asdict(next(iter(PROCEDURES.values()))):
        if key not in ("name", "preset"):
            cells = [getattr(p, key) for p in PROCEDURES.values()]
            shown = [
                {True: "yes", False: "no"}[c] if isinstance(c, bool) else str(c) for c in cells
            ]
            table.add_row(key.replace("_", " "), *shown)
    table_console().print(table)
    if preset == "authors":
        changed = Table("model", "procedure", "changed", title="--preset authors")
        changed.add_row("all", "all", _values(AUTHORS))
        for model, options in AUTHORS_OPTIONS.items():
            changed.add_row(model, "all", _values(options))
        for model, runs in AUTHORS_RUNS.items():
            for name, values in runs.items():
                changed.add_row(model, name, _values(values))
        table_console().print(changed)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
