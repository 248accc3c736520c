"""`python -m zexpert.cli` is the `zexpert` command."""

from zexpert_command import main

main()
