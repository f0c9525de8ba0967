"""One LightningModule per task: build the backbone, adapt it, step, log."""

from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.causal_lm import CausalLM
from adaptrank.modules.sequence_classification import SequenceClassification
from adaptrank.modules.settings import Adapter

__all__ = ["AdaptedModule", "Adapter", "CausalLM", "SequenceClassification"]
