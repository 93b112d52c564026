"""What reads and writes settings, where it was before; new code imports it from `load`, `dump` and `yaml`."""

from pipelines.settings.dump import *  # noqa: F403
from pipelines.settings.load import *  # noqa: F403
from pipelines.settings.yaml import *  # noqa: F403
