"""The `zexpert` command. Needs the extra zexpert[cli]: typer, rich, matplotlib."""
