"""`python -m zexpert.cli` is the `zexpert` command."""

from zexpert.cli.app import app

app()
