"""LightningDataModules whose batches are reproducible and resumable.

Batches are padded to the longest of their own examples.
"""

from adaptrank.data.arithmetic_problems import ArithmeticProblems
from adaptrank.data.batch_order import BatchOrder
from adaptrank.data.causal_lm_data import CausalLMData
from adaptrank.data.choice_task import ChoiceTask
from adaptrank.data.classification_data import ClassificationData
from adaptrank.data.collate import causal_batch
from adaptrank.data.completion_task import CompletionTask
from adaptrank.data.generated_choices import GeneratedChoices
from adaptrank.data.generated_dates import GeneratedDates
from adaptrank.data.generated_questions import GeneratedQuestions
from adaptrank.data.generated_sentences import GeneratedSentences
from adaptrank.data.handwritten_digits import HandwrittenDigits
from adaptrank.data.image_data import ImageData
from adaptrank.data.image_task import ImageTask
from adaptrank.data.incremental_data import IncrementalData
from adaptrank.data.label_task import LabelTask
from adaptrank.data.labelled_data import LabelledData
from adaptrank.data.loader import ResumableLoader
from adaptrank.data.multiple_choice_data import MultipleChoiceData
from adaptrank.data.packed_task import PackedTask
from adaptrank.data.prompt_files import file_prompts, is_table
from adaptrank.data.prompts import fill_prompt, gaps_of, read_columns
from adaptrank.data.segments import token_ids
from adaptrank.data.seq2seq_data import Seq2SeqData
from adaptrank.data.seq2seq_task import Seq2SeqTask
from adaptrank.data.sources import Source
from adaptrank.data.task import TaskData
from adaptrank.data.templates import end_of_turn, render_chat, render_prompt
from adaptrank.data.token_classification_data import TokenClassificationData
from adaptrank.data.token_task import TokenTask

__all__ = [
    "ArithmeticProblems",
    "BatchOrder",
    "CausalLMData",
    "ChoiceTask",
    "ClassificationData",
    "CompletionTask",
    "GeneratedChoices",
    "GeneratedDates",
    "GeneratedQuestions",
    "GeneratedSentences",
    "HandwrittenDigits",
    "ImageData",
    "ImageTask",
    "IncrementalData",
    "LabelTask",
    "LabelledData",
    "MultipleChoiceData",
    "PackedTask",
    "ResumableLoader",
    "Seq2SeqData",
    "Seq2SeqTask",
    "Source",
    "TaskData",
    "TokenClassificationData",
    "TokenTask",
    "causal_batch",
    "end_of_turn",
    "file_prompts",
    "fill_prompt",
    "gaps_of",
    "is_table",
    "read_columns",
    "render_chat",
    "render_prompt",
    "token_ids",
]
