# SPDX-License-Identifier: Apache-2.0
"""`python -m zexpert_tools` is the `zexpert` command."""

from zexpert_tools.command import main

main()
