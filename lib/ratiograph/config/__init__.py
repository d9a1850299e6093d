"""The only room that knows gin: files, flags and overrides become one checked configuration, and that a graph.

Imports `core` alone; it finds the components of other rooms by walking the packages (`components`). Read first:
`configuration` (parse, build, save), then `values` and `usage` (what is checked), `tree` (a built graph as nodes).
"""

from ratiograph.config.components import is_component, register
from ratiograph.config.configuration import Config, build, parse, save, text, to_dict
from ratiograph.config.differences import changes
from ratiograph.config.locating import check_files
from ratiograph.config.values import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "build",
    "changes",
    "check_files",
    "is_component",
    "parse",
    "register",
    "save",
    "text",
    "to_dict",
]
