"""The words of a command line against the signature of its function, checked before anything runs.

Fire alone is not safe enough: a mistyped flag runs the whole job and is complained about afterwards, a second
`--set` replaces the first, `--run 1e5` becomes a float, and a stray word fills the next parameter. So the
words are checked and brought into the one form that Fire cannot misread, and Fire converts them by functions
of ours and calls.

A command's function says it all: positional parameters are words (RUN), keyword-only ones flags (--data), a
tuple is a flag that may be repeated, and the docstring's `Args:` is the help.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import fire

from vitds.config.names import did_you_mean, nearest
from vitds.errors import UsageError

Command = Callable[..., None]


def call_command(function: Command, words: Sequence[str], command: str) -> None:
    """Check the words, then let Fire convert them and call the function.

    Raises: UsageError as `checked_words`; whatever the function raises.
    """
    words = checked_words(function, words, command)
    kinds = _kinds(function)
    is_word = {
        name: parameter.kind is not parameter.KEYWORD_ONLY
        for name, parameter in _parameters(function).items()
    }
    named = {name: partial(_convert, kind) for name, kind in kinds.items()}
    fire.decorators.SetParseFns(*(named[name] for name in named if is_word[name]), **named)(function)
    fire.decorators.SetParseFn(str)(function)
    fire.Fire(function, command=words, name=command)


def takes(flags: type) -> Callable[[Callable[..., None]], Command]:
    """Make a command of a function whose last parameter is one frozen dataclass, `flags`.

    Its fields are the flags, its `Args:` their help; the function's other parameters are the command's words.
    """

    def wrap(function: Callable[..., None]) -> Command:
        def command(*words: Any, **given: Any) -> None:
            function(*words, flags=flags(**given))

        about, _, of_words = inspect.getdoc(function).partition("\n\nArgs:\n")
        # Own flags first, then those of the class above.
        documented = [each for each in flags.__mro__ if each is not object]
        of_flags = "\n".join(inspect.getdoc(each).partition("Args:\n")[2] for each in documented)
        command.__name__ = function.__name__
        command.__doc__ = f"{about}\n\nArgs:\n" + "\n".join(filter(None, (of_words, of_flags)))
        hints = typing.get_type_hints(function)
        places = [each for each in inspect.signature(function).parameters.values() if each.name != "flags"]
        command.__annotations__ = {each.name: hints[each.name] for each in places} | typing.get_type_hints(
            flags
        )
        keywords = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for each in inspect.signature(flags).parameters.values()
        ]
        keywords.sort(key=lambda each: each.name not in flags.__annotations__)
        command.__signature__ = inspect.Signature([*places, *keywords])
        return command

    return wrap


def checked_words(function: Command, words: Sequence[str], command: str) -> list[str]:
    """Plain words first, then one `--flag=value` a flag; a repeated flag's values folded into one JSON list.

    Raises: UsageError for an unknown flag (names the nearest), a flag without its value, given twice, or with
        a value of another kind, a word too many, a word or flag that is missing.
    """
    kinds = _kinds(function)
    plain, flags = _sort_words(words, {name: kinds[name] for name in _flag_names(function)}, command)
    _check_plain(function, plain, command)
    folded = []
    for name, values in flags.items():
        if kinds[name] is tuple:
            folded.append(f"--{name}={json.dumps(values)}")
            continue
        if len(values) > 1:
            raise UsageError(f"{_flag(name)} is given {len(values)} times, {' and '.join(values)}; leave one")
        try:
            _convert(kinds[name], values[0])
        except ValueError as error:
            raise UsageError(f"{_flag(name)} {values[0]}: {error}") from None
        folded.append(f"--{name}={values[0]}")
    for name in _flag_names(function):
        if _parameters(function)[name].default is inspect.Parameter.empty and name not in flags:
            raise UsageError(f"{_flag(name)} is missing; see {command} --help")
    return [*plain, *folded]


def _sort_words(
    words: Sequence[str], kinds: dict[str, Any], command: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Plain words, and each flag's values in the order given."""
    plain: list[str] = []
    flags: dict[str, list[str]] = {}
    queue = iter(words)
    for word in queue:
        if not word.startswith("-"):
            plain.append(word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = _parameter(name.replace("-", "_"), kinds)
        if not word.startswith("--") or name not in kinds:
            flag_names = [_flag(known) for known in kinds]
            hint = did_you_mean(_flag(name), flag_names) if flag_names else "this command has none"
            raise UsageError(f"unknown flag {word.partition('=')[0]}; {hint}")
        if not equals:
            value = "true" if kinds[name] is bool else next(queue, "--")
            if value.startswith("--"):
                raise UsageError(
                    f"{_flag(name)} needs a value; a value that itself starts with -- is written "
                    f"{_flag(name)}=VALUE"
                )
        flags.setdefault(name, []).append(value)
    return plain, flags


def _check_plain(function: Command, plain: list[str], command: str) -> None:
    """As many plain words as the function has places for them."""
    places = [p for p in _parameters(function).values() if p.kind is not p.KEYWORD_ONLY]
    is_open = any(place.kind is place.VAR_POSITIONAL for place in places)
    if len(plain) > len(places) and not is_open:
        word = plain[len(places)]
        near = nearest(word.partition("=")[0], _flag_names(function))
        if "=" in word and "set" in _flag_names(function) and not near:
            near = "set"
        hint = (
            f"; did you mean --{near}{' ' + word if near == 'set' else ''}?"
            if near
            else f"; see {command} --help"
        )
        raise UsageError(f"unexpected word {word}{hint}")
    needed = [place for place in places if place.default is place.empty]
    if len(plain) < len(needed):
        raise UsageError(f"{_word_name(needed[len(plain)])} is missing; see {command} --help")


def _convert(kind: Any, text: str) -> Any:
    """The value that a word stands for.

    Raises: ValueError, in words for a person, if the word is of another kind.
    """
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"must be a {'whole ' if kind is int else ''}number") from None
    if kind is tuple:
        return tuple(json.loads(text))
    choices = typing.get_args(kind)
    if choices and text not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    # The shell leaves --data=~/x alone. What begins with ~ is a path: nothing else that a command takes does.
    return os.path.expanduser(text)


