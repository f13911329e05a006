"""Run the Python examples of a Markdown file, each in a fresh namespace, from the current folder."""

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL), 1):
        print(f"-- example {number}")
        exec(compile(code, f"{sys.argv[1]}, example {number}", "exec"), {"__name__": "__main__"})
