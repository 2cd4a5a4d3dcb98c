"""What to optimise: one frozen dataclass per objective, its hyper-parameters and how it turns log-probs into a loss."""

from typing import Annotated

from pydantic import Field

from jaxpo.objectives.preference import DPO, IPO
from jaxpo.objectives.supervised import SFT

AnyObjective = Annotated[SFT | DPO | IPO, Field(discriminator="name")]

__all__ = ["DPO", "IPO", "SFT", "AnyObjective"]
