"""The live panel as a terminal shows it."""

import io

from rich.console import Console

from fastat.system.display import Status, _panel


def test_panel_shows_every_value_under_its_label() -> None:
    status = Status(
        epoch=2,
        epochs=10,
        step=1234,
        total_steps=4462,
        loss=0.0213,
        lr=4e-4,
        clips_per_s=987.6,
        data_wait=0.012,
        seconds_left=3725,
    )
    out = io.StringIO()
    Console(file=out, width=80, force_terminal=False).print(_panel(status))
    _, labels, values = (line.rstrip() for line in out.getvalue().splitlines())
    shown = {
        "epoch": "2/10",
        "step": "1,234/4,462",
        "loss": "0.0213",
        "LR": "4.00e-04",
        "clips/s": "987.6",
        "waiting for data": "1.2%",
        "left": "1:02:05",
    }
    for label, value in shown.items():
        assert values[labels.index(label) :].startswith(value)
