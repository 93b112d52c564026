"""Settings of `datatools demo`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipelines.settings.base import BudgetText, FilePath, Name, RunSettings
from pipelines.settings.marks import ELSEWHERE, Flags
from pipelines.settings.parts import ModelConfig


class DemoModel(ModelConfig):
    """The model of the demo."""

    name: Name = Field(default="smollm2-135m-instruct", description="another model than the demo's own small one")

    @classmethod
    def expand(cls, value: object) -> object:
        """Return the mapping that a shorthand means, or that of another model's settings.

        Args:
            value: The value of the section.
        """
        return value.model_dump() if isinstance(value, ModelConfig) else super().expand(value)


class DemoConfig(RunSettings):
    """Run a complete example in a few minutes on a CPU.

    The demo selects from bundled rows with a small model, trains on them and on random rows, and draws the report. It
    needs no network.
    """

    examples = ("datatools demo", "datatools demo --out runs/demo-3 --set seeds=3")

    out: FilePath = Field(default=Path("runs/demo"), description="folder of the demo", json_schema_extra=ELSEWHERE)
    model: Annotated[DemoModel, Flags("name device dtype")] = Field(
        default_factory=DemoModel, description="the model to select for"
    )
    budget: BudgetText = Field(default="5%", description="how much to select")
    seeds: int = Field(
        default=1, ge=0, le=100, description="training runs per arm of the audit; 0 leaves the audit out"
    )
