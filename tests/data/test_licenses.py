"""Licences of source files: their own header first, then the nearest licence file."""

from __future__ import annotations

import gzip
import re

import pytest

from modelyard.data.licenses import FolderLicenses, header_license, recognise_license

GPL3_BEGINNING = "GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n\n" + "x " * 500
MIT = "Copyright me\n\nPermission is hereby granted, free of charge, to any\nperson … without restriction, including"


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("# SPDX-License-Identifier: MIT\n", "MIT"),
        (
            "/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */",
            "GPL-2.0-only WITH Linux-syscall-note",
        ),
        ("// SPDX-License-Identifier: (MIT OR Apache-2.0)\nx", "(MIT OR Apache-2.0)"),
        ("no header", None),
        ("x" * 3000 + "SPDX-License-Identifier: MIT", None),
    ],
)
def test_header(text, license):
    assert header_license(text) == license


@pytest.mark.parametrize(
    ("text", "license"),
    [
        (GPL3_BEGINNING + "use the GNU Lesser General Public License instead. version 2.1", "GPL-3.0"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1, February 1999", "LGPL-2.1"),
        ("   Apache License\n   Version 2.0, January 2004", "Apache-2.0"),
        ("Mozilla Public License Version 2.0", "MPL-2.0"),
        (MIT, "MIT"),
        ("All rights reserved.", None),
    ],
)
def test_recognise(text, license):
    assert recognise_license(text) == license


def test_real_licence_files(shared_data):
    with gzip.open(shared_data / "code" / "LICENSES.txt.gz", "rt", encoding="utf-8") as file:
        parts = re.split(r"\n=+ ", file.read())
    found = {recognise_license(part) for part in parts}
    assert {"MIT", "Apache-2.0", "BSD-3-Clause"} <= found


def test_nearest_file_above(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "LICENSE.md").write_text(MIT)
    (tmp_path / "a" / "COPYING").write_text(GPL3_BEGINNING)
    (tmp_path / "c" / "LICENSE").write_text("unknown words")
    licenses = FolderLicenses(tmp_path)
    assert [licenses(tmp_path / name) for name in ("", "a", "a/b", "c")] == [
        "MIT",
        "GPL-3.0",
        "GPL-3.0",
        "MIT",
    ]
