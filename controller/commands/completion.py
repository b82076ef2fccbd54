"""Completion of the command line by the shell: recipes, settings and their words. Loads neither torch, ray nor vllm.

eval "$(rlhf-dist completion bash)"        zsh: the same       fish: rlhf-dist completion fish | source
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")

Completer = Callable[..., list[str]]


def shell_code(shell: str) -> str:
    """What the shell has to read once to complete `rlhf-dist`."""
    from argcomplete.shell_integration import shellcode

    return shellcode(["rlhf-dist"], shell=shell)


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and leave, where it is the shell that asks (_ARGCOMPLETE is set)."""
    import argcomplete

    argcomplete.autocomplete(parser)


def recipes(prefix: str, **_: Any) -> list[str]:
    """Our recipes, and the Python files, files of stages and folders that begin with `prefix`."""
    from rlhf_dist.recipe_files import list_recipes, list_stage_files, load_papers

    if prefix.partition("/")[0] in list_recipes() and "/" in prefix:
        return [name for name in load_papers() if name.startswith(prefix)]
    folder, name = Path(prefix).parent, prefix.rpartition("/")[2]
    beside = [path for path in sorted(folder.glob(f"{name}*")) if path.suffix in (".py", ".yaml") or path.is_dir()]
    ours = [*list_recipes(), *list_stage_files()]
    return [*ours, *(f"{path}/" if path.is_dir() else str(path) for path in beside)]


def overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """`key=` for every setting of the recipe; `key=word` where a setting is one of a few words."""
    from rlhf_dist import typed
    from rlhf_dist.compose import option_names, root_type
    from rlhf_dist.overrides import GROUPS
    from rlhf_dist.recipe_files import load_recipe

    try:
        recipe = load_recipe(parsed_args.recipe)
    except ValueError:
        return []
    root = root_type(recipe)
    keys = typed.keys(root)
    key, found, _value = prefix.partition("=")
    if not found:
        leaves = [name for name in keys if not any(other.startswith(f"{name}.") for other in keys) or name in GROUPS]
        return [f"{name}=" for name in leaves if name.startswith(prefix)]
    words = option_names(key, parsed_args.recipe) if key in GROUPS else _words(root, keys, key)
    return [f"{key}={word}" for word in words]


def _words(root: type, keys: dict[str, Any], key: str) -> list[str]:
    from rlhf_dist import typed

    if f"{key}.name" in keys:
        key = f"{key}.name"
    kinds = [keys.get(key), *typing.get_args(keys.get(key))]
    words = [str(word) for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    return [*(["true", "false"] if bool in kinds else []), *words, *typed.allowed_words(root, key)]
