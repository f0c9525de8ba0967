"""Data: LightningDataModules whose batches are reproducible, resumable and collated to the batch's own length."""

from adaptrank.data.loader import BatchOrder, ResumableLoader
from adaptrank.data.synthetic import ArithmeticProblems, GeneratedQuestions
from adaptrank.data.task import CompletionTask, LabelTask, TaskData
from adaptrank.data.text import CausalLMData, ClassificationData, Source

__all__ = [
    "ArithmeticProblems",
    "BatchOrder",
    "CausalLMData",
    "ClassificationData",
    "CompletionTask",
    "GeneratedQuestions",
    "LabelTask",
    "ResumableLoader",
    "Source",
    "TaskData",
]
