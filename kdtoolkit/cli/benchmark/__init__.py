"""`kd benchmark`: run suites, print leaderboards, look after stored results."""

from __future__ import annotations

import typer

from kdtoolkit.cli._common import examples, help_alone
from kdtoolkit.cli.benchmark.report import report
from kdtoolkit.cli.benchmark.run import run, suites
from kdtoolkit.cli.benchmark.watch import watch

app = typer.Typer(help="Compare methods on a leaderboard.")


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    help_alone(context)


app.command(
    "run",
    epilog=examples(
        "kd benchmark run",
        "kd benchmark run photos --data my_photos --seeds 5",
        "kd benchmark run my_suite.yaml --only CrossKD --only PKD --jobs 2",
        "kd benchmark run my_suite.yaml --seeds 3-5",
    ),
)(run)
app.command("report", epilog=examples("kd benchmark report runs/quick"))(report)
app.command("watch", epilog=examples("kd benchmark watch", "kd benchmark watch runs/quick --once"))(watch)
app.command("suites")(suites)
