"""Mistakes that jsonargparse found, as sentences that are complete once their place is known."""

from collections.abc import Sequence

from adaptrank._errors import UserError
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.given import Entry, locate, sources, spell


class ParsingError(UserError):
    """A mistake whose place is not known yet.

    Args:
        template: the sentence, with KEY and VALUE where the key and the value belong.
        names: names of the keys around the mistake, outermost first. An inner parser knows the
            inner ones, and each parser around it puts its own in front.
        value: the wrong value as text, if there is one.
    """

    def __init__(
        self, template: str, names: tuple[str, ...] = (), value: str | None = None
    ) -> None:
        super().__init__(template)
        self.template = template
        self.names = names
        self.value = value

    def entry(self, args: Sequence[str]) -> Entry | None:
        """Return the entry of the command line or of a file that is wrong, if it is found."""
        return locate(args, self.names, self.value) if self.names else None

    def sentence(self, entry: Entry) -> str:
        """Return the sentence for an entry."""
        value = repr(entry.value)
        value = value if len(value) <= 60 else f"{value[:57]}..."
        return self.template.replace("KEY", spell(entry.key)).replace("VALUE", value)

    def at_its_place(self, args: Sequence[str]) -> ConfigError:
        """Return the final error: "FILE, line N: " or "--option: ", and the sentence.

        Raises:
            ConfigError: if a configuration file cannot be read, which explains everything else.
        """
        sources(args)
        entry = self.entry(args)
        if entry is None:
            return self.whole()
        return self.at(entry)

    def at(self, entry: Entry) -> ConfigError:
        """Return the final error for an entry: its place, and the sentence."""
        sentence = self.sentence(entry)
        # An option is its own key: do not write it twice.
        if entry.where == f"--{spell(entry.key)}":
            key = spell(entry.key)
            sentence = sentence.removeprefix(f"{key}: ")
            sentence = sentence.replace(f"Unknown key {key}.", "Unknown key.", 1)
        return ConfigError(f"{entry.where}: {sentence}", entry.key)

    def whole(self) -> ConfigError:
        """Return the final error without a place."""
        key = ".".join(self.names)
        text = self.template.replace("KEY", key).replace("VALUE", repr(self.value))
        return ConfigError(text, self.names)


class MisfitError(ParsingError):
    """A value of a wrong type, or none of the choices."""

    def sentence(self, entry: Entry) -> str:
        """Return the sentence for an entry, and what to quote where YAML made no string of it."""
        sentence = super().sentence(entry)
        if isinstance(entry.value, str) and "must be a list" in sentence:
            return f"{sentence} Write [{entry.value}]."
        if "must be a string" not in sentence or not isinstance(entry.value, int | float):
            return sentence
        if not isinstance(entry.value, bool):
            return f'{sentence} To give a string, quote it, as in "{entry.value}".'
        word = "yes" if entry.value else "no"
        return (
            f'{sentence} To give a string, quote it, as in "{word}": '
            f"unquoted, YAML reads yes, no, on and off as true and false."
        )


class UnknownKeyError(ParsingError):
    """A key that a class does not take.

    Args:
        owner: the class, or None for the keys of a verb.
    """

    def __init__(
        self, template: str, names: tuple[str, ...] = (), owner: type | None = None
    ) -> None:
        super().__init__(template, names)
        self.owner = owner


class NoClassError(ParsingError):
    """A value that names no class: a mapping with wrong keys, or something else."""

    def sentence(self, entry: Entry) -> str:
        """Return the sentence for an entry, and name a key that stands one level too high."""
        if isinstance(entry.value, dict) and "class_path" in entry.value:
            for name in entry.value:
                if name not in ("class_path", "init_args", "dict_kwargs"):
                    key = spell((*entry.key, name))
                    return f"{key} belongs under init_args, one level deeper."
        return super().sentence(entry)


class MissingKeyError(ParsingError):
    """A required key that is missing. Its place is that of the mapping around it."""

    def entry(self, args: Sequence[str]) -> Entry | None:
        """Return an entry for the missing key, in the line of the mapping that lacks it."""
        *around, name = self.names
        mapping = locate(args, tuple(around), None) if around else None
        if mapping is None:
            return None
        key = mapping.key
        if isinstance(mapping.value, dict) and "init_args" in mapping.value:
            key = (*key, "init_args")
            entries = (entry for source in sources(args) for entry in source)
            mapping = next((e for e in entries if e.key == key), mapping)
        return Entry((*key, name), mapping.where, None)
