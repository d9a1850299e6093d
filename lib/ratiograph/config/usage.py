"""Which lines of a configuration matter: the graph that the root reaches, and every line that it does not.

Notation as in `config_values`: statements, references, macros, scopes. The *instances* are the pairs
(scope, component) that the root reaches. A scoped reference enters its scope, an unscoped one inherits the
scope it is written in; inside a scope a line that names the scope wins over one that does not.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ratiograph.config.signatures import Component, describe_type
from ratiograph.config.values import REQUIRED, ConfigError, Macro, Reference, Statement, expand, parts, spell

__all__ = ["Graph", "check_use", "walk"]


# --- the graph that the root reaches ------------------------------------------------------------------------


@dataclass
class Graph:
    """What building the root would do. Every table is in the order of construction.

    instances: (scope, component) -> parameter -> the statement that gives its value (defaults are absent).
    sites: (scope, component) -> the statement whose reference leads there first (None for the root).
    shadowed: statement key -> the more specific statements that win over it.
    macros: the macros that some value in use goes through.
    """

    instances: dict[tuple[str, str], dict[str, Statement]] = field(default_factory=dict)
    sites: dict[tuple[str, str], Statement | None] = field(default_factory=dict)
    shadowed: dict[tuple[str, str, str], list[Statement]] = field(default_factory=dict)
    macros: set[str] = field(default_factory=set)
    unbuilt: set[tuple[str, str]] = field(default_factory=set)

    def used(self) -> set[tuple[str, str, str]]:
        """Keys of the statements that give some instance a value, macros included."""
        given = {s.key for parameters in self.instances.values() for s in parameters.values()}
        return given | {("", "", name) for name in self.macros}


def walk(root: str, table: Mapping[tuple[str, str, str], Statement], components: Mapping[str, Component]) -> Graph:
    """Follows every reference from the root, with gin's rules for scopes.

    Raises:
        ConfigError: a component that would have to build itself.
    """
    graph = Graph()
    macros = {s.parameter: s for s in table.values() if not s.name}

    def visit(scope: str, name: str, site: Statement | None, path: tuple[tuple[str, str], ...]) -> None:
        if (scope, name) in path:
            chain = " -> ".join(f"@{spell(*node)}()" for node in (*path, (scope, name)))
            raise ConfigError(f"{site.where}: {site} builds itself: {chain}. Give the inner one its own scope.")
        if (scope, name) in graph.instances:
            return
        given = graph.instances[scope, name] = {}
        graph.sites[scope, name] = site
        for parameter in components[name].parameters:
            candidates = [table[s, name, parameter] for s in _prefixes(scope) if (s, name, parameter) in table]
            if not candidates:
                continue
            s = given[parameter] = candidates[-1]
            for loser in candidates[:-1]:
                graph.shadowed.setdefault(loser.key, []).append(s)
            graph.macros |= _macros_in(s.value, macros)
            for part in parts(expand(s.value, macros, s.where)):
                if isinstance(part, Reference):
                    inner = (part.scope or scope, part.name)
                    graph.unbuilt |= set() if part.build else {inner}
                    visit(*inner, s, (*path, (scope, name)))

    visit("", root, None, ())
    return graph


def _prefixes(scope: str) -> list[str]:
    names = scope.split("/") if scope else []
    return ["/".join(names[:i]) for i in range(len(names) + 1)]


def _macros_in(value: object, macros: Mapping[str, Statement]) -> set[str]:
    names = {part.name for part in parts(value) if isinstance(part, Macro) and part.name in macros}
    return names.union(*(_macros_in(macros[name].value, macros) for name in names))


# --- every line has to matter -------------------------------------------------------------------------------


def check_use(root: str, statements: Iterable[Statement], components: Mapping[str, Component]) -> Graph:
    """The graph that the last value of every key describes, once every line matters and no value is missing.

    A line matters if it gives a value to an instance, or did until a *later* line replaced what led to it:
    choosing ``Term.weighting = @KL()`` on the command line leaves the file's ``SBA.lam = 0.5`` idle but not
    wrong, whereas a line that never could have an effect is a mistake.

    Raises:
        ConfigError: an unused binding, macro or scope; a required value that no line gives.
    """
    statements = list(statements)
    table = {s.key: s for s in statements}
    graph = walk(root, table, components)
    order = {id(s): i for i, s in enumerate(statements)}
    mattered = set(graph.used())
    for stage in _stages(statements):
        earlier = {s.key: s for s in statements[:stage]}
        used = walk(root, {**table, **earlier}, components).used()
        mattered |= {key for key in used if key in earlier and order[id(table[key])] < stage}
    for s in table.values():
        winners = graph.shadowed.get(s.key, [])
        overridden_later = winners and all(order[id(w)] > order[id(s)] for w in winners)
        if s.key not in mattered and not overridden_later:
            raise ConfigError(f"{s.where}: {s} {_why_unused(s, graph, table, components)}")
    _check_complete(root, graph, components)
    return graph


def _stages(statements: list[Statement]) -> list[int]:
    """Positions at which a key gets another value: just before each, more lines may have mattered."""
    seen: set[tuple[str, str, str]] = set()
    return [i for i, s in enumerate(statements) if s.key in seen or seen.add(s.key)]


def _why_unused(s: Statement, graph: Graph, table: Mapping, components: Mapping[str, Component]) -> str:
    if not s.name:
        near = difflib.get_close_matches(s.parameter, graph.macros, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"is a macro that nothing uses.{hint} Write %{s.parameter} where it belongs, or remove the line."
    if s.key in graph.shadowed:
        winners = ", ".join(f"{w} ({w.where})" for w in graph.shadowed[s.key])
        return f"has no effect: more specific lines win over it wherever {s.name} is built: {winners}."
    scopes = [scope for scope, name in graph.instances if name == s.name]
    entered = {prefix for scope, _ in graph.instances for prefix in _prefixes(scope)}
    if s.scope and s.scope not in entered:
        near = difflib.get_close_matches(s.scope, scopes or entered - {""}, n=1, cutoff=0.6)
        hint = f" Did you mean '{spell(near[0], s.name)}.{s.parameter}'?" if near else _list_scopes(entered)
        return f"is never used: no reference in use enters the scope '{s.scope}'.{hint}"
    if scopes:
        spelled = ", ".join(f"{spell(scope, s.name)}" for scope in scopes)
        return f"is never used: {s.name} is not built in the scope '{s.scope}', only as: {spelled}."
    alike = [n for _, n in graph.instances if s.parameter in components[n].parameters]
    built = ", ".join(dict.fromkeys(n for _, n in graph.instances))
    near = difflib.get_close_matches(s.name, alike, n=1, cutoff=0.6)
    hint = f"Did you mean '{near[0]}.{s.parameter}'?" if near else f"It holds: {built}."
    remedy = f"Remove the line, or use @{spell(s.scope, s.name)}()."
    return f"is never used: the graph has no {s.name}. {hint} {remedy}"


def _list_scopes(entered: set[str]) -> str:
    names = ", ".join(sorted(entered - {""}))
    return f" Scopes in use: {names}." if names else " No scope is in use."


def _check_complete(root: str, graph: Graph, components: Mapping[str, Component]) -> None:
    for (scope, name), given in graph.instances.items():
        for parameter, p in components[name].parameters.items():
            s = given.get(parameter)
            marked = s is not None and s.value == Macro(REQUIRED)
            if (s is not None or not p.required) and not marked:
                continue
            if (scope, name) in graph.unbuilt and not marked:
                continue  # whoever builds it may pass the value
            site = graph.sites[scope, name]
            built = f"{site.where}: {site} = @{spell(scope, name)}()" if site else f"the root {name}"
            line = f"{spell(scope, name)}.{parameter} = <{describe_type(p.annotation)}>"
            flag = f", or give the flag --{parameter}" if name == root and p.annotation in (int, str) else ""
            raise ConfigError(f"{built}: the required {name}.{parameter} has no value. Add a line `{line}`{flag}.")
