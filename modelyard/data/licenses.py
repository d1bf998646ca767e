"""The licence of a source file, as an SPDX identifier: from its own header, else from the licence file nearest above."""

from __future__ import annotations

import re
from pathlib import Path

SPDX_LINE = re.compile(r"SPDX-License-Identifier:\s*([A-Za-z0-9.+()\- ]*[A-Za-z0-9.+)])")
HEADER_CHARACTERS = 2000
LICENSE_NAME = re.compile(r"(licen[cs]e|copying|unlicense)([-._].*)?", re.IGNORECASE)

TITLE_CHARACTERS = 400

# The first whose every phrase is there is taken. GNU's and Mozilla's texts speak of one another further down, so for
# them only the title counts; short permissive texts have no title and are known by their words.
TITLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Apache-2.0", ("apache license", "version 2.0")),
    ("AGPL-3.0", ("gnu affero general public license", "version 3")),
    ("LGPL-3.0", ("gnu lesser general public license", "version 3")),
    ("LGPL-2.1", ("gnu lesser general public license", "version 2.1")),
    ("GPL-3.0", ("gnu general public license", "version 3")),
    ("GPL-2.0", ("gnu general public license", "version 2")),
    ("MPL-2.0", ("mozilla public license", "2.0")),
)
PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "neither the name")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
    ("ISC", ("permission to use, copy, modify, and/or distribute this software",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("MIT", ("permission is hereby granted, free of charge", "without restriction")),
    ("Zlib", ("this software is provided 'as-is'", "altered source versions")),
)


def header_license(text: str) -> str | None:
    """What the SPDX line near the top of a source file names; None without one."""
    match = SPDX_LINE.search(text, 0, HEADER_CHARACTERS)
    return match[1] if match else None


def recognise_license(text: str) -> str | None:
    """SPDX identifier of a whole licence text; None when it is none of the common ones."""
    words = " ".join(text.lower().split())
    for candidates, part in ((TITLES, words[:TITLE_CHARACTERS]), (PHRASES, words)):
        for name, phrases in candidates:
            if all(phrase in part for phrase in phrases):
                return name
    return None


class FolderLicenses:
    """Licence of each folder under `root`: its own licence file, else its parent's. Looked up once a folder."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[Path, str | None] = {}

    def __call__(self, folder: Path) -> str | None:
        if folder not in self._known:
            found = self._own(folder)
            if found is None and folder != self.root:
                found = self(folder.parent)
            self._known[folder] = found
        return self._known[folder]

    def _own(self, folder: Path) -> str | None:
        for path in sorted(folder.iterdir()):
            if LICENSE_NAME.fullmatch(path.name) and path.is_file() and path.stat().st_size < 200_000:
                found = recognise_license(path.read_text(encoding="utf-8", errors="replace"))
                if found:
                    return found
        return None
