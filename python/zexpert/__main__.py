# SPDX-License-Identifier: Apache-2.0
"""`python -m zexpert` is the `zexpert` command."""

from zexpert_tools.command import main

main()
