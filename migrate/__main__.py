"""`python -m migrate` is the `migrate` command."""

from migrate.cli.main import run

if __name__ == "__main__":
    run()
