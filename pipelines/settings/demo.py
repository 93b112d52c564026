"""Settings of `datatools demo`."""

from pathlib import Path

from pydantic import Field

from pipelines.settings.base import ELSEWHERE, BudgetText, FilePath, RunSettings
from pipelines.settings.parts import ModelConfig


class DemoConfig(RunSettings):
    """The whole chain on bundled data with a small model: select, audit, report."""

    out: FilePath = Field(default=Path("runs/demo"), description="folder of the demo", json_schema_extra=ELSEWHERE)
    model: ModelConfig | None = Field(default=None, description="another model than the demo's own")
    budget: BudgetText = Field(default="5%", description="how much to select")
    seeds: int = Field(default=1, ge=0, le=100, description="training runs an arm of the audit; 0 leaves the audit out")
