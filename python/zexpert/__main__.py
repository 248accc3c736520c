"""`python -m zexpert` is the `zexpert` command."""

from zexpert_command import main

main()
