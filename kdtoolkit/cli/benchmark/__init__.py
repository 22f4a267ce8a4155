"""`kd benchmark`: run suites, print leaderboards, look after stored results."""

from __future__ import annotations

import typer

from kdtoolkit.cli._common import examples, help_alone
from kdtoolkit.cli.benchmark.report import report
from kdtoolkit.cli.benchmark.run import run, suites
from kdtoolkit.cli.benchmark.store import compare, list_runs, merge, show
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
        "kd benchmark run my_suite.yaml --executor ray",
    ),
)(run)
app.command(
    "report", epilog=examples("kd benchmark report runs/quick", "kd benchmark report runs/a runs/b --out runs/both")
)(report)
app.command("watch", epilog=examples("kd benchmark watch", "kd benchmark watch runs/quick --once"))(watch)
app.command("suites")(suites)
app.command("list", epilog=examples("kd benchmark list", "kd benchmark list ../results"))(list_runs)
app.command(
    "show",
    epilog=examples(
        "kd benchmark show runs/quick",
        "kd benchmark show runs/quick PKD",
        "kd benchmark show runs/quick PKD 0",
        "kd benchmark show runs/quick teacher",
    ),
)(show)
app.command("compare", epilog=examples("kd benchmark compare runs/quick old/quick"))(compare)
app.command(
    "merge",
    epilog=examples(
        "kd benchmark merge runs/all runs/quick from_b/quick", "kd benchmark merge runs/quick from_b/quick"
    ),
)(merge)
