"""`python launch.py shortcut`: an entry with an icon in the desktop's menu. Standard library only."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "assets" / "launchers"


def main(argv: list[str]) -> int:
    """Write the menu entry; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python launch.py shortcut", description="Put Slipstream into the desktop's menu (Linux)."
    )
    parser.add_argument("--remove", action="store_true", help="take it out again")
    options = parser.parse_args(argv)
    if sys.platform in ("win32", "darwin"):
        name = "Slipstream.bat" if sys.platform == "win32" else "Slipstream.command"
        print(f"Double-click {LAUNCHERS / name}, or make a shortcut to it.")
        return 0
    entry = entry_path()
    if options.remove:
        entry.unlink(missing_ok=True)
        print(f"Removed {entry}")
        return 0
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial = entry.with_suffix(".partial")
        partial.write_text(render(ROOT, sys.executable), encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, entry)
    except OSError as error:
        print(f"{entry} cannot be written ({error.strerror}).", file=sys.stderr)
        return 1
    print(f"Slipstream is in the menu now ({entry}).")
    return 0


def entry_path() -> Path:
    """Where the desktop looks for this person's own menu entries."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "applications" / "slipstream.desktop"


def render(root: Path, python: str) -> str:
    """The menu entry for the project in ``root``, started with ``python``."""
    template = (LAUNCHERS / "slipstream.desktop").read_text(encoding="utf-8")
    command = f"{quote(python)} {quote(str(root / 'launch.py'))}"
    icon = root / "assets" / "icons" / "slipstream.png"
    return template.replace("@COMMAND@", command).replace("@ICON@", str(icon).replace("\\", "\\\\"))


def quote(argument: str) -> str:
    """Quote for the Exec key: inside double quotes, then escaped once more as a string value."""
    escaped = "".join("\\" + character if character in '"`$\\' else character for character in argument)
    return '"' + escaped.replace("\\", "\\\\").replace("%", "%%") + '"'
