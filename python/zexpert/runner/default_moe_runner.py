# SPDX-License-Identifier: Apache-2.0
"""All tokens at once."""

from zexpert.runner.moe_runner_base import MoERunnerBase


class DefaultMoERunner(MoERunnerBase):
    """Runs the experts on all tokens at once. See MoERunner for arguments and formula."""
