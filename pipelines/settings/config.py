"""The models of all commands, where they were before; new code imports them from the file of the command."""

from pipelines.settings.audit import *  # noqa: F403
from pipelines.settings.base import *  # noqa: F403
from pipelines.settings.demo import *  # noqa: F403
from pipelines.settings.diagnose import *  # noqa: F403
from pipelines.settings.order import *  # noqa: F403
from pipelines.settings.parts import *  # noqa: F403
from pipelines.settings.select import *  # noqa: F403
from pipelines.settings.train import *  # noqa: F403
