# SPDX-License-Identifier: Apache-2.0
"""All tokens at once."""

from zexpert.runner.moe_runner_base import MoERunnerBase


class DefaultMoERunner(MoERunnerBase):
    """Takes all tokens through the experts at once. See MoERunner for arguments and formula."""
