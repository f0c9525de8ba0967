"""One LightningModule per task: build the backbone, adapt it, step, log."""

from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.backbone_loading import check_devices
from adaptrank.modules.causal_lm import CausalLM
from adaptrank.modules.classification_module import ClassificationModule
from adaptrank.modules.image_classification import ImageClassification
from adaptrank.modules.label_module import LabelModule
from adaptrank.modules.multiple_choice import MultipleChoice
from adaptrank.modules.optim import build_optimizer, parameter_groups
from adaptrank.modules.seq2seq import Seq2Seq
from adaptrank.modules.sequence_classification import SequenceClassification
from adaptrank.modules.settings import Adapter
from adaptrank.modules.task_matrix import TaskMatrix, task_matrix
from adaptrank.modules.token_classification import TokenClassification

__all__ = [
    "AdaptedModule",
    "Adapter",
    "CausalLM",
    "ClassificationModule",
    "ImageClassification",
    "LabelModule",
    "MultipleChoice",
    "Seq2Seq",
    "SequenceClassification",
    "TaskMatrix",
    "TokenClassification",
    "build_optimizer",
    "check_devices",
    "parameter_groups",
    "task_matrix",
]
