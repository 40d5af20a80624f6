"""`migrate daemon`: the options of a daemon. What it does is in migrate/daemon/."""

from pathlib import Path

import click

from migrate.cli.params import DEFAULT_DAEMON, ENDPOINT
from migrate.config import DaemonConfig, Endpoint


@click.command()
@click.option(
    "--listen", type=ENDPOINT, default=DEFAULT_DAEMON, show_default=True, help="Where operators and daemons call."
)
@click.option("--page-listen", type=ENDPOINT, help="Where pages are served.  [default: host of --listen, any port]")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="What outlives the daemon: sockets of guests, migrations under way.  [default: nothing outlives it]",
)
@click.option("--advertise", type=ENDPOINT, help="What peers are told instead of --listen.")
@click.option("--advertise-pages", type=ENDPOINT, help="What peers are told instead of --page-listen.")
@click.option(
    "--tls-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Certificate, key, and whom to trust, as `migrate tls issue` makes it.",
)
@click.option(
    "--qemu-dir",
    "qemu_dirs",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where files of QEMU guests that arrive may lie; may be repeated.  [default: nowhere]",
)
@click.option(
    "--programs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Executable files that may be started as guests, by their names.  [default: none]",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="MODULE:CLASS",
    help="An order that peers may ask for, beside those that `migrate policies` lists; may be repeated.  "
    "[default: none]",
)
@click.option("--metrics-listen", type=ENDPOINT, help="Where metrics are served, by plain HTTP.  [default: nowhere]")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="What the log looks like: lines for people, or a JSON object a line.",
)
@click.option("--insecure", is_flag=True, help="Allow addresses that are not loopback, without TLS.")
@click.option("--ready-fd", type=click.IntRange(0), hidden=True, help="Write the addresses here once they serve.")
def daemon(
    listen: str,
    page_listen: str | None,
    state_dir: Path | None,
    advertise: str | None,
    advertise_pages: str | None,
    tls_dir: Path | None,
    qemu_dirs: tuple[Path, ...],
    programs: Path | None,
    policies: tuple[str, ...],
    metrics_listen: str | None,
    log_format: str,
    insecure: bool,
    ready_fd: int | None,
) -> None:
    """Run a daemon: it owns the guests of this host and moves them."""
    if insecure and tls_dir is not None:
        raise click.UsageError("give either --tls-dir or --insecure")
    for option, endpoint in (("--listen", listen), ("--page-listen", page_listen)):
        if endpoint is not None and tls_dir is None and not insecure and not Endpoint.parse(endpoint).is_loopback:
            raise click.UsageError(
                f"{option} {endpoint} is not loopback: whoever reaches that port could read guest memory and run "
                "guests, for nothing is encrypted and nobody is asked who they are. Give --tls-dir, as `migrate tls` "
                "makes it, or --insecure if the network is yours alone."
            )
    if metrics_listen is not None and not insecure and not Endpoint.parse(metrics_listen).is_loopback:
        raise click.UsageError(
            f"--metrics-listen {metrics_listen} is not loopback: metrics are served by plain HTTP to whoever asks, "
            "with --tls-dir, too. Put a proxy before it that knows who may ask, or give --insecure instead of "
            "--tls-dir if the network is yours alone."
        )
    # The C extension and the servers load only where a daemon runs.
    from migrate.daemon.main import run_daemon  # noqa: PLC0415

    run_daemon(
        DaemonConfig(
            listen=listen,
            page_listen=page_listen,
            state_dir=state_dir,
            advertise=advertise,
            advertise_pages=advertise_pages,
            tls_dir=tls_dir,
            qemu_dirs=qemu_dirs,
            programs_dir=programs,
            policies=policies,
            ready_fd=ready_fd,
            metrics_listen=metrics_listen,
            log_format=log_format,
        )
    )
