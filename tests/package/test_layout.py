"""The layout: rooms that are links."""

from __future__ import annotations

from tests.package.trial import LINKED, ROOT


def test_rooms_of_things_to_add_are_links_to_the_folders_at_the_top() -> None:
    for room in LINKED:
        link = ROOT / "l3env" / room
        assert link.is_symlink(), f"{link} is no link: this checkout was made without symbolic links"
        assert link.resolve() == ROOT / room
