"""The errors that localrl raises on purpose, each with its exit code.

    LocalRLError            1   the run failed
      ConfigError           2   wrong usage or configuration
      MemoryBudgetError     3   does not fit in memory
      DataError             4   data, tasks or rewards
        RewardError         4   a reward function failed too often
      CheckpointError       5   a checkpoint cannot be read or written
      HubError              6   the Hub or the network
      Stopped              75   stopped on request; can be resumed

Every message says what happened, the value seen, and what to do next. The command line prints each
as one line on stderr; only `--debug` shows a traceback.
"""


class LocalRLError(Exception):
    """A failure that localrl can explain; the process ends with `exit_code`."""

    exit_code = 1


class ConfigError(LocalRLError):
    """Wrong usage or configuration, found before anything was computed."""

    exit_code = 2


class MemoryBudgetError(LocalRLError):
    """The run does not fit within its memory limit."""

    exit_code = 3


class DataError(LocalRLError):
    """A task, its data or its rewards cannot be used."""

    exit_code = 4


class RewardError(DataError):
    """A reward function failed so often that its numbers cannot be trusted."""


class CheckpointError(LocalRLError):
    """A checkpoint cannot be read or written."""

    exit_code = 5


class HubError(LocalRLError):
    """The Hub or the network refused or did not answer."""

    exit_code = 6


class Stopped(LocalRLError):
    """The run was asked to stop; its state is saved."""

    exit_code = 75
