# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command. Needs the extra zexpert[cli]: typer, rich, matplotlib."""
