"""The pages' commands work: every bash and python block runs, or says why it does not.

A block after ``<!-- not run: reason -->`` is left out. A text block after ``<!-- output -->`` holds
exactly what the block before it prints. The blocks of a page share one working folder.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"bash": ["bash", "-e", "-o", "pipefail", "-c"], "python": [sys.executable, "-c"]}
ILLUSTRATIONS = {"text", "json", "toml"}
FENCE = re.compile(r" *(`{3,}|~{3,})\s*([\w+-]*)")
REASON = re.compile(r"<!-- not run: \S.* -->")


@dataclass
class Block:
    """A fenced block: its language, text and line, the comment right above it."""

    language: str
    code: str
    line: int
    comment: str


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a Markdown page."""
    found, fence, comment = [], None, ""
    for number, line in enumerate(page.splitlines(keepends=True), 1):
        match = FENCE.match(line)
        if fence is None and match:
            fence = match[1]
            found.append(Block(match[2], "", number, comment))
        elif fence is not None and line.strip() == fence:
            found[-1].code = dedent(found[-1].code)
            fence, comment = None, ""
        elif fence is not None:
            found[-1].code += line
        elif line.strip():
            comment = line.strip()
    assert fence is None, f"line {found[-1].line}: this block is never closed"
    return found


def check(page: str, folder: Path) -> None:
    """Run the blocks of a page in ``folder``; raise AssertionError naming the line that fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    printed = None
    for block in blocks(page):
        where = f"line {block.line}"
        if block.comment == "<!-- output -->":
            assert printed is not None, f"{where}: the output of a block that was not run"
            expected = [line.rstrip() for line in block.code.splitlines()]
            assert [line.rstrip() for line in printed.splitlines()] == expected, where
        elif block.language not in COMMANDS:
            assert block.language in ILLUSTRATIONS, (
                f"{where}: call the block bash or python, or one of {sorted(ILLUSTRATIONS)}"
            )
        elif REASON.fullmatch(block.comment):
            printed = None
        else:
            result = subprocess.run(
                [*COMMANDS[block.language], block.code],
                cwd=folder,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=300,
            )
            printed = result.stdout
            assert result.returncode == 0, f"{where}: {printed}{result.stderr}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_block_of_the_page_runs(name: str, tmp_path: Path) -> None:
    check((ROOT / name).read_text("utf-8"), tmp_path)


PAGE = """
```python
open("a.txt", "w").write("one\\n\\ntwo\\n")
```
Between blocks.

- in a list
  ```bash
  cat a.txt
  ```
<!-- output -->
```text
one

two
```
<!-- not run: it would fail -->
```bash
false
```
"""


def test_a_page_that_keeps_its_word_passes(tmp_path: Path) -> None:
    check(PAGE, tmp_path)
    assert (tmp_path / "a.txt").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("<!-- not run: it would fail -->", "", "line 18"),
        ("<!-- not run: it would fail -->", "<!-- not run: -->", "line 18"),
        ("```bash\nfalse", "```\nfalse", "line 18: call the block"),
        ("false\n```", "false\n", "line 18: this block is never closed"),
        ('"w"', '"r"', "line 2: (.|\n)*FileNotFoundError"),
        ("cat a.txt", "cat b.txt", "line 8: cat: b.txt"),
        ("cat a.txt", "false | true", "line 8"),
        ("one\n\ntwo\n```", "one\ntwo\n```", "line 12"),
    ],
)
def test_a_page_that_breaks_it_fails(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    assert old in PAGE
    with pytest.raises(AssertionError, match=complaint):
        check(PAGE.replace(old, new), tmp_path)
