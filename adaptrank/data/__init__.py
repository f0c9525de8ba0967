"""LightningDataModules whose batches are reproducible and resumable.

Batches are padded to the longest of their own examples.
"""

from adaptrank.data.arithmetic_problems import ArithmeticProblems
from adaptrank.data.batch_order import BatchOrder
from adaptrank.data.causal_lm_data import CausalLMData
from adaptrank.data.classification_data import ClassificationData
from adaptrank.data.collate import causal_batch
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.generated_questions import GeneratedQuestions
from adaptrank.data.label_task import LabelTask
from adaptrank.data.loader import ResumableLoader
from adaptrank.data.prompts import fill_prompt, gaps_of
from adaptrank.data.segments import token_ids
from adaptrank.data.sources import Source
from adaptrank.data.task import TaskData
from adaptrank.data.templates import end_of_turn, render_chat

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
    "causal_batch",
    "end_of_turn",
    "fill_prompt",
    "gaps_of",
    "render_chat",
    "token_ids",
]
