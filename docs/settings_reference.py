"""An extension of Griffe, which reads the docstrings for the site: configurations show the meaning of each setting.

A setting is declared as `name: type = setting(default, "Meaning.", minimum=0)`. The API reference shows its default
in the signature, and its meaning and limits among the parameters.
"""

import ast
from typing import Any

import griffe


class SettingsReference(griffe.Extension):
    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Adds the settings of a configuration to its docstring."""
        entries = []
        for name, attribute in cls.attributes.items():
            call = attribute.value
            if not isinstance(call, griffe.ExprCall) or str(call.function) not in ("setting", "section"):
                continue
            default, meaning, *limits = call.arguments
            attribute.value = default if str(call.function) == "setting" else f"{default}()"
            allowed = ", ".join(f"{limit.name} {limit.value}" for limit in limits)
            entries.append(f"    {name}: {ast.literal_eval(str(meaning))}" + f" ({allowed})" * bool(allowed))
        if entries and cls.docstring is not None:
            cls.docstring.value = "\n".join([cls.docstring.value, "", "Args:", *entries])
