"""Source texts and target texts from files or the Hub."""

from typing import Any

from adaptrank.data.columns import read_fields
from adaptrank.data.mixing import SourceMix
from adaptrank.data.prompt_columns import prompt_columns
from adaptrank.data.prompts import gaps_of
from adaptrank.data.seq2seq_task import Seq2SeqTask, escaped
from adaptrank.data.sources import Source, Sources
from adaptrank.data.tables import Table
from adaptrank.data.task import Row, Split


class Seq2SeqData(Seq2SeqTask):
    """Source texts and target texts from files or the Hub, for encoder-decoder models.

    ```yaml
    data:
      class_path: Seq2SeqData
      init_args: {sources: data/news, prefix: "summarize: ", source: article, target: summary}
    ```
    A row needs `source` and `target`. Each may be a template over columns: `{translation[en]}`
    reaches inside of one.

    Args:
        sources: what to train on: a path, or a list of `Source`, mixed by weight.
        validation, test, predict, val_fraction: as in `CausalLMData`. Prediction needs no target.
        source, target: fields for every source that does not set its own.
        null_is_empty: as in `CausalLMData`.
        kwargs: those of `Seq2SeqTask`.

    Raises:
        FileNotFoundError: in `setup`, if there is no such file, folder or data set.
        UserError: in `setup`, if a column is missing, or null in some row.
    """

    def __init__(
        self,
        sources: Sources,
        validation: Sources | float | None = None,
        test: Sources | None = None,
        predict: Sources | None = None,
        val_fraction: float = 0.1,
        source: str | None = None,
        target: str | None = None,
        null_is_empty: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        settings = {"source": source, "target": target, "null_is_empty": null_is_empty}
        self._sources = SourceMix(
            sources, validation, test, predict, val_fraction, self.seed, settings
        )

    @property
    def source_template(self) -> str | None:
        templates = {source.source for source in self._sources.training}
        template = templates.pop() if len(templates) == 1 else None
        return template if template is not None and gaps_of(template) else None

    @property
    def prompt_columns(self) -> list[dict[str, str | bool]]:
        sources = []
        for source in self._sources.training:
            template = "source" if source.source is None else source.source
            if self.prefix:
                whole = template if not template or gaps_of(template) else f"{{{template}}}"
                # A column with a colon in its name has no place in a format string.
                if template and not gaps_of(template) and gaps_of(whole) != [template]:
                    continue
                template = escaped(self.prefix) + whole
            sources.append(Source(source.path, prompt=template, null_is_empty=source.null_is_empty))
        return prompt_columns(sources)

    def rows(self, split: Split) -> list[Row] | None:
        fields = ("source",) if split == "predict" else ("source", "target")

        def read(table: Table, source: Source) -> list[Row]:
            return read_fields(table, source, fields, fields)

        return self._sources.rows(split, read)
