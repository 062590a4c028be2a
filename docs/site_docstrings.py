"""How griffe, which reads the docstrings for the API reference, has to see classes of this package."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SELF = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)


class Docstrings(griffe.Extension):
    """Finds the arguments that a class docstring describes, and leads its links to the pages of the site."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a class the constructor that is written otherwise: by the fields of a NamedTuple, or as `__new__`."""
        if "__init__" in cls.members:
            return
        parameters = None
        if any(str(base).rpartition(".")[2] == "NamedTuple" for base in cls.bases):
            kind = griffe.ParameterKind.positional_or_keyword
            fields = [field for field in cls.members.values() if field.is_attribute and field.annotation is not None]
            made = [griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value)
                    for field in fields]  # fmt: skip
            parameters = griffe.Parameters(_SELF, *made)
        elif "__new__" in cls.members:
            parameters = cls.members["__new__"].parameters
        if parameters is not None:
            cls.set_member("__init__", griffe.Function("__init__", parameters=parameters))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Let links between the pages of `docs` start at the folder of the API reference."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(\]\()([\w-]+\.md)", r"\1../\2", obj.docstring.value)