def _parameters(function: Command) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _flag_names(function: Command) -> list[str]:
    return [
        name for name, parameter in _parameters(function).items() if parameter.kind is parameter.KEYWORD_ONLY
    ]


def _kinds(function: Command) -> dict[str, Any]:
    """bool, int, float, str, tuple or a Literal for each parameter; `| None` left out."""
    kinds = {}
    for name, hint in typing.get_type_hints(function).items():
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        kinds[name] = tuple if typing.get_origin(hint) is tuple else hint
    kinds.pop("return", None)
    return kinds


def _flag(name: str) -> str:
    """--data for `data`; --in for `in_`, as Python has no parameter of that name."""
    return f"--{name.rstrip('_')}"


def _parameter(flag: str, kinds: dict[str, Any]) -> str:
    """The parameter that a flag's name, without dashes, stands for."""
    return f"{flag}_" if f"{flag}_" in kinds else flag


def _word_name(parameter: inspect.Parameter) -> str:
    """RUN for `run`; SOURCE for `*sources`."""
    name = parameter.name.upper()
    return name.removesuffix("S") if parameter.kind is parameter.VAR_POSITIONAL else name


def help_text(function: Command, command: str) -> str:
    """Usage, what the command does, and a line for each word and flag.

    Kinds and defaults are the signature's, the words the docstring's.
    """
    about, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    lines = dict(re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", arguments, re.MULTILINE))
    parameters, kinds = _parameters(function), _kinds(function)
    usage, words, flags = [command], [], []
    for name, parameter in parameters.items():
        text = " ".join(lines.get(name, "").split())
        if parameter.kind is not parameter.KEYWORD_ONLY:
            word = _word_name(parameter)
            words.append((word, text))
            usage.append(word if parameter.default is parameter.empty else f"[{word}]")
            usage += [f"[{word} ...]"] if parameter.kind is parameter.VAR_POSITIONAL else []
        else:
            flags.append(
                (f"{_flag(name)} {_kind_name(name, kinds[name])}".rstrip(), text + _default_text(parameter))
            )
    flags += [("--debug", "show the traceback of an error"), ("--help", "show this text")]
    usage += ["[flags]"]
    parts = [f"usage: {' '.join(usage)}", about.strip()]
    parts += [
        f"{title}\n{table_text(rows)}" for title, rows in (("words:", words), ("flags:", flags)) if rows
    ]
    return "\n\n".join(parts)


def table_text(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns: names, and what they mean, broken at 110 characters."""
    width = max(len(name) for name, _ in rows) + 4
    return "\n".join(
        textwrap.fill(text, 110, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width)
        if text
        else f"  {name}"
        for name, text in rows
    )


def _kind_name(flag: str, kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {bool: "", int: "N", float: "X"}.get(kind, "KEY=VALUE" if flag.endswith("set") else "TEXT")


def _default_text(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return " (required)"
    return (
        ""
        if parameter.default is None or parameter.default is False or parameter.default == ()
        else f" (default {parameter.default})"
    )
