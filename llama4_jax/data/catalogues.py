"""Short texts that people translated into many languages: the message catalogues of an installed program.

A catalogue (`LC_MESSAGES/*.mo`) maps a message, in English as the program has it, to its translation. A message's
number, not its language, is what a split should go by: then no translation of a held-out message is trained on.

Source: the GNU gettext manual, "The format of GNU MO files".
"""

from __future__ import annotations

import importlib.util
import pathlib
import struct

_MAGIC = 0x950412DE
_CONTEXT, _PLURAL = "\x04", "\0"  # context before a message; singular and plural, or the plurals of a translation


def messages(package: str) -> dict[str, dict[str, str]]:
    """Language ("pt_BR") -> message -> translation, of all catalogues of the installed `package`; plurals one a line.

    "en" maps each message of any catalogue to itself. Raises ValueError when the package is not installed or has none.
    """
    found = importlib.util.find_spec(package)
    folders = [pathlib.Path(place) for place in (found and found.submodule_search_locations) or ()]
    paths = sorted(path for folder in folders for path in folder.rglob("*/LC_MESSAGES/*.mo"))
    if not paths:
        raise ValueError(f"no package {package!r} with message catalogues is installed; pip install {package}")
    languages: dict[str, dict[str, str]] = {"en": {}}
    for path in paths:
        catalogue = read(path.read_bytes(), str(path))
        languages.setdefault(path.parent.parent.name, {}).update(catalogue)
        languages["en"].update({message: message for message in catalogue})
    return languages


def read(content: bytes, source: str) -> dict[str, str]:
    """Message -> translation of one `.mo` file; untranslated messages and the file's header are left out.

    Raises ValueError, naming `source`, for bytes that are no such file.
    """
    order = next((order for order in "<>" if content[:4] == struct.pack(order + "I", _MAGIC)), None)
    if order is None:
        raise ValueError(f"{source} starts with {content[:4]!r}; wanted a catalogue compiled by msgfmt")
    count, originals, translations = struct.unpack_from(order + "3I", content, 8)
    found = {}
    for index in range(count):
        message, translation = (
            content[start : start + length].decode()
            for length, start in (
                struct.unpack_from(order + "2I", content, table + 8 * index) for table in (originals, translations)
            )
        )
        if message and translation:
            found[message.rpartition(_CONTEXT)[2].replace(_PLURAL, "\n")] = translation.replace(_PLURAL, "\n")
    return found
