"""Lets the reference show the section "Example:" of a docstring as code, as it does with "Examples:"."""

import re

import griffe


class Examples(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
