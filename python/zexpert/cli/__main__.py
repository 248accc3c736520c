# SPDX-License-Identifier: Apache-2.0
"""`python -m zexpert.cli` is the `zexpert` command."""

from zexpert_command import main

main()
