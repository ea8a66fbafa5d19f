"""The command that shows results on one page: report."""

import logging
from pathlib import Path
from typing import Annotated

import typer

log = logging.getLogger(__name__)


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, folders of runs and ablations, JSON of `fastat profile`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .html file to write.")],
    label_quality: Annotated[
        Path | None,
        typer.Option(help="For Figure 2: AudioSet's qa_true_counts.csv, or CSV of id and quality."),
    ] = None,
) -> None:
    """Make one HTML page of runs, ablations and profiles beside the paper's tables.

    The page is self-contained and needs no network: copy it, mail it, print it.

    Examples:

    `fastat report runs/ --out report.html`

    `fastat report runs/a runs/b profile.json --label-quality qa_true_counts.csv --out report.html`
    """
    from fastat.study.report.page import write_report

    inputs, size = write_report(paths, out, label_quality)
    for note in inputs.notes:
        log.warning(note)
    print(f"{out}: {inputs.counts}, {size / 1e6:.1f} MB")
